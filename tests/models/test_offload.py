"""Layer inputs in host memory: values come back, and pinned memory is used again, whatever the sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

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


# -- with a stand-in for a device whose copies wait -------------------------------------------------------------------


class Event:
    """Everything that a stream had to do when it was recorded."""

    def __init__(self, work: list[Callable[[], None]]):
        self.work = work

    def wait(self) -> None:
        while self.work:
            self.work.pop(0)()


class Stream:
    """Does nothing before somebody waits for it. The compute stream is the exception: it is never behind."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.knows_compute = False

    def wait_stream(self, other: Any) -> None:
        self.knows_compute = True

    def wait_event(self, event: Event) -> None:
        event.wait()

    def record_event(self) -> Event:
        self.knows_compute = False
        event, self.work = Event(self.work), []
        return event


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU. Copies from and to it are done when the running stream comes to them."""

    is_cuda = True
    device = torch.device("cuda:0")
    running: ClassVar[list[Stream]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(super().__torch_function__, func, types, args, kwargs or {})
        if func is not torch.Tensor.copy_:
            return call()
        assert len(cls.running) == 2, "a copy goes beside the compute"
        stream = cls.running[-1]
        if not stream.knows_compute:  # what it reads is not there yet, or what it writes is still in use
            args[0].fill_(float("nan"))
        else:
            stream.work.append(call)
        return args[0]


@pytest.fixture
def device(pool: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[torch.Tensor], OnDevice]]:
    """Takes a tensor to the device. Memory on the device is full of NaN at first."""
    compute, copies = Stream(), Stream()

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        OnDevice.running.append(stream)
        yield
        OnDevice.running.pop()

    def empty(shape: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        assert device == OnDevice.device
        return torch.full(shape, float("nan"), dtype=dtype).as_subclass(OnDevice)

    cuda = SimpleNamespace(
        stream=within,
        current_stream=lambda _: OnDevice.running[-1],
        is_current_stream_capturing=lambda: False,
    )
    monkeypatch.setattr(offload, "torch", SimpleNamespace(cuda=cuda, empty=empty))
    monkeypatch.setattr(offload, "_copy_stream", lambda _: copies)
    monkeypatch.setattr(OnDevice, "running", [compute])
    yield lambda tensor: tensor.clone().as_subclass(OnDevice)
    assert OnDevice.running == [compute]
    assert copies.work == [], "nothing is begun that nobody waits for"


SIZES = [(7, 12), (9, 12), (1, 1), (7, 12), (30, 5)]


def forward_and_backward(originals: list[torch.Tensor], device: Callable[[torch.Tensor], OnDevice]) -> None:
    """What fused layers do: each lets go of the input before its own, and fetches the next one while it works."""
    copies: list[HostCopy] = []
    inputs: list[OnDevice] = []
    for original in originals:
        inputs.append(device(original))
        if copies:
            copies[-1].release()
            assert copies[-1].source is None, "or its memory is not free"
            inputs[-2].fill_(float("nan"))
        copies.append(HostCopy(inputs[-1]))
    for number in reversed(range(len(copies))):
        if number:
            copies[number - 1].prefetch()
        back = copies[number].fetch()
        assert torch.equal(back, originals[number]), number
        assert back.dtype == originals[number].dtype
        assert copies[number].source is copies[number].back is None
        back.fill_(float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_come_back_bit_for_bit(
    pool: list[torch.Tensor], device: Callable[[torch.Tensor], OnDevice], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    held: set[int] = set()
    for _ in range(3):
        originals = [torch.randn(size).to(dtype) for size in SIZES]
        forward_and_backward(originals, device)
        memory = {each.data_ptr() for each in pool}
        assert len(memory) == len(pool) == len(SIZES)
        assert held in (set(), memory), "the same memory again"
        held = memory
    assert sum(each.numel() for each in pool) == sum(map(math.prod, SIZES)) * dtype.itemsize, "no more than is needed"


def test_it_is_fetched_once_whenever_it_was_prefetched(device: Callable[[torch.Tensor], OnDevice]) -> None:
    values = torch.arange(6.0).view(2, 3)
    for prefetches in (0, 1, 2):
        hidden = device(values)
        copy = HostCopy(hidden)
        copy.release()
        hidden.fill_(float("nan"))
        begun = set()
        for _ in range(prefetches):
            copy.prefetch()
            begun.add(id(copy.back))
        assert len(begun) == min(prefetches, 1), "it is copied back once"
        assert torch.equal(copy.fetch(), values), prefetches


# -- on a GPU ---------------------------------------------------------------------------------------------------------


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
