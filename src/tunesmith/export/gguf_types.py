"""The types that a GGUF file's weights may have, which tensor gets which, and how values become blocks.

A type such as q4_k_m is a mixture: most matrices in one type of block, the few that cost most quality in a finer one. The mixtures are
llama.cpp's (src/llama-quant.cpp, llama_tensor_get_type): a value here is a fact of that format, so that a file of ours is what others
expect under its name. Vectors and norms stay f32. A matrix whose width is no multiple of a type's block takes the type in `NARROW`.

Legacy blocks (q8_0, q4_0, ...) are written by the `gguf` package. The K and IQ types need llama.cpp's own quantizer (rounding by
search), `ggml_quantize_chunk` of the `xllamacpp` wheel.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunesmith.errors import ConfigError, MachineError

NEEDS_GGUF = "writing GGUF needs the gguf and xllamacpp packages; install them with: pip install 'tunesmith[gguf]'"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is: its role (`attn_v`, `ffn_down`, `output`, `token_embd`, ...), its layer, and the model's facts."""

    role: str
    layer: int
    num_layers: int
    queries_per_key: int
    tied: bool

    @property
    def sensitive(self) -> bool:
        """Whether the layer is one of those that get more bits: the first and last eighth, and every third between."""
        eighth = self.num_layers // 8
        return self.layer < eighth or self.layer >= 7 * self.num_layers // 8 or (self.layer - eighth) % 3 == 2


Rule = Callable[[Place], str | None]
"""The block type of a tensor, or None for the type of most."""


@dataclass(frozen=True, slots=True)
class ExportType:
    """One name of `--to gguf:NAME`: its block type, llama.cpp's file type, and its exceptions."""

    name: str
    block: str
    file_type: str
    rule: Rule = field(default=lambda place: None)


def _finest(place: Place, block: str = "Q6_K") -> str | None:
    """The output matrix, or the embeddings where they are the output too."""
    return block if place.role == "output" or (place.tied and place.role == "token_embd") else None


def _q4_k_m(place: Place) -> str | None:
    more = "Q6_K" if place.role in ("attn_v", "ffn_down") and place.sensitive else None
    return _finest(place) or more or ("Q5_K" if place.role == "attn_qkv" else None)


def _q5_k_m(place: Place) -> str | None:
    more = "Q6_K" if place.role in ("attn_v", "ffn_down") and place.sensitive else None
    return _finest(place) or more or ("Q6_K" if place.role == "attn_qkv" else None)


