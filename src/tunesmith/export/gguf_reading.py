"""A GGUF file that was written, read back: whether it holds the source's weights, and what the source computes with the file's.

Two questions are kept apart. What the *type* costs is the KL between the source and the source with the file's weights (dequantized by
the `gguf` package, put back into transformers' names and order). What *llama.cpp* makes of the file is compared with that second one, so
that a type's coarseness hides nothing: a wrong permutation, rotation or norm is as visible in q2_k as in f32.

What is left between the two is that llama.cpp rounds the activations before each product with a matrix: to f16 or bf16 with such
weights, to blocks of 8 bits with quantized ones (ggml-cpu.c, `vec_dot_type`). How much that moves a model's probabilities is computed here
too, by rounding them in the same way; llama.cpp's own rounding falls elsewhere but costs as much, so it is a measure, not a prediction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunesmith.errors import VerificationError
from tunesmith.export.gguf_architectures import Description, as_read, as_stored, tensor_names, translate
from tunesmith.export.gguf_types import quantize
from tunesmith.export.skeleton import Skeleton

SAMPLED_ROWS = 64
"""Rows of each matrix that are quantized once more for the comparison; types quantize each row by itself."""

LOST = {
    "F32": 1e-4,
    "F16": 2e-3,
    "BF16": 8e-3,
    "Q8_0": 0.03,
    "Q6_K": 0.08,
    "Q5": 0.15,
    "Q4": 0.3,
    "IQ4": 0.3,
    "Q3": 0.5,
    "Q2": 0.7,
}
"""The largest ‖file - source‖ / ‖source‖ of a tensor by the beginning of its block type: about four times what normal values lose
(tests/export/test_gguf.py), because weights have heavier tails."""

Q8_BLOCKS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
"""Weights whose activations llama.cpp rounds in blocks of 32; the other quantized ones' in blocks of 256."""


class Weights(Mapping[str, torch.Tensor]):
    """A model's parameters by transformers' names, each read from its files when it is asked for."""

    def __init__(self, skeleton: Skeleton):
        self.skeleton = skeleton

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.skeleton.stored(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.skeleton.places)

    def __len__(self) -> int:
        return len(self.skeleton.places)


class Written:
    """A GGUF file's tensors by transformers' names."""

    def __init__(self, path: Path, description: Description):
        import gguf

        self.description = description
        self.names = tensor_names(description)
        self.reader = gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def key(self, name: str) -> Any:
        """The value of a metadata key; None where the file has none."""
        field = self.reader.fields.get(name)
        return field.contents() if field else None

    def block(self, name: str) -> str:
        """The block type of a parameter."""
        return str(self._tensor(name).tensor_type.name)

    def read(self, name: str) -> torch.Tensor:
        """A parameter as the file has it, dequantized, in transformers' order."""
        tensor = self._tensor(name)
        return as_read(self._own(name), _dequantized(tensor.data, tensor.tensor_type), self.description)

    def compare(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise VerificationError unless the file holds `weights`: as read back they are no further from them than the type's blocks are, and
        they are the very blocks: of a vector all, of a matrix `SAMPLED_ROWS` rows.
        """
        for name, weight in weights.items():
            tensor, block = self._tensor(name), self.block(name)
            source, found = weight.float().cpu(), self.read(name)
            if found.shape != source.shape:
                raise VerificationError(f"{name}: the file has another shape than the source; nothing was kept")
            share = float((found - source).norm() / source.norm().clamp(min=1e-30))
            allowed = next(value for start, value in LOST.items() if block.startswith(start))
            stored, blocks = as_stored(self._own(name), source, self.description).numpy(), tensor.data
            if stored.ndim > 1:
                rows = np.unique(np.linspace(0, len(stored) - 1, SAMPLED_ROWS).astype(int))
                stored, blocks = stored[rows], blocks[rows]
            same = np.array_equal(_bytes(quantize(stored, block)), _bytes(blocks))
            if not share <= allowed or not same:
                raise VerificationError(
                    f"{name}: the file does not hold the source's weights: they differ by {share:.2%} of their norm (allowed for {block}: "
                    f"{allowed:.1%}), or are other blocks than the source's; nothing was kept"
                )

    def logits(self, skeleton: Skeleton, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the source computes with the file's weights (tokens, vocabulary); and with activations rounded as llama.cpp does."""
        plain = skeleton.logits(prompts, self.read)
        with self._rounded(skeleton.model):
            return plain, skeleton.logits(prompts, self.read)

    @contextmanager
    def _rounded(self, model: Any) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                block = self.block(f"{name}.weight")
                handles.append(
                    module.register_forward_pre_hook(lambda _, given, block=block: (rounded(given[0], block),))
                )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _own(self, name: str) -> str:
        return "model.embed_tokens.weight" if name == "lm_head.weight" and self.description.tied else name

    def _tensor(self, name: str) -> Any:
        translated = translate(self._own(name), self.names, self.description)
        if translated not in self.tensors:
            raise VerificationError(f"the file has no {translated}; nothing was kept")
        return self.tensors[translated]


def _bytes(values: Any) -> Any:
    return np.ascontiguousarray(values).view(np.uint8).ravel()


def _dequantized(data: Any, kind: Any) -> torch.Tensor:
    import gguf

    return torch.from_numpy(np.array(gguf.quants.dequantize(data, kind), dtype=np.float32))


def rounded(x: torch.Tensor, block: str) -> torch.Tensor:
    """Activations `x` (..., width) as llama.cpp has them before a product with a matrix of type `block`.

    Blocks of 32: integers of 8 bits and d = max|x| / 127, kept in f16 (ggml's q8_0). Blocks of 256: the value furthest from 0 becomes -127, and
    the scale is kept in f32 (q8_K).
    """
    if block in ("F32", "F16", "BF16"):
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return x.to(kinds[block]).to(x.dtype)
    small = block in Q8_BLOCKS
    values = x.unflatten(-1, (-1, 32 if small else 256))
    furthest = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    step = furthest.abs() / 127 if small else -furthest / 127
    numbers = torch.where(step == 0, 0.0, values / step).round()
    return (numbers * (step.half().float() if small else step)).flatten(-2)
