"""Cards found by a user's word or by PyTorch's device name, and their numbers against NVIDIA's data sheets."""

from __future__ import annotations

import pytest

from tunesmith.cards import CARDS, Card, card_of, find_card
from tunesmith.errors import ConfigError

CHIPS = {
    # multiprocessors, boost clock in GHz, FLOP a clock of one multiprocessor's tensor cores with fp32 sums
    "V100 16GB": (80, 1.53, 1024),
    "V100 32GB": (80, 1.53, 1024),
    "T4": (40, 1.59, 1024),
    "RTX 2080 Ti": (68, 1.545, 512),
    "A100 40GB": (108, 1.41, 2048),
    "A100 80GB": (108, 1.41, 2048),
    "RTX 3060": (28, 1.777, 512),
    "RTX 3070": (46, 1.725, 512),
    "RTX 3080": (68, 1.71, 512),
    "RTX 3080 Ti": (80, 1.665, 512),
    "RTX 3090": (82, 1.695, 512),
    "RTX 3090 Ti": (84, 1.86, 512),
    "RTX A4000": (48, 1.56, 1024),
    "RTX A5000": (64, 1.695, 1024),
    "RTX A6000": (84, 1.80, 1024),
    "A10": (72, 1.695, 1024),
    "A40": (84, 1.74, 1024),
    "RTX 4060": (24, 2.46, 512),
    "RTX 4060 Ti 8GB": (34, 2.535, 512),
    "RTX 4060 Ti 16GB": (34, 2.535, 512),
    "RTX 4070": (46, 2.475, 512),
    "RTX 4070 Super": (56, 2.475, 512),
    "RTX 4070 Ti": (60, 2.61, 512),
    "RTX 4070 Ti Super": (66, 2.61, 512),
    "RTX 4080": (76, 2.505, 512),
    "RTX 4080 Super": (80, 2.55, 512),
    "RTX 4090": (128, 2.52, 512),
    "RTX 6000 Ada": (142, 2.505, 1024),
    "L4": (58, 2.04, 1024),
    "L40": (142, 2.49, 512),
    "L40S": (142, 2.49, 1024),
    "H100": (132, 1.83, 4096),
    "H100 PCIe": (114, 1.62, 4096),
    "GH200": (132, 1.83, 4096),
    "H200": (132, 1.83, 4096),
    "RTX 5060 Ti 8GB": (36, 2.572, 512),
    "RTX 5060 Ti 16GB": (36, 2.572, 512),
    "RTX 5070": (48, 2.512, 512),
    "RTX 5070 Ti": (70, 2.452, 512),
    "RTX 5080": (84, 2.617, 512),
    "RTX 5090": (170, 2.407, 512),
    "RTX PRO 6000": (188, 2.617, 1024),
}

MEMORIES = {
    # bits of the memory bus, Gbit/s a pin
    "T4": (256, 10),
    "RTX 2080 Ti": (352, 14),
    "RTX 3060": (192, 15),
    "RTX 3070": (256, 14),
    "RTX 3080": (320, 19),
    "RTX 3080 Ti": (384, 19),
    "RTX 3090": (384, 19.5),
    "RTX 3090 Ti": (384, 21),
    "RTX A4000": (256, 14),
    "RTX A5000": (384, 16),
    "RTX A6000": (384, 16),
    "A10": (384, 12.5),
    "A10G": (384, 12.5),
    "A40": (384, 14.5),
    "RTX 4060": (128, 17),
    "RTX 4060 Ti 8GB": (128, 18),
    "RTX 4060 Ti 16GB": (128, 18),
    "RTX 4070": (192, 21),
    "RTX 4070 Super": (192, 21),
    "RTX 4070 Ti": (192, 21),
    "RTX 4070 Ti Super": (256, 21),
    "RTX 4080": (256, 22.4),
    "RTX 4080 Super": (256, 23),
    "RTX 4090": (384, 21),
    "RTX 6000 Ada": (384, 20),
    "L4": (192, 12.5),
    "L40": (384, 18),
    "L40S": (384, 18),
    "RTX 5060 Ti 8GB": (128, 28),
    "RTX 5060 Ti 16GB": (128, 28),
    "RTX 5070": (192, 28),
    "RTX 5070 Ti": (256, 28),
    "RTX 5080": (256, 30),
    "RTX 5090": (512, 28),
    "RTX PRO 6000": (512, 28),
}


