"""Work that runs out of memory: what counts as that, what it leaves behind, and how it is done again in halves."""

from __future__ import annotations

import weakref

import pytest
import torch

from tunesmith.errors import MachineError
from tunesmith.out_of_memory import Halving, OutOfMemory, is_out_of_memory, within_memory


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")
    )
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize(
    ("error", "text", "reason"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried 2 GiB. GPU 0 has 80 GiB.", "CUDA out of memory. Tried 2 GiB"),
        (RuntimeError, "can't allocate memory: 8 bytes.\nException raised from", "can't allocate memory: 8 bytes"),
        (MemoryError, "", "no memory left"),
    ],
)  # fmt: skip
def test_work_that_runs_out_of_memory_leaves_nothing(error: type[Exception], text: str, reason: str) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []

    def work(size: int) -> None:
        tensor = torch.zeros(size)
        tensors.append(weakref.ref(tensor))
        raise error(text)

    assert within_memory(work, 3) == OutOfMemory(reason)
    assert tensors[0]() is None, "no traceback holds what the work had made"


def test_work_that_fits_and_work_that_fails_otherwise() -> None:
    def fail(_: object) -> None:
        raise RuntimeError("shapes do not match")

    assert within_memory(len, "abc") == 3
    with pytest.raises(RuntimeError, match="shapes do not match"):
        within_memory(fail, None)


class Adding:
    """Adds up parts; those of more than `limit` numbers, or with one above 90, run out of memory."""

    def __init__(self, limit: int):
        self.limit = limit
        self.warnings: list[str] = []
        self.halving = Halving(self.warnings.append)
        self.sizes: list[int] = []

    def __call__(self, parts: list[list[int]]) -> list[tuple[list[int], int]]:
        return list(self.halving.run(parts, self.add, "adding {} numbers", self.refusal))

    def add(self, part: list[int]) -> int:
        self.sizes.append(len(part))
        if len(part) > self.limit or max(part) > 90:
            raise MemoryError
        return sum(part)

    def refusal(self, number: int, reason: str) -> str:
        return f"{number} is too much ({reason})"


def test_parts_are_halved_in_order_and_stay_small() -> None:
    adding = Adding(limit=2)
    assert adding([[1], [2, 3], [4, 5, 6, 7, 8], [9, 10, 11]]) == [
        ([1], 1), ([2, 3], 5), ([4, 5], 9), ([6], 6), ([7], 7), ([8], 8), ([9], 9), ([10], 10), ([11], 11),
    ]  # fmt: skip
    assert adding.sizes == [1, 2, 5, 3, 2, 1, 1, 1, 1, 1, 1]
    assert adding.warnings == [
        f"adding {count} numbers at once ran out of memory and is done again; from now on half as many: no memory left"
        for count in (5, 3)
    ]
    adding.sizes.clear()
    assert adding([[1, 2, 3, 4, 5]]) == [([1, 2], 3), ([3], 3), ([4], 4), ([5], 5)]
    assert adding.sizes == [2, 1, 1, 1]
    assert adding([]) == []


def test_one_that_is_too_much_alone_ends_it() -> None:
    adding = Adding(limit=2)
    with pytest.raises(MachineError, match=r"^91 is too much \(no memory left\)$"):
        adding([[1, 2], [3, 91], [4]])
    assert adding.sizes == [2, 2, 1, 1]
    assert len(adding.warnings) == 1


def test_one_that_is_too_much_alone_is_done_again_if_others_give_way() -> None:
    adding, held = Adding(limit=2), [1]

    def give_way() -> bool:
        adding.limit = 3
        return bool(held and held.pop())

    adding.halving.give_way = give_way
    own = adding.add

    def add(part: list[int]) -> int:
        if len(part) == 1 and held:
            adding.sizes.append(1)
            raise MemoryError
        return own(part)

    adding.add = add  # type: ignore[method-assign]
    assert adding([[1, 2, 3], [4, 5, 6]]) == [([1, 2], 3), ([3], 3), ([4, 5, 6], 15)]
    assert adding.sizes == [3, 2, 1, 1, 3], "with more room there are no halves any more"
    with pytest.raises(MachineError, match=r"^91 is too much"):
        adding([[91]])


def test_memory_is_given_back_before_work_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    adding = Adding(limit=1)
    monkeypatch.setattr(adding.halving, "warn", calls.append)
    adding([[1, 2]])
    assert [call.partition(" ")[0] for call in calls] == ["empty_cache", "adding"]
