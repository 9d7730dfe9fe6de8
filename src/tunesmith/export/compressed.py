"""4-bit weights by GPTQ or AWQ, computed by llmcompressor and written in the compressed-tensors format.

    Q = s · (clamp(round(W / s) + z, -8, 7) - z)        one scale s for every `group_size` inputs of an output; z = 0 in GPTQ

Rounding W to the nearest Q costs ‖(W - Q)x‖ on the inputs x that a layer sees. GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds one input
channel after the other and moves what it lost to those that are left, by H⁻¹ of H = Σ x xᵀ over the calibration rows. AWQ (Lin et al. 2023,
arXiv:2306.00978) scales the channels whose inputs are large before it rounds. Either goes through the decoder layer by layer, so that a layer
is calibrated on what the quantized ones before it give.

Linear layers are quantized, but for the head. Head, embeddings, norms, biases and routers stay in the model's own type.

llmcompressor is a program more than a library: on import it takes over loguru's sinks, and it prints to stdout. Both are kept from the caller
here, for the length of a call; it changes nothing in torch or transformers that would outlast the call (docs/decisions/020-gptq.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tunesmith.errors import ConfigError, MachineError, ModelError, VerificationError
from tunesmith.hardware import Hardware
from tunesmith.models.adapters import expert_paths
from tunesmith.types import Progress, no_progress

Method = Literal["gptq", "awq"]
METHODS: tuple[Method, ...] = ("gptq", "awq")

GROUPS = (128, 64)
"""Inputs that share a scale; the first is taken where every layer's width is a multiple of it."""

LINEARIZED = ("deepseek_v2", "deepseek_v3", "olmoe", "qwen2_moe", "qwen3_moe")
"""Mixtures whose experts come back: llmcompressor makes linear layers of them, and transformers 5.17 puts what it loads together again.
Mixtral's and gpt-oss's come out under names that it does not find."""

SHARD = "5GB"


@dataclass(frozen=True, slots=True)
class Plan:
    """What of a model is quantized: paths of linear layers with their widths (inputs), how many experts' matrices beside them, and
    the group size. `why` says why it is not 128. `head` is the path of the head, which is not quantized.
    """

    layers: Mapping[str, int]
    experts: int
    group_size: int
    why: str
    head: str | None


def require_packages() -> None:
    """Raise MachineError without llmcompressor."""
    if importlib.util.find_spec("llmcompressor") is None:
        raise MachineError("GPTQ and AWQ need llmcompressor; install it with: pip install 'tunesmith[gptq]'")


def refuse_device(hardware: Hardware) -> None:
    """Raise ConfigError where llmcompressor would calibrate on another device: it takes the first accelerator that it sees."""
    if hardware.type == "cpu" and torch.accelerator.is_available():
        raise ConfigError(
            "--device cpu: llmcompressor calibrates on the GPU that it sees; run with CUDA_VISIBLE_DEVICES= in the environment to hide it"
        )
    _, _, index = hardware.device.partition(":")
    if index not in ("", "0"):
        raise ConfigError(
            f"--device {hardware.device}: llmcompressor calibrates on the first GPU that it sees; run with CUDA_VISIBLE_DEVICES={index} "
            "in the environment, and --device cuda"
        )


def plan(model: torch.nn.Module, name: str) -> Plan:
    """Which layers of `model` are quantized, in groups of what size.

    Raises ModelError where a width is no multiple of 64, and for models whose matrices are for the most part no linear layers (the
    experts of a mixture, GPT-2's Conv1D): they would stay in 16 bits.
    """
    base: Any = model
    head = base.get_output_embeddings()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head_path = next((path for path, module in model.named_modules() if module is head), None)
    layers.pop(head_path or "", None)
    experts = _experts(model, name)
    _refuse_other_matrices(model, layers, experts, name)
    widths = {path: module.in_features for path, module in layers.items()}
    inputs = widths | {path: parameter.shape[-1] for path, parameter in experts.items()}
    why = ""
    for size in GROUPS:
        odd = {path: width for path, width in inputs.items() if width % size}
        if not odd:
            return Plan(widths, _expert_matrices(experts), size, why, head_path)
        why = _widths(odd, size)
    raise ModelError(
        f"{name}: {why}; a scale stands for 128 or for 64 inputs of a layer, and neither fits; export it as GGUF (--to gguf:q4_k_m)"
    )


