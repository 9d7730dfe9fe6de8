"""One of two processes that train a fused model together, and compare it with the reference engine in one process.

Started by test_fuse.py with RANK, WORLD_SIZE and MASTER_*; prints the name of each case that holds.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed
from models_of import family_model
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tunesmith.models.fuse import engine_of, fuse

IDS = torch.randint(0, 97, (4, 11), generator=torch.Generator().manual_seed(1))
WEIGHTS = torch.randn(97, generator=torch.Generator().manual_seed(2))


def make(kind: str) -> Any:
    model = family_model("qwen3")
    if kind == "full":
        return model.train()
    torch.manual_seed(5)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted.train()


def backward(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Whole gradients of the mean over rows, by name."""
    model.zero_grad()
    ((model(input_ids=ids).logits * WEIGHTS).sum() / len(ids)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name.removeprefix("module.")] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def check(way: str, kind: str, rank: int) -> None:
    reference, fused = make(kind), make(kind)
    fuse(fused, report=str)
    engine = engine_of(fused)
    assert engine is not None
    layers = list(engine.decoder.layers)
    if way == "ddp":
        model: Any = DistributedDataParallel(fused)
    else:
        for layer in layers:
            fully_shard(layer)
        model = fully_shard(fused)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (reference, model)]
    for step in range(3):
        expected = backward(reference, IDS)
        found = backward(model, IDS[2 * rank : 2 * rank + 2])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            error = (found[name] - value).norm() / value.norm()
            assert error < 1e-5, f"{way}-{kind}, step {step}, {name}: {error:.1e}"
        for optimizer in optimizers:
            optimizer.step()
    groups = [group for layer in layers for group in layer.groups]
    if way == "fsdp":
        assert all(group.stack is None for group in groups), "a stack would keep the whole weights in memory"
    assert all(len(group._states) == 1 for group in groups), "the same operands in every step"
    model.eval()
    with torch.no_grad():
        ours = model(input_ids=IDS, use_cache=False).logits
        theirs = reference.eval()(input_ids=IDS, use_cache=False).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    for way in ("ddp", "fsdp"):
        for kind in ("lora", "full"):
            check(way, kind, rank)
            print(f"{way}-{kind}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
