"""Tasks of EleutherAI's lm-evaluation-harness, asked through its Python API of a model that is loaded already.

The harness makes the requests and scores what comes back; log-likelihoods and texts come from the `Subject`, so that tuned model and base
share their weights. Texts become token ids as the harness's own `HFLM` makes them: context and continuation are tokenized together, a
context's trailing spaces belong to its continuation, a prefix token stands before an empty context, what is too long is cut at its left,
and long texts are read in disjoint windows. On the same tasks the numbers are those of `lm_eval --model hf`
(tests/evaluation/test_harness.py).

What differs: answers are greedy without the generation config's penalties (a task that samples is refused); stop strings are cut off the
finished answer; errors by bootstrap are of 1,000 samples instead of 100,000, in this process. What was left out: images and sound, tasks
that run what the model wrote, log-likelihoods under encoder-decoder models.

Source: Gao et al., A framework for few-shot language model evaluation, https://github.com/EleutherAI/lm-evaluation-harness, 0.4.13.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.evaluation.harness_model import language_model
from tunesmith.evaluation.harness_tasks import LoadedTasks, load_tasks, quiet, require_harness, seeded
from tunesmith.evaluation.parts import PartResult
from tunesmith.evaluation.statistics import (
    SAMPLES,
    Difference,
    Measured,
    compare,
    compare_statistic,
    statistic,
)
from tunesmith.files import sha256_text

if TYPE_CHECKING:
    from tunesmith.data.chat import ChatFormat
    from tunesmith.evaluation.subject import Subject

FEWSHOT_SEED = 1234
"""Draws the examples in the prompt: the harness's default."""

SLOW_METRICS = ("bleu", "chrf", "chrf++", "ter")
"""Corpus scores that take long: 100 bootstrap samples, as in the harness."""


SHARES = ("f1",)
"""Statistics of all rows that are fractions of 1. Perplexities and corpus scores are not, nor is a correlation, which may be negative."""


@dataclass
class HarnessPart:
    """Tasks, groups and tags of the harness, by name.

    `include_path` is a folder of task files (YAML), which are looked at before the harness's catalogue; `limit` asks the first rows of
    each task only; `num_fewshot` is the number of solved examples in each prompt, where a task does not fix it (None: each task's own);
    `apply_chat_template` asks in turns of the model's chat template.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    name: str = field(default="harness", init=False)
    _loaded: LoadedTasks | None = field(default=None, init=False, repr=False)

    def check(self, chat: ChatFormat) -> None:
        """Load the tasks and their data sets.

        Raises ConfigError, DataError or MachineError with a line for each task that cannot be asked, and MachineError without lm-eval.
        """
        self._load()

    def ask(self, subject: Subject) -> Asked:
        """The tasks' metrics for one model. Raises DataError for a request that the model cannot read."""
        loaded = self._load()
        from lm_eval import evaluate

        # Not `simple_evaluate`: it also seeds three generators for good, and runs git, pip and nvidia-smi (two seconds a call).
        with quiet() as aloud, seeded():
            for task in loaded.tasks.values():
                task.set_fewshot_seed(FEWSHOT_SEED)
            results = evaluate(
                lm=language_model(subject, aloud),
                task_dict={"tasks": loaded.tasks, "groups": loaded.groups},
                limit=self.limit,
                bootstrap_iters=SAMPLES,
                apply_chat_template=self.apply_chat_template,
                fewshot_as_multiturn=self.apply_chat_template,
            )
        return Asked(_scores(results, loaded), _facts(results))

    def score(self, tuned: Asked, base: Asked | None) -> PartResult:
        """Metrics named `task.metric`, or `task.metric.filter` for another filter than `none`, with the harness's standard errors.

        `differences` holds what is not a mean over the same rows: a statistic of all rows (perplexity, F1) is compared by
        random swaps of the rows with the harness's own aggregation, and what the two models have different rows of as two separate measurements.
        """
        differences = {}
        if base is not None:
            with quiet():
                for name in tuned.scores.keys() & base.scores.keys():
                    difference = _difference(tuned.scores[name], base.scores[name])
                    if difference is not None:
                        differences[name] = difference
        details = {
            "tasks": list(self.tasks),
            "include_path": None if self.include_path is None else str(self.include_path),
            "limit": self.limit,
            "apply_chat_template": self.apply_chat_template,
            "fewshot_seed": FEWSHOT_SEED,
            **tuned.facts,
        }
        return PartResult(tuned.measured(), base.measured() if base is not None else None, differences, details)

    def _load(self) -> LoadedTasks:
        if self._loaded is None:
            require_harness()
            with quiet(), seeded():
                self._loaded = load_tasks(self.tasks, self.include_path, self.limit, self.num_fewshot)
        return self._loaded


@dataclass(frozen=True)
class Asked:
    """What the tasks say about one model: metrics by name, and what is needed to repeat them."""

    scores: dict[str, Score]
    facts: dict[str, Any]

    def measured(self) -> dict[str, Measured]:
        """The metrics without what only a comparison needs."""
        return {name: score.measured for name, score in self.scores.items()}


