"""Steps that run out of memory: repeated with less, at any stage, and the losses are those of a run with room."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from out_of_memory import ALWAYS, REASON, fail_at
from tunesmith.config import load_config
from tunesmith.errors import MachineError
from tunesmith.models import generate
from tunesmith.out_of_memory import Halving
from tunesmith.training import loop, objectives, passes
from tunesmith.training.objectives import Objective
from tunesmith.training.optimizers import Optimizer
from tunesmith.training.recovery import halve
from tunesmith.types import Term, TokenizedExample
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


def test_no_room_for_the_optimizers_states_ends_with_a_diagnosis(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session(*SETTINGS)
    fail_at(monkeypatch, Optimizer, "allocate", ALWAYS)
    with pytest.raises(MachineError, match=f"^the optimizer's states found no memory: {REASON}") as caught:
        run.train()
    assert caught.value.exit_code == 3
    assert "\n2. optimizer: the states of adamw take 0.0 GB; optimizer.name: paged_adamw_8bit" in str(caught.value)


def test_when_nothing_is_left_the_run_ends_with_a_diagnosis(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session(*SETTINGS, "training.save_every=1", "data.max_seq_length=256")
    fail_at(monkeypatch, run.forward, "hidden", ALWAYS[2:])
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


# -- evaluation -------------------------------------------------------------------------------------------------------

PLACES: dict[str, Callable[[TrainingSession], tuple[Any, str]]] = {
    "batch": lambda run: (passes, "make_batch"),
    "forward": lambda run: (run.forward, "hidden"),
    "loss": lambda run: (objectives, "cross_entropy_sum"),
}


def seen_sizes(run: TrainingSession, monkeypatch: pytest.MonkeyPatch, limit: int = 1000) -> list[int]:
    """The examples of each micro-batch that is evaluated, as they come; those of more than `limit` run out of memory."""
    sizes: list[int] = []
    hidden = run.forward.hidden

    def only(batch: Any) -> torch.Tensor:
        if not run.forward.model.training:
            sizes.append(batch.num_examples)
            if batch.num_examples > limit:
                raise torch.OutOfMemoryError(f"{REASON}. GPU 0 has a total capacity")
        return hidden(batch)

    monkeypatch.setattr(run.forward, "hidden", only)
    return sizes


def evaluation_loss(run: TrainingSession, packing: bool, halving: Halving | None = None) -> float:
    """The loss of the eight held-out rows, in micro-batches of four."""
    config = load_config(None, ["training.micro_batch_size=4", f"data.packing={packing}"])
    return loop.evaluate_loss(run.forward, run.objective, run.data.eval, config, 0, halving)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("calls", "sizes"),
    [
        ({1}, [4, 2, 2, 2, 2]),
        ({2}, [4, 4, 2, 2]),
        ({1, 2}, [4, 2, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({1, 3}, [4, 2, 2, 1, 1, 1, 1, 1, 1]),
        ({2, 4}, [4, 4, 2, 2, 1, 1]),
    ],
)
def test_an_evaluation_that_runs_out_of_memory_has_the_same_loss(
    session: Session, monkeypatch: pytest.MonkeyPatch, place: str, packing: bool, calls: set[int], sizes: list[int]
) -> None:
    run = session("data.eval_path=HELD")
    plain = evaluation_loss(run, packing)
    tried: list[int] = []
    make = passes.make_batch
    monkeypatch.setattr(passes, "make_batch", lambda part, *rest: (tried.append(len(part)), make(part, *rest))[1])
    fail_at(monkeypatch, *PLACES[place](run), calls)
    assert evaluation_loss(run, packing) == pytest.approx(plain, rel=1e-6)
    assert tried == ([size for call, size in enumerate(sizes, 1) if call not in calls] if place == "batch" else sizes)


@pytest.mark.parametrize("packing", [False, True])
def test_evaluations_begin_with_what_fitted_before(
    session: Session, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    options = [*SETTINGS, "data.eval_path=HELD", "training.eval_every=2", f"data.packing={packing}"]
    plain, run = session(*options), session(*options)
    plain.train()
    sizes = seen_sizes(run, monkeypatch, limit=2)
    run.train()
    assert sizes == [4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    (warning,) = [e for e in events(run, "warning") if "ran out of memory" in e["message"]]
    assert (warning["step"], warning["message"]) == (
        2,
        f"evaluating 4 examples at once ran out of memory and is done again; from now on half as many: {REASON}",
    )
    assert losses(run) == losses(plain), "training is not divided for it"
    found, expected = ([e["metrics"]["eval_loss"] for e in events(each, "eval")] for each in (run, plain))
    assert len(found) == 3
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_an_example_that_cannot_be_evaluated_alone(
    session: Session, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    run = session("data.eval_path=HELD")
    run.forward.model.train()
    warnings: list[str] = []
    seen_sizes(run, monkeypatch, limit=0)
    with pytest.raises(MachineError) as caught:
        evaluation_loss(run, packing, Halving(warnings.append))
    example = max(run.data.eval, key=len)
    assert str(caught.value) == (
        f"evaluation ran out of memory with one example of {len(example)} tokens ({example.where}): {REASON}; leave rows that "
        "long out of the evaluation data, or set data.max_seq_length (now 2048) below that, with data.overlong: truncate"
    )
    assert caught.value.exit_code == 3
    assert [text[:13] for text in warnings] == ["evaluating 4 ", "evaluating 2 "]
    assert run.forward.model.training


def test_no_term_of_a_micro_batch_counts_before_all_of_it_succeeded(session: Session) -> None:
    run = session("data.eval_path=HELD")
    failures = [torch.OutOfMemoryError(REASON)]

    class TwoTerms(Objective):
        def counts(self, examples: Iterable[TokenizedExample]) -> dict[str, int]:
            return {"rows": len(list(examples)), "more": 1}

        def terms(self, forward: Any, batch: Any) -> list[Term]:
            terms = [Term("rows", torch.tensor(float(batch.num_examples)), 1)]
            if failures:
                raise failures.pop()
            return [*terms, Term("more", torch.tensor(0.5 * batch.num_examples), 1, weight=2.0)]

    run.objective = TwoTerms()
    assert evaluation_loss(run, packing=False) == 1 + 8


def test_other_errors_of_an_evaluation_are_not_caught(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    run = session("data.eval_path=HELD")
    seen = fail_at(monkeypatch, run.forward, "hidden", {2}, RuntimeError("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        evaluation_loss(run, packing=False)
    assert seen == [1, 2]


def test_graphs_give_way_to_an_evaluation(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that does not fit alone is evaluated once training has let go of its CUDA graphs, which come back after it."""
    options = [*SETTINGS, "data.eval_path=HELD", "training.eval_every=2"]
    plain, run = session(*options), session(*options)
    plain.train()

    class Graphs:
        captured, pay, calls = True, False, 0

        def drop(self) -> bool:
            held, self.captured = self.captured, False
            Graphs.calls += held
            return held

        def give_up(self) -> None:
            raise AssertionError("training goes on with graphs")

    graphs = Graphs()
    monkeypatch.setattr(loop, "micro_batch_graphs", lambda *_: graphs)
    hidden = run.forward.hidden

    def full(batch: Any) -> torch.Tensor:
        if run.forward.model.training:
            graphs.captured = True
        elif graphs.captured:
            raise torch.OutOfMemoryError(REASON)
        return hidden(batch)

    monkeypatch.setattr(run.forward, "hidden", full)
    run.train()
    texts = [e["message"] for e in events(run, "warning") if "ran out of memory" in e["message"]]
    assert texts[-1] == "evaluation ran out of memory; CUDA graphs held some of it: they are dropped for it from now on"
    assert len(texts) == 3, "first by halves, 4 and 2"
    assert Graphs.calls == 3, "once in each evaluation"
    found, expected = ([e["metrics"]["eval_loss"] for e in events(each, "eval")] for each in (run, plain))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("running", [True, False])
