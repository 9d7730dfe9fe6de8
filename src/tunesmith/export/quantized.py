"""A base's weights as bitsandbytes quantized them for training: W -> dequantize(quantize(W)), tensor by tensor.

A QLoRA adapter was trained over q(W), and makes up for W - q(W) as far as its rank lets it. Merged into W (the default) the model also
gets back what quantization lost; merged into q(W) it computes what was seen in training. Which is nearer to the trained model can be measured, and
`merge` does. Written in 16 bits, q(W) takes as much room as W.
"""

from __future__ import annotations

import importlib.util

import torch

from tunesmith.config import QuantizationConfig
from tunesmith.errors import MachineError
from tunesmith.export.skeleton import Skeleton


class QuantizedWeights:
    """`read` gives a base's parameters, those in `names` quantized and back, from the 16-bit type that training quantized from.

    Make it before the skeleton gets its adapter. Raises MachineError without bitsandbytes.
    """

    def __init__(self, skeleton: Skeleton, quantization: QuantizationConfig, dtype: torch.dtype):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MachineError(
                "the quantized base needs bitsandbytes; install it with: pip install 'tunesmith[quantization]'"
            )
        self.skeleton = skeleton
        self.settings = quantization
        self.dtype = dtype
        self.names = frozenset(_quantized_names(skeleton.model))

    def read(self, name: str) -> torch.Tensor:
        """A parameter as training saw it."""
        stored = self.skeleton.stored(name)
        return self._there_and_back(stored) if name in self.names else stored

    def misread(self) -> str | None:
        """What to say where bitsandbytes' CPU code dequantizes rows that are no multiple of 64 wide from other scales than it wrote."""
        wide = {name: self.skeleton.model.get_parameter(self.skeleton.places[name]).shape[-1] for name in self.names}
        odd = sorted(name for name, width in wide.items() if width % 64)
        if self.skeleton.device.type != "cpu" or self.settings.scheme == "int8" or not odd:
            return None
        return (
            f"on a CPU bitsandbytes dequantizes rows that are no multiple of 64 wide wrongly ({odd[0]}: {wide[odd[0]]}); pass --device cuda "
            "for the quantized base that a GPU trained over"
        )

    def _there_and_back(self, stored: torch.Tensor) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit

        weight = stored.to(self.skeleton.device, self.dtype)
        if self.settings.scheme == "int8":
            # LLM.int8 (arXiv:2208.07339): a scale for each row. Its activations are rounded too, which weights cannot show.
            values, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
            return values.float() * scales[:, None] / 127
        packed, state = quantize_4bit(
            weight, blocksize=64, compress_statistics=self.settings.double_quant, quant_type=self.settings.scheme
        )
        back: torch.Tensor = dequantize_4bit(packed, state)
        return back.float()


def _quantized_names(model: torch.nn.Module) -> list[str]:
    """The weights that transformers has bitsandbytes quantize: of linear layers, but the head and what must stay in fp32."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left: list[str] = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    return [
        f"{path}.weight"
        for path, module in model.named_modules()
        if type(module) is torch.nn.Linear and should_convert_module(path, left)
    ]
