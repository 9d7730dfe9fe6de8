"""Workflows: what the commands do, composed of the parts below."""
