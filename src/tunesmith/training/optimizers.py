"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tunesmith.config import OptimizerConfig
from tunesmith.errors import MachineError
from tunesmith.models.fuse import Engine
from tunesmith.training.flat import FlatParameter, flatten
from tunesmith.training.rounding import RoundedWeights

Judge = Callable[[torch.Tensor], torch.Tensor]
"""Given the gradient norm, 1.0 on the device for a step that must not be taken, else 0.0."""


class Optimizer:
    """A PyTorch optimizer over the trainable parameters, which may be laid end to end first (training/flat.py), or be bf16 weights
    that are rounded stochastically (training/rounding.py).

    `inner` is the optimizer; GradScaler wants it. `parameters` are those whose gradients it reads.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        flats: Sequence[FlatParameter] = (),
        rounded: RoundedWeights | None = None,
    ):
        self.inner = inner
        self.flats = list(flats)
        self.rounded = rounded
        self.keeps_gradients = False
        self._unscaled = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self.inner.param_groups

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained. Rounded weights have stand-ins in the inner optimizer."""
        if self.rounded is not None:
            return self.rounded.weights
        return self._known

    @property
    def _known(self) -> list[torch.nn.Parameter]:
        """The inner optimizer's parameters."""
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def collect(self) -> None:
        """Move the gradients to where the optimizer reads them, adding to what is there."""
        for flat in self.flats:
            flat.collect()

    def connect(self, engine: Engine | None) -> None:
        """Let the fused layers of `engine`, if there are any, add their gradients where they are read."""
        if engine is not None and self.flats:
            engine.sinks = [flat.sink for flat in self.flats]
            self.keeps_gradients = True

    def unreached(self, model: torch.nn.Module) -> list[str]:
        """Names of the tensors of `model` that are laid end to end and never had a gradient, if any of them had one."""
        reached = {key for flat in self.flats for key in flat.reached}
        if not reached:  # no step was taken, as by a run that is resumed at its end
            return []
        laid = {id(tensor) for flat in self.flats for tensor in flat.tensors}
        return [name for name, tensor in model.named_parameters() if id(tensor) in laid - reached]

    def allocate(self) -> None:
        """Make the optimizer's states now, as its first step would: after that a step allocates next to nothing."""
        state = self.inner.state
        if isinstance(self.inner, torch.optim.AdamW):
            for parameter in self._known:
                if not state[parameter]:
                    state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    }
            return
        inner: Any = self.inner  # bitsandbytes'
        for group_index, group in enumerate(inner.param_groups):
            for index, parameter in enumerate(group["params"]):
                if not state[parameter]:
                    inner.init_state(group, parameter, group_index, index)

    @property
    def paged_bytes(self) -> int:
        """Bytes of states in managed memory, which PyTorch's allocator knows nothing of."""
        states = [value for state in self.inner.state.values() for value in state.values()]
        return sum(value.nbytes for value in states if getattr(value, "is_paged", False))

    def step(
        self,
        scaler: torch.amp.GradScaler,
        max_grad_norm: float,
        judge: Judge | None = None,
        rounding_seed: int | None = None,
    ) -> torch.Tensor:
        """The end of an optimizer step: unscale the gradients, clip their norm, update, and forget them.

        Returns the norm before clipping, a scalar on the device. The parameters and their states stay as they are if `judge`
        says 1 of the norm, and with a gradient that is not finite if `scaler` is enabled. `rounding_seed` must be another in
        every step: bf16 weights are rounded by it. Raises ValueError without it for these.
        """
        self.collect()
        if self.rounded is not None:
            if rounding_seed is None:
                raise ValueError("weights in bf16 are rounded at random: pass rounding_seed, another one in every step")
            return self._step_rounded(self.rounded, max_grad_norm, judge, rounding_seed)
        scaler.unscale_(self.inner)
        self._unscaled = scaler.is_enabled()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        self._update(scaler, None if judge is None else judge(grad_norm))
        self._unscaled = False
        self.zero_grad()
        return grad_norm

    def _step_rounded(
        self, rounded: RoundedWeights, max_grad_norm: float, judge: Judge | None, seed: int
    ) -> torch.Tensor:
        """`step` for bf16 weights, whose gradients need no scaler: the gradients are clipped in fp32, on their way to the optimizer."""
        self.allocate()
        work = rounded.workspace()
        grad_norm = rounded.gradient_norm()
        bad = None if judge is None else judge(grad_norm)
        scale = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        if bad is None or isinstance(self.inner, torch.optim.AdamW) or not bad.item():
            rounded.step(self.inner, work, seed, scale, bad)
        self.zero_grad()
        return grad_norm

    def _update(self, scaler: torch.amp.GradScaler, bad: torch.Tensor | None) -> None:
        """Step, unless `bad` is 1. PyTorch's fused AdamW is told on the device; for others the device is waited for."""
        if bad is not None and isinstance(self.inner, torch.optim.AdamW) and not scaler.is_enabled():
            inner: Any = self.inner
            inner.grad_scale, inner.found_inf = None, bad  # as GradScaler tells it
            try:
                inner.step()
            finally:
                del inner.grad_scale, inner.found_inf
            return
        if bad is None or not bad.item():
            scaler.step(self.inner)
        scaler.update()

    def abandon(self, scaler: torch.amp.GradScaler) -> None:
        """Forget a step that failed on its way: its gradients, and that they were unscaled."""
        self.forget()
        self.zero_grad()
        if self._unscaled:
            scaler.update(scaler.get_scale())  # the same scale; the scaler forgets what it saw
            self._unscaled = False

    def reset(self) -> None:
        """As if no gradient had ever come."""
        self.forget()
        self.zero_grad()
        for flat in self.flats:
            flat.reached.clear()

    def forget(self) -> None:
        """Drop gradients that have not been collected."""
        for flat in self.flats:
            for tensor in flat.tensors:
                tensor.grad = None

    def zero_grad(self) -> None:
        """Forget the gradients. Where fused layers or a graph write to them they stay in place, as zeros."""
        kept = {id(flat.value) for flat in self.flats} if self.keeps_gradients else set()
        weights = [] if self.rounded is None else self.rounded.weights
        for parameter in [*self.parameters, *weights]:
            if id(parameter) in kept and parameter.grad is not None:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the inner optimizer's state."""
        self.inner.load_state_dict(state)


