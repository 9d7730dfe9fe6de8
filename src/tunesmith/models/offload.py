"""A tensor that waits in host memory between forward and backward, copied on a stream of its own beside the compute."""

from __future__ import annotations

from functools import cache

import torch


class HostCopy:
    """A copy of `tensor` in pinned host memory. On the CPU it is the tensor itself: there is nowhere else to go.

    The device memory is free for others once the copy is done and the caller has let go of the tensor.
    """

    def __init__(self, tensor: torch.Tensor):
        self.device = tensor.device
        self.host: torch.Tensor | None = None
        self.back: torch.Tensor | None = None
        if not tensor.is_cuda:
            self.back = tensor
            return
        stream = _copy_stream(tensor.device)
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def prefetch(self) -> None:
        """Begin to copy it back, so that it is there when it is needed."""
        if self.back is not None or self.host is None:
            return
        stream = _copy_stream(self.device)
        # Allocated on the compute stream, which frees it again; the copy waits for what used that memory before.
        self.back = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.back.copy_(self.host, non_blocking=True)
        self.back.record_stream(stream)

    def fetch(self) -> torch.Tensor:
        """The tensor on its device again, ready for the current stream. Once: the copy lets go of it."""
        self.prefetch()
        if self.host is not None:
            torch.cuda.current_stream(self.device).wait_stream(_copy_stream(self.device))
        assert self.back is not None
        tensor, self.back, self.host = self.back, None, None
        return tensor


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
