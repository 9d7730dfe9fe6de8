"""Memory: what training needs (policy, by arithmetic) and what is given up so that it fits."""
