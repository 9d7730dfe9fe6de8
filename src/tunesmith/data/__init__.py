"""Data: a file of rows (formats) becomes Examples, then tokens with a loss mask (chat), then micro-batches (batches)."""