def _widths(odd: Mapping[str, int], size: int) -> str:
    """`q_proj, k_proj (576) are no multiples of 128`, by the last part of their names."""
    names: dict[int, set[str]] = {}
    for path, width in odd.items():
        names.setdefault(width, set()).add(path.rpartition(".")[2])
    listed = "; ".join(f"{', '.join(sorted(found))}: {width} inputs" for width, found in sorted(names.items()))
    return f"{listed}, no multiple of {size}"


def _experts(model: torch.nn.Module, name: str) -> dict[str, torch.nn.Parameter]:
    """Parameters (experts, outputs, inputs) that hold a mixture's experts. Raises ModelError for those that would not load again."""
    base: Any = model
    experts = {path: model.get_parameter(path) for path in expert_paths(model)}
    if experts and base.config.model_type not in LINEARIZED:
        raise ModelError(
            f"{name}: a mixture of experts of type {base.config.model_type}, whose quantized experts transformers {_version()} does not "
            f"load (of mixtures: {', '.join(LINEARIZED)}); leave it in 16 bits"
        )
    return experts


def _expert_matrices(experts: Mapping[str, torch.nn.Parameter]) -> int:
    """How many matrices the experts are: `gate_up_proj` is two of each."""
    return sum(p.shape[0] * (2 if path.endswith("gate_up_proj") else 1) for path, p in experts.items())


def _refuse_other_matrices(
    model: torch.nn.Module, layers: Mapping[str, torch.nn.Linear], experts: Mapping[str, Any], name: str
) -> None:
    weights = {id(each.weight) for each in model.modules() if isinstance(each, (torch.nn.Embedding, torch.nn.Linear))}
    others = {
        path: p for path, p in model.named_parameters() if p.ndim >= 2 and id(p) not in weights and path not in experts
    }
    quantized = sum(each.weight.numel() for each in layers.values()) + sum(p.numel() for p in experts.values())
    if sum(p.numel() for p in others.values()) >= quantized:
        raise ModelError(
            f"{name}: most of its matrices are no linear layers ({', '.join(list(others)[:3])}), and would stay in 16 bits; leave it in 16 bits"
        )


def _version() -> str:
    import transformers

    return str(transformers.__version__)


def left_over(model: torch.nn.Module, found: Plan) -> list[str]:
    """Paths of the matrices that are not quantized: head, embeddings, and whatever is no linear layer."""
    known = {f"{path}.weight" for path in found.layers} | {*expert_paths(model)}
    return [path for path, p in model.named_parameters() if p.ndim >= 2 and path not in known]


def refuse_awq(found: Plan, name: str) -> None:
    """Raise ModelError for AWQ of a mixture of experts: transformers 5.17 does not load experts with zero points."""
    if found.experts:
        raise ModelError(
            f"{name}: --to awq: a mixture of experts, and transformers {_version()} does not load experts with zero points; use --to gptq"
        )


def modifiers(method: Method, found: Plan) -> list[Any]:
    """llmcompressor's steps: GPTQ over symmetric groups, AWQ's scales and then rounding to asymmetric ones, as vLLM has kernels for."""
    with quiet():
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": method == "gptq",
            "strategy": "group",
            "group_size": found.group_size,
        }
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        ignore = [found.head] if found.head else []
        if method == "gptq":
            return [GPTQModifier(config_groups=groups, ignore=ignore)]
        return [_awq()(duo_scaling="both"), QuantizationModifier(config_groups=groups, ignore=ignore)]


def _awq() -> Any:
    """AWQModifier; without an accelerator one that does not pin its cached inputs, which llmcompressor 0.14 does where nothing can be pinned."""
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if torch.accelerator.is_available():
        return AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    class Unpinned(IntermediatesCache):
        def pin_memory(self, batch_index: int, input_names: list[str] | None = None) -> None:
            pass

    class OnCpu(AWQModifier):
        def on_calibration_start(self, state: Any, event: Any, **options: Any) -> None:
            super().on_calibration_start(state, event, **options)
            for parent, cache in self._parent_args_cache.items():
                self._parent_args_cache[parent] = Unpinned(cache.batch_intermediates, cache.offload_device)

    return OnCpu