@dataclass(frozen=True)
class Score:
    """One metric of one task or group: its rows by their numbers in the data set (None for a group without pairs to compare), and what
    makes one number of them (None: their mean)."""

    measured: Measured
    rows: Mapping[tuple[str, int], Any] | None = None
    aggregation: Callable[[list[Any]], float] | None = None
    samples: int = SAMPLES


def _facts(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is needed to repeat the tasks: versions, rows, examples in the prompt, hashes. `task_hashes` are `lm_eval`'s own, of rows,
    prompts and targets."""
    import lm_eval

    def config_hash(config: Mapping[str, Any]) -> str:
        metadata = {key: value for key, value in (config.get("metadata") or {}).items() if key != "config_source"}
        return sha256_text([json.dumps({**config, "metadata": metadata}, sort_keys=True, default=str)])

    def task_hash(rows: Sequence[Mapping[str, str]]) -> str:
        from lm_eval.utils import hash_string

        return str(hash_string("".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows)))

    return {
        "lm_eval": lm_eval.__version__,
        "versions": results["versions"],
        "n-samples": results["n-samples"],
        "num_fewshot": results["n-shot"],
        "config_sha256": {name: config_hash(config) for name, config in results["configs"].items()},
        "task_hashes": {name: task_hash(rows) for name, rows in results["samples"].items()},
    }


def _scores(results: Mapping[str, Any], loaded: LoadedTasks) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    for task, entries in sorted(results["results"].items(), key=lambda item: item[0] in loaded.groups):  # groups last
        for key, value in entries.items():
            metric, comma, filtered = key.rpartition(",")
            of_another = metric.endswith("_stderr") and f"{metric.removesuffix('_stderr')},{filtered}" in entries
            if not comma or of_another or not isinstance(value, Real):
                continue
            stderr = entries.get(f"{metric}_stderr,{filtered}")
            error = float(stderr) if isinstance(stderr, Real) and not math.isnan(stderr) else None
            higher = results["higher_is_better"].get(task, {}).get(metric) is not False
            if task in loaded.groups:
                members = [_name(member.task_name, metric, filtered) for member in loaded.groups[task].get_all_tasks()]
                n = entries.get("sample_count", {}).get(key, entries["sample_len"])
                measured = Measured(float(value), error, n, None, higher)
                score = _group_score(measured, [scores[name] for name in members if name in scores])
            else:
                rows = {
                    (task, int(row["doc_id"])): row[metric]
                    for row in results["samples"][task]
                    if row["filter"] == filtered and metric in row["metrics"]
                }
                measured = Measured(float(value), error, len(rows), None, higher)
                score = _task_score(measured, metric, rows, loaded.tasks[task].aggregation().get(metric))
            scores[_name(task, metric, filtered)] = score
    return scores


def _name(task: str, metric: str, filtered: str) -> str:
    return f"{task}.{metric}" if filtered == "none" else f"{task}.{metric}.{filtered}"


def _task_score(
    measured: Measured,
    metric: str,
    rows: Mapping[tuple[str, int], Any],
    aggregation: Callable[[list[Any]], float] | None,
) -> Score:
    from lm_eval.api.metrics import mean

    if aggregation in (mean, None):  # without one the harness takes the mean
        values = tuple(float(row) for row in rows.values())
        return Score(replace(measured, rows=values, share=all(0 <= value <= 1 for value in values)), rows)
    samples = 100 if metric in SLOW_METRICS else SAMPLES
    if measured.stderr is None and rows:  # the harness has none for perplexities of words and bytes
        error = statistic(aggregation, list(rows.values()), measured.higher_is_better, samples).stderr
        measured = replace(measured, stderr=error)
    return Score(replace(measured, share=metric in SHARES), rows, aggregation, samples)


def _group_score(measured: Measured, parts: Sequence[Score]) -> Score:
    """With the rows of all its tasks where the group's value is their mean: then it can be compared row by row."""
    measured = replace(measured, share=all(part.measured.share for part in parts))
    if any(part.measured.rows is None for part in parts):
        return Score(measured)
    rows = {key: float(value) for part in parts for key, value in (part.rows or {}).items()}
    if len(rows) != measured.n or not math.isclose(math.fsum(rows.values()) / len(rows), measured.value, abs_tol=1e-12):
        return Score(measured)
    return Score(replace(measured, rows=tuple(rows.values())), rows)


def _difference(tuned: Score, base: Score) -> Difference | None:
    """None: `compare` is right."""
    after, before = tuned.measured, base.measured
    same_rows = tuned.rows is not None and base.rows is not None and tuned.rows.keys() == base.rows.keys()
    if not same_rows and (after.n != before.n or tuned.rows is not None or base.rows is not None):
        # A metric that leaves rows out, of which the models lack different ones: two measurements, each with its own error.
        return compare(replace(after, rows=None), replace(before, rows=None, n=after.n))
    if tuned.aggregation is None or base.aggregation is None:
        return None
    assert tuned.rows is not None
    assert base.rows is not None
    after_rows, before_rows = list(tuned.rows.values()), list(base.rows.values())
    return compare_statistic(tuned.aggregation, after_rows, before_rows, after.higher_is_better, tuned.samples)
