"""Serving: one base, several adapters in the same batch, an OpenAI-compatible server."""