def make_optimizer(model: torch.nn.Module, config: OptimizerConfig, lr: float) -> Optimizer:
    """AdamW over the trainable parameters: no weight decay on norms and biases (anything with fewer than two axes).

    A group's rate is `lr` times its `lr_ratio`, which is LoRA+'s for B matrices. The tensors of an adapter become views of
    one parameter for each group; modules that train in full beside them stay as they are, which saves a copy of their
    gradients. With `config.weights_dtype` bf16 the weights are stepped by training/rounding.py: moments are those of the
    optimizer's name, in fp32 (`adamw`, `paged_adamw_32bit`) or 8 bits. Raises MachineError when bitsandbytes is needed and
    missing.
    """
    alike: dict[tuple[float, float], dict[str, torch.nn.Parameter]] = {}
    whole: set[int] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            alike.setdefault(_settings_of(name, parameter, config), {})[name] = parameter
            if ".modules_to_save." in name:
                whole.add(id(parameter))
    by_settings = sorted(alike.items(), key=lambda item: (-item[0][0], item[0][1]))
    groups: list[dict[str, Any]] = [
        {"params": list(named.values()), "weight_decay": weight_decay, "lr_ratio": lr_ratio, "lr": lr * lr_ratio}
        for (weight_decay, lr_ratio), named in by_settings
    ]
    flats, rounded = [], None
    if config.weights_dtype == "bf16":
        rounded = RoundedWeights([named for _, named in by_settings])
        for number, group in enumerate(groups):
            group["params"] = rounded.stand_ins(number)
    elif hasattr(model, "peft_config"):
        for group in groups:
            small = [parameter for parameter in group["params"] if id(parameter) not in whole]
            if flat := flatten(small):
                flats.append(flat)
                group["params"] = [flat.value, *(other for other in group["params"] if id(other) in whole)]
    options: dict[str, Any] = {"lr": lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.name == "adamw":
        return Optimizer(torch.optim.AdamW(groups, fused=True, **options), flats, rounded)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            f"optimizer.name {config.name} needs bitsandbytes; install it with: pip install 'tunesmith[quantization]'"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # see models/load.py
    import bitsandbytes as bnb

    classes = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    return Optimizer(classes[config.name](groups, **options), flats, rounded)


def _settings_of(name: str, parameter: torch.nn.Parameter, config: OptimizerConfig) -> tuple[float, float]:
    """A parameter's weight decay, and its rate as a multiple of the usual one."""
    weight_decay = config.weight_decay if parameter.ndim >= 2 else 0.0
    return weight_decay, config.loraplus_lr_ratio if ".lora_B." in name else 1.0


def learning_rate(config: OptimizerConfig, peak: float, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0) of `total_steps`.

    Warm-up over the first W = ceil(warmup_ratio · total) steps: peak · (step + 1) / (W + 1). Then with progress
    p = (step - W) / (total - W): cosine peak · (1 + cos πp) / 2 (Loshchilov & Hutter 2017), linear peak · (1 - p), or
    constant.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return peak * (1 - progress)
    return peak
