"""How long this machine's processor takes to launch kernels, beside the one that memory/speed.py's times are from."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

REFERENCE_US = 28.5
"""Microseconds that an operation below takes, forward and backward, on the H100's host of memory/speed.py: 45.8 were measured
on another H100's, where the reference engine's launch-bound steps took 1.6 times as long."""

OPERATIONS, ROUNDS = 60, 7


@cache
def host_factor(device: str) -> float:
    """Times that launching takes here of what it takes on the reference host: the median of a few rounds, 20 ms together.

    Each round launches small kernels through autograd, which the GPU ends sooner than Python begins the next ones.
    """
    weight = torch.eye(16, device=device, requires_grad=True)
    seconds = []
    for _ in range(ROUNDS + 2):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        x = weight
        for _ in range(OPERATIONS // 3):
            x = (x @ weight).mul(0.5).add(weight)
        x.sum().backward()
        seconds.append(time.perf_counter() - began)
        weight.grad = None
    return statistics.median(seconds[2:]) / OPERATIONS * 1e6 / REFERENCE_US