def _q4_k_s(place: Place) -> str | None:
    first = place.layer < (4 if place.role == "attn_v" else place.num_layers // 8)
    return _finest(place) or ("Q5_K" if place.role in ("attn_v", "ffn_down") and first else None)


def _q3_k_m(place: Place) -> str | None:
    if place.role == "attn_v":
        return "Q5_K" if place.layer < 2 else "Q4_K"
    if place.role == "ffn_down":
        return "Q5_K" if place.layer < place.num_layers // 16 else "Q4_K"
    return _finest(place) or ("Q4_K" if place.role in ("attn_output", "attn_qkv") else None)


def _q2_k(place: Place) -> str | None:
    if place.role == "attn_v":
        return "Q4_K" if place.queries_per_key >= 4 else "Q3_K"
    return _finest(place) or ("Q3_K" if place.role in ("ffn_down", "attn_output") else None)


def _iq4(place: Place) -> str | None:
    if place.role == "attn_v" and place.queries_per_key >= 4:
        return "Q5_K"
    return _finest(place) or ("Q5_K" if place.role == "ffn_down" and place.layer < place.num_layers // 8 else None)


TYPES: dict[str, ExportType] = {
    one.name: one
    for one in (
        ExportType("f32", "F32", "ALL_F32"),
        ExportType("f16", "F16", "MOSTLY_F16"),
        ExportType("bf16", "BF16", "MOSTLY_BF16"),
        ExportType("q8_0", "Q8_0", "MOSTLY_Q8_0"),
        ExportType("q6_k", "Q6_K", "MOSTLY_Q6_K", _finest),
        ExportType("q5_k_m", "Q5_K", "MOSTLY_Q5_K_M", _q5_k_m),
        ExportType("q5_k_s", "Q5_K", "MOSTLY_Q5_K_S", _finest),
        ExportType("q4_k_m", "Q4_K", "MOSTLY_Q4_K_M", _q4_k_m),
        ExportType("q4_k_s", "Q4_K", "MOSTLY_Q4_K_S", _q4_k_s),
        ExportType("q3_k_m", "Q3_K", "MOSTLY_Q3_K_M", _q3_k_m),
        ExportType("q2_k", "Q2_K", "MOSTLY_Q2_K", _q2_k),
        ExportType("iq4_nl", "IQ4_NL", "MOSTLY_IQ4_NL", _iq4),
        ExportType("iq4_xs", "IQ4_XS", "MOSTLY_IQ4_XS", _iq4),
        ExportType("q5_1", "Q5_1", "MOSTLY_Q5_1", _finest),
        ExportType("q5_0", "Q5_0", "MOSTLY_Q5_0", _finest),
        ExportType("q4_1", "Q4_1", "MOSTLY_Q4_1", _finest),
        ExportType("q4_0", "Q4_0", "MOSTLY_Q4_0", _finest),
    )
}
"""The types that need no statistics of activations (an importance matrix), which llama.cpp's smallest do."""

NARROW = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What takes the place of a block of 256 where a row is no multiple of it: a block of 32. Rows that are no multiple of 32 stay f16."""

ROLE = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.weight")


def find_type(name: str) -> ExportType:
    """The type called `name`. Raises ConfigError with those that there are."""
    if name.lower() not in TYPES:
        raise ConfigError(f"gguf:{name}: no such type; expected one of {', '.join(TYPES)}")
    return TYPES[name.lower()]


def block_of(
    name: str, shape: tuple[int, ...], kind: ExportType, num_layers: int, queries_per_key: int, tied: bool
) -> str:
    """The block type of the tensor `name` (GGUF's name) of `shape` (rows first) in a file of type `kind`."""
    match = ROLE.fullmatch(name)
    if len(shape) < 2 or match is None or match[2].endswith("_norm"):
        return "F32"
    if kind.block in ("F32", "F16", "BF16"):
        return kind.block
    place = Place(match[2], int(match[1] or 0), num_layers, queries_per_key, tied)
    block = kind.rule(place) or kind.block
    if shape[-1] % block_width(block):
        if _finest(place):
            block = "Q8_0"
        block = NARROW.get(block, block)
    return block if shape[-1] % block_width(block) == 0 else "F16"


def block_width(block: str) -> int:
    """Values in one block of a type."""
    import gguf

    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[block]][0])


def quantize(values: np.ndarray, block: str) -> np.ndarray:
    """fp32 `values` (rows, width) as the bytes of blocks of type `block`; f32 and f16 as numbers.

    Raises MachineError where llama.cpp's quantizer is needed and not there.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[block]
    values = np.ascontiguousarray(values, dtype=np.float32)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return _quantize_in_llama_cpp(values, kind)


def _quantize_in_llama_cpp(values: np.ndarray, kind: Any) -> np.ndarray:
    """`ggml_quantize_chunk(type, source, destination, first row, rows, width, importance)` of llama.cpp's ggml.h."""
    import ctypes

    import gguf

    try:
        from xllamacpp import xllamacpp
    except ImportError as error:
        raise MachineError(f"{kind.name} is written by llama.cpp's own quantizer; {NEEDS_GGUF}") from error
    library = ctypes.CDLL(xllamacpp.__file__)
    try:
        function = library.ggml_quantize_chunk
    except AttributeError as error:
        raise MachineError(
            f"{kind.name} is written by llama.cpp's own quantizer, which this build of xllamacpp does not show; "
            "choose f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0"
        ) from error
    function.restype = ctypes.c_size_t
    function.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        ctypes.c_void_p,
    ]
    width, size = gguf.GGML_QUANT_SIZES[kind]
    rows = values.shape[0]
    out = np.empty((rows, values.shape[1] // width * size), dtype=np.uint8)
    written = function(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, values.shape[1], None)
    if written != out.nbytes:
        raise MachineError(
            f"llama.cpp's quantizer wrote {written} bytes of {kind.name} where {out.nbytes} were expected"
        )
    return out
