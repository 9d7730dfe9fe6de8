"""A tensor that waits in host memory between forward and backward, copied on a stream of its own beside the compute.

Device memory is given back by waiting for the copy a layer later, not by telling the allocator of the second stream: that
would keep it from reuse while a CUDA graph is captured, where these copies work too. Host memory is pinned, and used again.
"""

from __future__ import annotations

from functools import cache

import torch

_spare: list[torch.Tensor] = []
"""Pinned bytes on the host that nobody uses. Pinning takes milliseconds, and is not allowed while a graph is captured."""

_in_graphs: set[int] = set()
"""Addresses of those that a captured graph copies to and from. They are never freed."""


def _take(num_bytes: int) -> torch.Tensor:
    """Pinned memory of at least `num_bytes`, used before if possible. What proved too small makes room for it."""
    fitting = [index for index, memory in enumerate(_spare) if memory.numel() >= num_bytes]
    if fitting:
        memory = _spare.pop(min(fitting, key=lambda index: _spare[index].numel()))
    else:
        free = [index for index, memory in enumerate(_spare) if memory.data_ptr() not in _in_graphs]
        if free:
            del _spare[free[0]]
        memory = _pinned(num_bytes)
    if torch.cuda.is_current_stream_capturing():
        _in_graphs.add(memory.data_ptr())
    return memory


def _pinned(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class HostCopy:
    """A copy of `tensor` in pinned host memory. On the CPU it is the tensor itself: there is nowhere else to go.

    `release` must follow before the backward, and may come while later layers run; only then is the device memory free.
    """

    def __init__(self, tensor: torch.Tensor):
        self.device = tensor.device
        self.source: torch.Tensor | None = tensor
        self.back: torch.Tensor | None = None
        if not tensor.is_cuda:
            return
        num_bytes = tensor.numel() * tensor.element_size()
        self.memory = _take(num_bytes)
        self.host = self.memory[:num_bytes].view(tensor.dtype).view(tensor.shape)
        stream = _copy_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        self.copied = stream.record_event()

    def release(self) -> None:
        """Let go of the device tensor: what runs from now on may overwrite it."""
        if self.source is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.source = None

    def prefetch(self) -> None:
        """Begin to copy it back, so that it is there when it is needed."""
        if self.source is not None or self.back is not None:
            return
        stream = _copy_stream(self.device)
        # Allocated on the compute stream, which frees it again; the copy waits for what used that memory before.
        self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.back.copy_(self.host, non_blocking=True)
        self.copied = stream.record_event()

    def fetch(self) -> torch.Tensor:
        """The tensor on its device again, ready for the current stream. Once: the copy lets go of it."""
        self.prefetch()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        tensor = self.source if self.source is not None else self.back
        assert tensor is not None
        self.source = self.back = None
        if tensor.is_cuda:
            _spare.append(self.memory)
        return tensor


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