def calibrate(
    model: Any, steps: Sequence[Any], rows: Sequence[Sequence[int]], progress: Progress = no_progress
) -> list[str]:
    """Run llmcompressor's `steps` over `model`, in place, with the token ids of `rows`; returns what it warned of."""
    from torch.utils.data import DataLoader

    data = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)} for row in rows
    ]
    loader: Any = DataLoader(data, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set
    with _watched(model, progress), quiet() as said:
        from llmcompressor import oneshot

        try:
            oneshot(model=model, dataset=loader, recipe=list(steps), num_calibration_samples=len(rows))
        except torch.fx.proxy.TraceError as error:
            raise ModelError(
                f"llmcompressor cannot follow this model's forward ({error}); export it as GGUF, or leave it in 16 bits"
            ) from error
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"calibration ran out of memory ({error}); pass fewer --calibration-rows, or use a larger GPU"
            ) from error
    return said


def write(model: Any, found: Plan, folder: Path) -> None:
    """Write the quantized `model` to `folder`, and read every tensor of the files back.

    Raises VerificationError where the files hold other bytes than the model, or a layer of the plan that is not packed.
    """
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says that modules are offloaded, which they are not
        model.save_pretrained(folder, max_shard_size=SHARD)
    compare_tensors(folder, digests(model), found)


def digests(model: torch.nn.Module) -> set[str]:
    """SHA-256 of every tensor of the model as it is kept: packed weights, scales, and what is not quantized."""
    return {_digest(tensor) for tensor in model.state_dict().values()}


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    raw = data.flatten().view(torch.uint8).numpy() if data.numel() else b""
    return hashlib.sha256(f"{data.dtype} {tuple(data.shape)} ".encode() + bytes(raw)).hexdigest()


def compare_tensors(folder: Path, expected: set[str], found: Plan) -> None:
    """Raise VerificationError unless each tensor in the files has the bytes of one of the model's (`digests`), and each layer is packed."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                names.add(name)
                if _digest(opened.get_tensor(name)) not in expected:
                    raise VerificationError(
                        f"{file.name}: {name} is not what was computed; nothing was kept (is the disk sound?)"
                    )
    experts = sum(name.endswith(".weight_packed") and ".experts." in name for name in names)
    if experts != found.experts:
        raise VerificationError(
            f"{found.experts - experts} of {found.experts} experts' matrices were not quantized; nothing was kept"
        )
    if bare := [path for path in found.layers if f"{path}.weight_packed" not in names]:
        raise VerificationError(
            f"{len(bare)} of {len(found.layers)} linear layers were not quantized ({', '.join(bare[:3])}); nothing was kept"
        )


@contextlib.contextmanager
def _watched(model: Any, progress: Progress) -> Iterator[None]:
    """Tells `progress` which decoder layer is calibrated: llmcompressor is done with one before it calls the next."""
    layers = max(
        (module for module in model.modules() if isinstance(module, torch.nn.ModuleList)),
        key=len,
        default=torch.nn.ModuleList(),
    )
    shown = -1

    def begins(number: int) -> Any:
        def hook(*_: object) -> None:
            nonlocal shown
            if number > shown:
                shown = number
                with contextlib.redirect_stderr(real):
                    progress("calibrating layers", number, len(layers))

        return hook

    real = sys.stderr
    handles = [layer.register_forward_pre_hook(begins(number)) for number, layer in enumerate(layers)]
    try:
        yield
        progress("calibrating layers", len(layers), len(layers))
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """llmcompressor and compressed-tensors without their output, and without what it sets; yields a list that its warnings are put into."""
    tracer = logging.getLogger("torch.fx._symbolic_trace")
    level, parallel = tracer.level, os.environ.get("TOKENIZERS_PARALLELISM")
    said: list[str] = []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import llmcompressor  # noqa: F401  # which sets its sinks at the first import
        from loguru import logger

        logger.remove()
        sink = logger.add(lambda message: said.append(_said(message.record)), level="WARNING", filter=_worth_saying)
        tracer.setLevel(logging.ERROR)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it would say that it does so
        try:
            yield said
        finally:
            logger.remove(sink)
            tracer.setLevel(level)
            if parallel is None:
                del os.environ["TOKENIZERS_PARALLELISM"]
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = parallel


def _said(record: Any) -> str:
    return str(record["message"]).partition(". Set logging to DEBUG")[0]


def _worth_saying(record: Any) -> bool:
    """Not that there is no GPU, nor how experts are loaded (`linearize`), nor its own measurements (level METRIC, above WARNING)."""
    expected = ("get_main_device", "linearize_moe", "apply_recipe_modifiers")
    return record["level"].name in ("WARNING", "ERROR", "CRITICAL") and record["function"] not in expected
