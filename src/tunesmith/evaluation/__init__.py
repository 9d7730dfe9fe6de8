"""Evaluation: ask the model the held-out questions (answers), score what it says (metrics)."""
