"""NVIDIA cards by name: their memory, bandwidth and speed, so that a run can be planned for a card that is not here.

Bandwidth and speed are those of NVIDIA's data sheets and architecture white papers. Speed is of dense 16-bit products
with fp32 sums. GeForce cards take those at half rate: 512 FLOP per clock and multiprocessor, so that the number is
512 x multiprocessors x boost clock (RTX 3090: 512 x 82 x 1.695 GHz = 71e12). The same chips sold as RTX A, Ada and PRO
take 1024, and some data sheets print only the number with sparsity, which is twice the one here.

Memory is what PyTorch reports (`total_memory`), which is less than the sticker says: the driver and ECC take theirs. The
numbers are those of out-of-memory messages in public issue threads and logs ("GPU 0 has a total capacity of 31.36 GiB").
They vary by about 1% with the driver. A number with one decimal was not seen with its card's name beside it: it follows
cards with the same chips of memory and may be 2% off.

Left out: laptop cards, which share the desktop cards' names and nothing else; cards below compute capability 7.0; and
the slower bins of one name (an A100 80GB on PCIe reads 1.94 TB/s instead of 2.04, a V100 on PCIe computes 112e12).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cache

from tunesmith.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Card:
    """One card: memory in GB (2^30 bytes), CUDA's (major, minor), bandwidth in bytes/s, speed in FLOP/s.

    `aliases` are other names it goes by, PyTorch's device names among them. An alias may belong to several cards.
    """

    name: str
    memory_gb: float
    capability: tuple[int, int]
    bandwidth: float
    flops: float
    aliases: tuple[str, ...] = ()

    @property
    def bf16(self) -> bool:
        """Whether its tensor cores take bf16: from Ampere on."""
        return self.capability >= (8, 0)


CARDS: tuple[Card, ...] = (
    Card("V100 16GB", 15.7, (7, 0), 900e9, 125e12, ("V100", "V100-SXM2-16GB", "V100-PCIE-16GB")),
    Card("V100 32GB", 31.74, (7, 0), 900e9, 125e12, ("V100", "V100-SXM2-32GB", "V100-SXM3-32GB", "V100-PCIE-32GB")),
    Card("T4", 14.58, (7, 5), 320e9, 65e12, ("T4 16GB",)),
    Card("RTX 2080 Ti", 10.7, (7, 5), 616e9, 53.8e12, ("RTX 2080 Ti 11GB",)),
    Card("A100 40GB", 39.4, (8, 0), 1555e9, 312e12, ("A100", "A100-SXM4-40GB", "A100-PCIE-40GB", "A100-SXM-40GB")),
    Card(
        "A100 80GB",
        79.2,
        (8, 0),
        2039e9,
        312e12,
        ("A100", "A100-SXM4-80GB", "A100-SXM-80GB", "A100 80GB PCIe", "A100-PCIE-80GB"),
    ),
    Card("RTX 3060", 11.7, (8, 6), 360e9, 25.5e12, ("RTX 3060 12GB",)),
    Card("RTX 3070", 7.76, (8, 6), 448e9, 40.6e12, ("RTX 3070 8GB",)),
    Card("RTX 3080", 9.78, (8, 6), 760e9, 59.5e12, ("RTX 3080 10GB",)),
    Card("RTX 3080 Ti", 11.7, (8, 6), 912e9, 68.2e12, ("RTX 3080 Ti 12GB",)),
    Card("RTX 3090", 23.6, (8, 6), 936e9, 71.2e12, ("RTX 3090 24GB",)),
    Card("RTX 3090 Ti", 23.6, (8, 6), 1008e9, 80.0e12, ("RTX 3090 Ti 24GB",)),
    Card("RTX A4000", 15.61, (8, 6), 448e9, 76.7e12, ("RTX A4000 16GB",)),
    Card("RTX A5000", 23.6, (8, 6), 768e9, 111.1e12, ("RTX A5000 24GB",)),
    Card("RTX A6000", 47.4, (8, 6), 768e9, 154.8e12, ("RTX A6000 48GB",)),
    Card("A10", 22.0, (8, 6), 600e9, 125e12, ("A10 24GB",)),
    Card("A10G", 22.0, (8, 6), 600e9, 70e12, ("A10G 24GB",)),
    Card("A40", 44.3, (8, 6), 696e9, 149.7e12, ("A40 48GB",)),
    Card("RTX 4060", 7.6, (8, 9), 272e9, 30.2e12, ("RTX 4060 8GB",)),
    Card("RTX 4060 Ti 8GB", 7.6, (8, 9), 288e9, 44.1e12, ("RTX 4060 Ti",)),
    Card("RTX 4060 Ti 16GB", 15.6, (8, 9), 288e9, 44.1e12, ("RTX 4060 Ti",)),
    Card("RTX 4070", 11.6, (8, 9), 504e9, 58.3e12, ("RTX 4070 12GB",)),
    Card("RTX 4070 Super", 11.6, (8, 9), 504e9, 71.0e12, ("RTX 4070 Super 12GB",)),
    Card("RTX 4070 Ti", 11.73, (8, 9), 504e9, 80.2e12, ("RTX 4070 Ti 12GB",)),
    Card("RTX 4070 Ti Super", 15.6, (8, 9), 672e9, 88.2e12, ("RTX 4070 Ti Super 16GB",)),
    Card("RTX 4080", 15.49, (8, 9), 717e9, 97.5e12, ("RTX 4080 16GB",)),
    Card("RTX 4080 Super", 15.5, (8, 9), 736e9, 104.4e12, ("RTX 4080 Super 16GB",)),
    Card("RTX 4090", 23.5, (8, 9), 1008e9, 165.2e12, ("RTX 4090 24GB",)),
    Card("RTX 6000 Ada", 47.5, (8, 9), 960e9, 364.2e12, ("RTX 6000 Ada Generation", "RTX 6000 Ada 48GB")),
    Card("L4", 22.0, (8, 9), 300e9, 121e12, ("L4 24GB",)),
    Card("L40", 44.4, (8, 9), 864e9, 181e12, ("L40 48GB",)),
    Card("L40S", 44.4, (8, 9), 864e9, 362e12, ("L40S 48GB",)),
    Card(
        "H100", 79.18, (9, 0), 3350e9, 989e12, ("H100 80GB", "H100 80GB HBM3", "H100 SXM", "H100 SXM5", "H100 SXM 80GB")
    ),
    Card("H100 PCIe", 79.1, (9, 0), 2000e9, 756e12, ("H100 PCIe 80GB",)),
    Card("H100 NVL", 93.09, (9, 0), 3900e9, 835e12, ("H100 NVL 94GB", "H100 94GB")),
    Card("GH200", 94.5, (9, 0), 4000e9, 989e12, ("GH200 480GB", "GH200 96GB")),
    Card("H200", 139.7, (9, 0), 4800e9, 989e12, ("H200 SXM", "H200 141GB", "H200 SXM 141GB")),
    Card("B200", 178.35, (10, 0), 7700e9, 2250e12, ("B200 SXM", "B200 180GB", "B200 192GB")),
    Card("B300", 267.69, (10, 3), 8000e9, 2250e12, ("B300 SXM6 AC", "B300 SXM", "B300 288GB")),
    Card("RTX 5060 Ti 8GB", 7.5, (12, 0), 448e9, 47.4e12, ("RTX 5060 Ti",)),
    Card("RTX 5060 Ti 16GB", 15.4, (12, 0), 448e9, 47.4e12, ("RTX 5060 Ti",)),
    Card("RTX 5070", 11.5, (12, 0), 672e9, 61.7e12, ("RTX 5070 12GB",)),
    Card("RTX 5070 Ti", 15.4, (12, 0), 896e9, 87.9e12, ("RTX 5070 Ti 16GB",)),
    Card("RTX 5080", 15.4, (12, 0), 960e9, 112.6e12, ("RTX 5080 16GB",)),
    Card("RTX 5090", 31.36, (12, 0), 1792e9, 209.5e12, ("RTX 5090 32GB",)),
    Card(
        "RTX PRO 6000",
        94.97,
        (12, 0),
        1792e9,
        503.8e12,
        (
            "RTX PRO 6000 96GB",
            "RTX PRO 6000 Blackwell",
            "RTX PRO 6000 Blackwell Workstation Edition",
            "RTX PRO 6000 Blackwell Server Edition",
        ),
    ),
)
"""The known cards, by compute capability."""

SAME_MEMORY = 0.1
"""How far a device's memory may be from the card's: drivers and ECC move it by up to 7%, variants are 17% apart or more."""


def find_card(name: str) -> Card:
    """The card that a user means by `name`; case, spaces, dashes, "GB" and NVIDIA's brand words do not matter.

    Raises ConfigError for a name that belongs to several cards (A100 is sold with 40 and 80 GB) or to none.
    """
    key = _key(name)
    found = _by_key().get(key, [])
    if len(found) == 1:
        return found[0]
    if found:
        stem = found[0].name.rpartition(" ")[0]
        sizes = " and ".join(card.name.rpartition(" ")[2].removesuffix("GB") for card in found)
        said = " or ".join(card.name.replace(" ", "-").removesuffix("GB") for card in found)
        raise ConfigError(f"{stem} comes with {sizes} GB; say {said}")
    raise ConfigError(
        f"no card is called {name!r}: the nearest are {', '.join(_nearest(key))}; name one of them, or give --memory GB "
        "(where there is no GPU, `tunesmith plan --model NAME` lists all)"
    )


def _nearest(key: str) -> list[str]:
    """The three cards whose keys are most like `key`; however far, they show how names are written."""
    close = difflib.get_close_matches(key, _by_key(), n=len(_by_key()), cutoff=0.0)
    return list(dict.fromkeys(card.name for other in close for card in _by_key()[other]))[:3]


def card_of(device_name: str, memory_gb: float) -> Card | None:
    """The card behind PyTorch's device name and total memory in GB, or None: unknown, a laptop's, a slice of a card."""
    for card in _by_key().get(_key(device_name), []):
        if abs(memory_gb - card.memory_gb) <= SAME_MEMORY * card.memory_gb:
            return card
    return None


def _key(name: str) -> str:
    """The letters and digits that tell cards apart: `NVIDIA GeForce RTX 4060 Ti 16 GB` becomes `4060ti16`."""
    text = re.sub(r"(?<=\d)\s*gi?b\b|(?<=[\s_-]\d\d)g\b", "", name.lower())  # "80 GB", "-80g", but not A10G's g
    return re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9]", "", text)


@cache
def _by_key() -> dict[str, list[Card]]:
    """Cards by every key that means them. Built at the first question, which keeps 1.4 ms out of the import."""
    index: dict[str, list[Card]] = {}
    for card in CARDS:
        for key in dict.fromkeys(_key(name) for name in (card.name, *card.aliases)):
            index.setdefault(key, []).append(card)
    return index
