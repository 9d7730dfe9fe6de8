"""Steps that run out of memory: repeated with less, at any stage, and the losses are those of a run with room."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tunesmith.errors import MachineError
from tunesmith.training import loop, objectives
from tunesmith.training.optimizers import Optimizer
from tunesmith.training.recovery import halve, is_out_of_memory
from tunesmith.types import TokenizedExample
from tunesmith.workflows.train import TrainingSession, restart

Session = Callable[..., TrainingSession]

SETTINGS = ["training.max_steps=5", "training.save_every=100", "optimizer.lr=1e-3", "training.micro_batch_size=4"]
ENGINES = {"reference": "model.engine=reference", "fused": "model.engine=fused"}


def events(run: TrainingSession, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.run.events() if event["event"] == kind]


def losses(run: TrainingSession) -> list[float]:
    return [event["loss"] for event in events(run, "step")]


def weights(run: TrainingSession) -> dict[str, torch.Tensor]:
    return load_file(run.run.adapter_path / "adapter_model.safetensors")


def fail_at(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: set[int], error: BaseException | None = None
) -> list[int]:
    """Make `owner.name` run out of memory at those of its calls; returns the numbers of the calls, as they come."""
    original, numbers, seen = getattr(owner, name), itertools.count(1), []

    def run_out(*arguments: Any, **options: Any) -> Any:
        seen.append(next(numbers))
        if seen[-1] in calls:
            raise error or torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity"
            )
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, run_out)
    return seen


STAGES: dict[str, tuple[Callable[[TrainingSession], tuple[Any, str]], set[int]]] = {
    "batch": (lambda run: (loop, "micro_batches"), {3}),
    "first forward": (lambda run: (run.forward, "hidden"), {5}),
    "second forward": (lambda run: (run.forward, "hidden"), {6}),
    "loss": (lambda run: (objectives, "cross_entropy_sum"), {6}),
    "first backward": (lambda run: (torch.Tensor, "backward"), {5}),
    "second backward": (lambda run: (torch.Tensor, "backward"), {6}),
    "collecting": (lambda run: (Optimizer, "collect"), {3}),
    "clipping": (lambda run: (torch.nn.utils, "clip_grad_norm_"), {3}),
    "the optimizer": (lambda run: (run.optimizer.inner, "step"), {3}),
}
"""Where the third step fails: two micro-batches a step, so its forwards are the fifth and the sixth."""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_is_repeated_whatever_part_of_it_runs_out_of_memory(
    session: Session, monkeypatch: pytest.MonkeyPatch, engine: str, stage: str
) -> None:
    options = [*SETTINGS, ENGINES[engine], "adapter.dropout=0.1"]
    plain = session(*options)
    plain.train()
    run = session(*options)
    place, calls = STAGES[stage]
    with monkeypatch.context() as patch:
        fail_at(patch, *place(run), calls)
        run.train()
    assert losses(run) == pytest.approx(losses(plain), rel=1e-6)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, weights(plain)[name], rtol=1e-4, atol=1e-6)
    (event,) = events(run, "out_of_memory")
    assert event["message"] == (
        "step 3 ran out of memory and is repeated; from now on micro-batches of half the size, 2 times as many as planned; "
        "the effective batch stays: CUDA out of memory. Tried to allocate 2.00 GiB"
    )
    for key in ("examples", "tokens", "supervised_tokens"):
        assert [e[key] for e in events(run, "step")] == [e[key] for e in events(plain, "step")]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_other_methods_and_packed_rows(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, packing: bool
) -> None:
    from tiny import make_tiny_model

    model = make_tiny_model(tmp_path / "model", hidden=64)
    options = [*SETTINGS, f"method={method}", f"data.packing={packing}"]
    plain, run = (session(*options, model=model) for _ in range(2))
    plain.train()
    with monkeypatch.context() as patch:
        fail_at(patch, run.forward, "hidden", {6})
        run.train()
    assert losses(run) == pytest.approx(losses(plain), rel=2e-6)


def test_halved_again_and_then_everything_is_computed_again(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = session(*SETTINGS)
    plain.train()
    run = session(*SETTINGS)
    sizes: list[int] = []
    hidden = run.forward.hidden

    def only_one(batch: Any) -> torch.Tensor:
        sizes.append(batch.num_examples)
        if batch.num_examples > 1 or not run.forward.model.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("no room")
        return hidden(batch)

    monkeypatch.setattr(run.forward, "hidden", only_one)
    run.train()
    assert sizes[:4] == [4, 2, 1, 1]
    assert set(sizes[4:]) == {1}
    assert len(sizes) == 3 + 5 * 8
    assert losses(run) == pytest.approx(losses(plain), rel=1e-6)
    assert [e["halvings"] for e in events(run, "out_of_memory")] == [1, 2, 2]
    assert events(run, "out_of_memory")[-1]["message"] == (
        "step 1 ran out of memory and is repeated; from now on everything that can be is computed again; the effective batch "
        "stays: no room"
    )


def test_when_nothing_is_left_the_run_ends_with_a_diagnosis(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(*SETTINGS, "training.save_every=1", "data.max_seq_length=256")
    fail_at(monkeypatch, run.forward, "hidden", set(range(3, 1000)))
    with pytest.raises(MachineError) as caught:
        run.train()
    text = str(caught.value).split("\n")
    longest = max(len(example) for example in run.data.train)
    assert text[0].startswith("step 2 ran out of memory with one example a micro-batch: CUDA out of memory. Tried to")
    assert "(weights" not in text[0], "a tiny model's parts are all below 0.01 GB, but for what comes with any"
    assert text[1] == "1. activations: all 2 layers compute them again already"
    assert text[2].startswith(
        "2. optimizer: the states of adamw take 0.0 GB; optimizer.name: paged_adamw_8bit takes a quarter"
    )
    assert text[3].startswith(f"3. sequence length: examples have up to {longest} tokens, 95% of them at most ")
    assert text[4] == "4. micro-batch: 4 examples, halved 2 times: one example already"
    assert text[5].startswith("5. model: method: qlora would need 0.1 GB at least")
    assert caught.value.exit_code == 3
    assert [step for step, _ in run.run.checkpoints()] == [1], "what was reached before is there to go on from"


def test_a_resumed_run_begins_with_what_was_given_up(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(*SETTINGS, "training.save_every=2")
    with monkeypatch.context() as patch:
        fail_at(patch, run.forward, "hidden", {1})

        def stop(event: dict[str, Any]) -> None:
            if event["event"] == "checkpoint":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.train(stop)
    again = restart(run.run.path)
    sizes: list[int] = []
    hidden = again.forward.hidden
    monkeypatch.setattr(again.forward, "hidden", lambda batch: (sizes.append(batch.num_examples), hidden(batch))[1])
    again.train()
    assert set(sizes) == {2}


def test_other_errors_are_not_caught(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(*SETTINGS)
    seen = fail_at(monkeypatch, run.forward, "hidden", {1}, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.train()
    assert seen == [1]


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")
    )
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_fp16_goes_on_with_the_same_scale(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler had unscaled the gradients of the step that failed; it must not refuse to do so again, nor change its scale."""
    runs = [session(*SETTINGS) for _ in range(2)]
    for run in runs:
        run.forward.dtype = "fp16"
    runs[0].train()
    with monkeypatch.context() as patch:
        fail_at(patch, torch.nn.utils, "clip_grad_norm_", {3})
        runs[1].train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-3)
    assert len(losses(runs[1])) == 5


# -- halves -----------------------------------------------------------------------------------------------------------


def example(length: int) -> TokenizedExample:
    return TokenizedExample(np.arange(length, dtype=np.int32), np.ones(length, dtype=bool))


@pytest.mark.parametrize(
    ("lengths", "packing", "expected"),
    [
        ([9], False, [[9]]),
        ([9, 8, 3], False, [[9, 8], [3]]),
        ([9, 8, 3, 2], False, [[9, 8], [3, 2]]),
        ([9, 8, 3, 2], True, [[9, 2], [8, 3]]),
        ([5, 90, 5, 5], True, [[90], [5, 5, 5]]),
    ],
)
def test_halves(lengths: list[int], packing: bool, expected: list[list[int]]) -> None:
    found = halve([example(length) for length in lengths], packing)
    assert [[len(part) for part in half] for half in found] == expected
