"""Between adapters and optimizer: apply the memory plan to the model, and prove that its forward is what we think it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tunesmith.data.batches import make_batch
from tunesmith.errors import ModelError
from tunesmith.models.adapters import expert_paths
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of, fuse, set_policies
from tunesmith.models.row_dropout import draw_by_row
from tunesmith.types import MemoryPlan, TokenizedExample

if TYPE_CHECKING:
    import torch


def prepare(
    model: Any, plan: MemoryPlan, dtype: torch.dtype | None = None, report: Callable[[str], object] = str
) -> None:
    """Make `model` (transformers, with or without PEFT) ready to train as `plan` says, in place.

    With the fused engine its layers are swapped for fused ones that compute in `dtype`, each with its policy, and `report`
    is told how. With the reference engine the first `recompute_layers` decoder layers run under activation checkpointing. Training runs under autocast, which
    casts what LoRA's matrices need by itself: PEFT's own cast of every input to fp32 is only copied back, and is off.
    Dropout of adapters draws its masks by row (models/row_dropout.py).
    """
    draw_by_row(model)
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    if plan.engine == "fused":
        model.gradient_checkpointing_disable()
        fuse(model, plan.policies or None, dtype, report)
    else:
        _checkpoint_layers(model, plan.recompute_layers)


def apply_plan(forward: ModelForward, plan: MemoryPlan) -> None:
    """Make a model that `prepare` has seen follow another plan, for the same engine."""
    forward.loss_rows = plan.loss_rows
    if plan.engine == "fused":
        if plan.policies:
            set_policies(forward.model, plan.policies)
    else:
        _checkpoint_layers(forward.model, plan.recompute_layers)


def _checkpoint_layers(model: Any, count: int) -> None:
    """The first `count` decoder layers under activation checkpointing, the others not."""
    if not count:
        model.gradient_checkpointing_disable()
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if (source := draw_by_row(model)) is not None:
        options["context_fn"] = source.checkpoint_contexts
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", None) is True]
    blocks = [layer for layer in layers if not hasattr(layer, "layers")]
    for block in blocks[count:]:
        block.gradient_checkpointing = False


def check_forward(forward: ModelForward, packing: bool) -> None:
    """Two forwards on a few tokens that make silent wrong training impossible. Raises ModelError.

    1. head(hidden) equals the model's own logits. 2. With packing, changing one document changes no bit of another, but where documents
    share products whose sizes depend on both.
    """
    import numpy as np
    import torch

    vocabulary = forward.base.config.get_text_config().vocab_size
    ids = (7919 * np.arange(1, 25) % vocabulary).astype(np.int32)
    first, other, second = (TokenizedExample(part, np.ones(8, dtype=bool)) for part in np.split(ids, 3))
    # Documents touch each other by rounding where LLM.int8() picks its outlier columns over the whole batch, and where an expert's
    # product has as many rows as tokens were sent to it (1e-6 in fp32 with Qwen3-MoE).
    rounds = getattr(forward.base, "is_loaded_in_8bit", False) or bool(expert_paths(forward.base))
    was_training = forward.model.training
    forward.model.eval()
    with torch.no_grad(), forward.autocast():
        batch = make_batch([second], packing, 0, forward.device)
        ours = forward.logits(forward.hidden(batch))
        theirs = forward.base(input_ids=batch.input_ids, use_cache=False).logits.float()
        difference = ((ours - theirs).norm() / theirs.norm()).item()
        if packing:
            one = forward.hidden(make_batch([first, second], True, 0, forward.device))[0, 8:]
            two = forward.hidden(make_batch([other, second], True, 0, forward.device))[0, 8:]
            joined = TokenizedExample(np.concatenate((first.input_ids, second.input_ids)), np.ones(16, dtype=bool))
            seen = forward.hidden(make_batch([joined], True, 0, forward.device))[0, 8:]
            leak = (one - two).norm(dim=-1).median()
            allowed = 0.5 * (one - seen).norm(dim=-1).median()  # half of what seeing the first document does
            isolated = bool(leak < allowed) if rounds else torch.equal(one, two)
    forward.model.train(was_training)
    if not difference < 0.02:
        raise ModelError(
            f"{type(forward.base).__name__} does something to its logits that tunesmith does not know (its own differ by "
            f"{difference:.1%}); this architecture is not supported yet"
        )
    if packing and not isolated:
        raise ModelError(
            f"{type(forward.base).__name__} lets packed documents see each other; set data.packing: false for this model"
        )


def check_fused(forward: ModelForward) -> None:
    """One forward of 24 tokens with fused layers and one with the model's own. Raises ModelError where they differ.

    It finds a layer whose code has changed under the same name: tens of per cent. Rounding alone is 3% in bf16 (30 layers of
    SmolLM2 over NF4; 0.01% in fp32). LoRA's B is drawn at random meanwhile, so that adapters count; windows longer than the
    tokens do not.
    """
    import numpy as np
    import torch

    engine = engine_of(forward.model)
    if engine is None:
        return
    vocabulary = forward.base.config.get_text_config().vocab_size
    ids = (7919 * np.arange(1, 25) % vocabulary).astype(np.int32)
    batch = make_batch([TokenizedExample(ids, np.ones(24, dtype=bool))], True, 0, forward.device)
    was_training = forward.model.training
    forward.model.eval()
    factors = [parameter for name, parameter in forward.model.named_parameters() if ".lora_B." in name]
    before = [factor.detach().clone() for factor in factors]
    generator = torch.Generator(forward.device).manual_seed(0)
    with torch.no_grad(), forward.autocast():
        for factor in factors:
            factor.normal_(0.0, 0.01, generator=generator)
        ours = forward.hidden(batch).float()
        with engine.bypassed():
            theirs = forward.hidden(batch).float()
        for factor, values in zip(factors, before, strict=True):
            factor.copy_(values)
    forward.model.train(was_training)
    difference = ((ours - theirs).norm() / theirs.norm()).item()
    if not difference < 0.1:
        raise ModelError(
            f"the fused layers of {type(forward.base).__name__} do not compute what the model's own do (they differ by "
            f"{difference:.1%}); set model.engine: reference, and report it"
        )
