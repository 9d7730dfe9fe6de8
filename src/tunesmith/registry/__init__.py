"""The registry: which adapters there are, and what is known of each, read from the files beside them."""