def test_a_step_is_repeated_without_graphs_before_it_is_halved(
    session: Session, monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    """Also where the first capture ran out, so that there is no graph yet; not while none is captured."""
    run = session(*SETTINGS)

    class Graphs:
        pay, given_up = False, 0

        def give_up(self) -> None:
            self.running = False
            Graphs.given_up += 1

    graphs = Graphs()
    graphs.running = running  # type: ignore[attr-defined]
    monkeypatch.setattr(loop, "micro_batch_graphs", lambda *_: graphs)
    fail_at(monkeypatch, run.forward, "hidden", {5})
    run.train()
    (event,) = events(run, "out_of_memory")
    what = "without CUDA graphs" if running else "micro-batches of half the size, 2 times as many as planned"
    assert f"; from now on {what}; " in event["message"]
    assert (event["halvings"], Graphs.given_up) == (0 if running else 1, 1)


def test_answers_during_training_that_run_out_of_memory(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        *SETTINGS, "data.eval_path=HELD", "training.eval_every=3", "evaluation.generate=true",
        "evaluation.max_new_tokens=3", "evaluation.batch_size=4",
    ]  # fmt: skip
    plain, run = session(*options), session(*options)
    plain.train()
    sizes: list[int] = []
    answer = generate._generate_batch

    def only_two(forward: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError(REASON)
        return answer(forward, prompts, *rest)

    monkeypatch.setattr(generate, "_generate_batch", only_two)
    run.train()
    assert sizes == [4, 2, 2, 2, 2, 2, 2, 2, 2], "two evaluations"
    (warning,) = [e for e in events(run, "warning") if "ran out of memory" in e["message"]]
    assert (warning["step"], warning["message"]) == (
        3,
        f"answering 4 prompts at once ran out of memory and is done again; from now on half as many: {REASON}",
    )
    assert [e["metrics"] for e in events(run, "eval")] == [e["metrics"] for e in events(plain, "eval")]


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