@pytest.mark.parametrize("name", CHIPS)
def test_speed_is_multiprocessors_times_clock(name: str) -> None:
    """No number with sparsity, and no GeForce at the rate of 16-bit sums, has crept in: either would be twice this."""
    multiprocessors, clock, width = CHIPS[name]
    assert find_card(name).flops == pytest.approx(multiprocessors * clock * 1e9 * width, rel=0.011)


@pytest.mark.parametrize("name", MEMORIES)
def test_bandwidth_is_bus_width_times_rate(name: str) -> None:
    bits, rate = MEMORIES[name]
    assert find_card(name).bandwidth == pytest.approx(bits / 8 * rate * 1e9, rel=0.005)


@pytest.mark.parametrize(
    ("name", "memory_gb", "capability", "bandwidth", "flops"),
    [
        ("V100 32GB", 31.74, (7, 0), 900e9, 125e12),
        ("A100 40GB", 39.4, (8, 0), 1555e9, 312e12),
        ("A100 80GB", 79.2, (8, 0), 2039e9, 312e12),
        ("A10G", 22.0, (8, 6), 600e9, 70e12),
        ("H100", 79.18, (9, 0), 3350e9, 989e12),
        ("H100 NVL", 93.09, (9, 0), 3900e9, 835e12),
        ("H200", 139.7, (9, 0), 4800e9, 989e12),
        ("B200", 178.35, (10, 0), 7700e9, 2250e12),
        ("B300", 267.69, (10, 3), 8000e9, 2250e12),
        ("RTX 5090", 31.36, (12, 0), 1792e9, 209.5e12),
    ],
)
def test_numbers(name: str, memory_gb: float, capability: tuple[int, int], bandwidth: float, flops: float) -> None:
    card = find_card(name)
    assert (card.memory_gb, card.capability, card.bandwidth, card.flops) == (memory_gb, capability, bandwidth, flops)


STICKERS = {
    "T4": 16,
    "RTX 2080 Ti": 11,
    "RTX 3060": 12,
    "RTX 3070": 8,
    "RTX 3080": 10,
    "RTX 3080 Ti": 12,
    "RTX 3090": 24,
    "RTX A4000": 16,
    "RTX A5000": 24,
    "RTX A6000": 48,
    "A10": 24,
    "A10G": 24,
    "A40": 48,
    "RTX 4060": 8,
    "RTX 4070": 12,
    "RTX 4070 Super": 12,
    "RTX 4070 Ti": 12,
    "RTX 4070 Ti Super": 16,
    "RTX 4080": 16,
    "RTX 4080 Super": 16,
    "RTX 4090": 24,
    "RTX 6000 Ada": 48,
    "L4": 24,
    "L40": 48,
    "L40S": 48,
    "RTX 3090 Ti": 24,
    "H100": 80,
    "H100 PCIe": 80,
    "H100 NVL": 94,
    "GH200": 96,
    "RTX 5070": 12,
    "RTX 5070 Ti": 16,
    "RTX 5080": 16,
    "RTX 5090": 32,
    "RTX PRO 6000": 96,
    "B200": 180,
    "B300": 270,
    "H200": 141,
}
"""Memory in GB as sold. B200's and B300's 192 and 288 are decimal and before ECC: here, what systems are sold with."""


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_memory_is_a_little_less_than_sold(card: Card) -> None:
    sold = STICKERS.get(card.name) or int(card.name.split()[-1].removesuffix("GB"))
    assert 0.91 * sold < card.memory_gb < sold


def test_bf16_is_from_ampere_on() -> None:
    without = {card.name for card in CARDS if not card.bf16}
    assert without == {"V100 16GB", "V100 32GB", "T4", "RTX 2080 Ti"}
    assert min(card.capability for card in CARDS) == (7, 0)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_name(card: Card) -> None:
    assert find_card(card.name) is card
    assert find_card(card.name.lower().replace(" ", "-")) is card
    assert find_card(f"NVIDIA {card.name}".replace(" ", "")) is card


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("a100-80", "A100 80GB"),
        ("A100-80GB", "A100 80GB"),
        ("a100 80gb", "A100 80GB"),
        ("A100_80GiB", "A100 80GB"),
        ("a100 80g", "A100 80GB"),
        ("a100-40", "A100 40GB"),
        ("v100-32", "V100 32GB"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("RTX-4090", "RTX 4090"),
        ("geforce rtx 4090 24 GB", "RTX 4090"),
        ("4060ti-16", "RTX 4060 Ti 16GB"),
        ("h100", "H100"),
        ("h100-sxm", "H100"),
        ("h100 pcie", "H100 PCIe"),
        ("H100-94GB", "H100 NVL"),
        ("tesla t4", "T4"),
        ("a10", "A10"),
        ("a10g", "A10G"),
        ("a10-24g", "A10"),
        ("l40s", "L40S"),
        ("a6000", "RTX A6000"),
        ("6000 ada", "RTX 6000 Ada"),
        ("rtx pro 6000", "RTX PRO 6000"),
        ("b200", "B200"),
    ],
)
def test_what_users_say(said: str, name: str) -> None:
    assert find_card(said).name == name


