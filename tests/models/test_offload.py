"""Layer inputs in host memory: values come back, and pinned memory is used again, whatever the sizes."""

from __future__ import annotations

import pytest
import torch

from tunesmith.models import offload
from tunesmith.models.offload import HostCopy

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_on_the_cpu_it_is_the_tensor_itself() -> None:
    tensor = torch.randn(3, 5)
    copy = HostCopy(tensor)
    copy.release()
    copy.prefetch()
    assert copy.fetch() is tensor


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The unused memory, empty at first; what is pinned is ordinary memory here."""
    spare: list[torch.Tensor] = []
    monkeypatch.setattr(offload, "_spare", spare)
    monkeypatch.setattr(offload, "_in_graphs", set())
    monkeypatch.setattr(offload, "_pinned", lambda num_bytes: torch.empty(num_bytes, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return spare


def a_step(pool: list[torch.Tensor], layers: int, num_bytes: int) -> list[torch.Tensor]:
    """What the layers of a forward take, given back by the backward."""
    taken = [offload._take(num_bytes) for _ in range(layers)]
    assert all(memory.numel() >= num_bytes for memory in taken)
    assert len({memory.data_ptr() for memory in taken}) == layers, "nobody shares"
    pool += reversed(taken)
    return taken


def test_memory_is_used_again(pool: list[torch.Tensor]) -> None:
    first = {memory.data_ptr() for memory in a_step(pool, 3, 1000)}
    assert {memory.data_ptr() for memory in a_step(pool, 3, 1000)} == first
    assert {memory.data_ptr() for memory in a_step(pool, 3, 600)} == first
    assert len(pool) == 3


def test_steps_of_every_size_pin_no_more_than_the_largest_needs(pool: list[torch.Tensor]) -> None:
    """Without graphs packed rows differ in every step."""
    for num_bytes in (500, 900, 700, 1000, 300, 950, 800):
        a_step(pool, 4, num_bytes)
        assert len(pool) == 4
    assert [memory.numel() for memory in pool] == [1000] * 4


def test_the_smallest_that_fits_is_taken(pool: list[torch.Tensor]) -> None:
    pool += [torch.empty(size, dtype=torch.uint8) for size in (800, 100, 400, 200)]
    assert [offload._take(size).numel() for size in (150, 150, 150)] == [200, 400, 800]


def test_what_a_graph_copies_to_is_never_freed(pool: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    of_graph = {memory.data_ptr() for memory in a_step(pool, 2, 100)}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    a_step(pool, 2, 5000)
    assert sorted(memory.numel() for memory in pool) == [100, 100, 5000, 5000]
    a_step(pool, 2, 9000)
    assert sorted(memory.numel() for memory in pool) == [100, 100, 9000, 9000]
    assert of_graph <= {memory.data_ptr() for memory in pool}


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_come_back_while_their_memory_is_used(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    originals = [torch.randn(2000 + 100 * layer, 512, device="cuda").to(dtype) for layer in range(6)]
    for _ in range(3):
        copies: list[HostCopy] = []
        for original in originals:
            hidden = original.clone()
            copies.append(HostCopy(hidden))
            if len(copies) > 1:
                copies[-2].release()
            del hidden
            torch.full((2500, 512), float("nan"), device="cuda", dtype=dtype)  # takes what was let go of
        copies[-1].release()
        for layer in reversed(range(6)):
            if layer:
                copies[layer - 1].prefetch()
            back = copies[layer].fetch()
            assert torch.equal(back, originals[layer]), layer
            assert back.shape == originals[layer].shape
    assert len(offload._spare) >= 6
    assert all(memory.is_pinned() for memory in offload._spare)
