"""Artifacts made from a trained adapter, each verified after it is written."""
