"""Work that runs out of memory: known as such, given back, and done again in halves.

torch is imported inside the functions, as in hardware.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tunesmith.errors import MachineError

Given = TypeVar("Given")
Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or on the CPU the machine, had no memory left for a tensor."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # PyTorch's allocator on the CPU


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """What comes of work that ran out of memory: the reason, in the allocator's words."""

    reason: str


def within_memory(work: Callable[[Given], Result], given: Given) -> Result | OutOfMemory:
    """`work(given)`, or OutOfMemory. It is returned, not raised: a traceback would hold the tensors of the work."""
    try:
        return work(given)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return OutOfMemory(str(error).partition("\n")[0].partition(". GPU ")[0].rstrip(".") or "no memory left")


def release_memory() -> None:
    """Give back what Python's cycles and PyTorch's allocator hold of work that is over."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halve_in_order(part: Sequence[Item]) -> list[list[Item]]:
    """The first half, which has one more of an odd number, and the second."""
    middle = (len(part) + 1) // 2
    return [list(part[:middle]), list(part[middle:])]


@dataclass
class Halving:
    """Does work in parts, and halves every part once more each time that one runs out of memory.

    `times` is how often so far: work that follows on the same object begins with what fitted. `warn` is told of each.
    `give_way` is asked when one item alone is too much: to let go of what others hold, and to say whether there was anything.
    """

    warn: Callable[[str], None] = lambda text: None
    times: int = 0
    give_way: Callable[[], bool] = lambda: False

    def run(
        self,
        parts: Sequence[list[Item]],
        work: Callable[[list[Item]], Result],
        doing: str,
        refusal: Callable[[Item, str], str],
        halve: Callable[[list[Item]], list[list[Item]]] = halve_in_order,
    ) -> Iterator[tuple[list[Item], Result]]:
        """Each part, as small as it became, with `work(part)`, in order.

        `doing` says what is done to how many, e.g. "answering {} prompts". Raises MachineError with `refusal(item, reason)`
        when an item alone is too much.
        """
        waiting = [(part, 0) for part in reversed(parts)]
        while waiting:
            part, halved = waiting.pop()
            if halved < self.times and len(part) > 1:
                waiting += [(half, halved + 1) for half in reversed(halve(part))]
                continue
            result = within_memory(work, part)
            if not isinstance(result, OutOfMemory):
                yield part, result
                continue
            if len(part) == 1:
                if not self.give_way():
                    raise MachineError(refusal(part[0], result.reason))
                release_memory()
                self.times = 0  # with that room larger parts may fit again
                waiting.append((part, halved))
                continue
            release_memory()
            self.times += 1
            self.warn(
                f"{doing.format(len(part))} at once ran out of memory and is done again; from now on half as many: "
                f"{result.reason}"
            )
            waiting.append((part, halved))