HOW_TO_SEE_ALL = (
    "; name one of them, or give --memory GB (where there is no GPU, `tunesmith plan --model NAME` lists all)"
)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("A100", "A100 comes with 40 and 80 GB; say A100-40 or A100-80"),
        ("nvidia v100", "V100 comes with 16 and 32 GB; say V100-16 or V100-32"),
        ("4060 ti", "RTX 4060 Ti comes with 8 and 16 GB; say RTX-4060-Ti-8 or RTX-4060-Ti-16"),
        ("rtx 4095", f"no card is called 'rtx 4095': the nearest are RTX 4090, L40, A40{HOW_TO_SEE_ALL}"),
        ("H100 laptop", f"no card is called 'H100 laptop': the nearest are H100 NVL, H100, H100 PCIe{HOW_TO_SEE_ALL}"),
        # Near nothing: three names all the same, which show how names are written.
        ("banana", f"no card is called 'banana': the nearest are RTX 6000 Ada, B300, A40{HOW_TO_SEE_ALL}"),
        ("foo", f"no card is called 'foo': the nearest are RTX PRO 6000, RTX 6000 Ada, V100 32GB{HOW_TO_SEE_ALL}"),
        ("GeForce", f"no card is called 'GeForce': the nearest are V100 32GB, V100 16GB, T4{HOW_TO_SEE_ALL}"),
    ],
)
def test_what_find_card_refuses(said: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_card(said)
    assert str(caught.value) == message


def test_what_an_ambiguous_message_says_is_understood() -> None:
    for said in ("A100-40", "A100-80", "V100-16", "V100-32", "RTX-4060-Ti-8", "RTX-4060-Ti-16"):
        assert find_card(said).name == said.replace("-", " ") + "GB"


@pytest.mark.parametrize(
    ("device_name", "memory_gb", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.18, "H100"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA H100 PCIe", 79.1, "H100 PCIe"),
        ("NVIDIA H100 NVL", 93.1, "H100 NVL"),
        ("NVIDIA A100-SXM4-40GB", 39.39, "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", 79.25, "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", 79.15, "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", 39.56, "A100 40GB"),
        ("Tesla V100-SXM2-16GB", 15.78, "V100 16GB"),
        ("Tesla V100-SXM2-32GB", 31.74, "V100 32GB"),
        ("Tesla T4", 14.74, "T4"),
        ("NVIDIA GeForce RTX 4090", 23.64, "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 15.69, "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 4060 Ti", 15.7, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 7.75, "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 3080", 9.78, "RTX 3080"),
        ("NVIDIA RTX A6000", 47.54, "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 94.97, "RTX PRO 6000"),
        ("NVIDIA L4", 22.17, "L4"),
        ("NVIDIA L40S", 44.52, "L40S"),
        ("NVIDIA A10G", 22.2, "A10G"),
        ("NVIDIA H200", 139.81, "H200"),
        ("NVIDIA GH200 480GB", 95.0, "GH200"),
        ("NVIDIA B200", 178.36, "B200"),
        ("NVIDIA B300 SXM6 AC", 267.69, "B300"),
    ],
)
def test_the_card_of_a_device(device_name: str, memory_gb: float, name: str) -> None:
    card = card_of(device_name, memory_gb)
    assert card is not None
    assert card.name == name


@pytest.mark.parametrize(
    ("device_name", "memory_gb"),
    [
        ("NVIDIA GeForce RTX 3080 Laptop GPU", 15.74),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7),
        ("NVIDIA GeForce RTX 3080", 11.77),  # the 12 GB variant: more multiprocessors, a wider bus
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19.6),
        ("NVIDIA A100-SXM4-80GB", 39.4),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 94.97),
        ("Quadro RTX 6000", 23.6),
        ("NVIDIA GeForce GTX 1080 Ti", 10.9),
        ("AMD Instinct MI300X", 191.98),
        ("", 24.0),
    ],
)
def test_devices_that_are_no_card_we_know(device_name: str, memory_gb: float) -> None:
    assert card_of(device_name, memory_gb) is None
