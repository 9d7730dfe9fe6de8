"""Kernels: one file each, with its reference in plain PyTorch beside it. Imports torch and Triton only."""
