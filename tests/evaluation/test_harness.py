"""Tasks of lm-evaluation-harness: the numbers of its own HFLM on the same model, names, comparisons, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiny import BOS, IM_END, make_tiny_model, make_tokenizer, write_jsonl
from tunesmith.config import EvaluationConfig
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, DataError, MachineError
from tunesmith.evaluation.harness import Asked, HarnessPart, Score
from tunesmith.evaluation.statistics import Measured, compare, compare_statistic, statistic
from tunesmith.evaluation.subject import Subject
from tunesmith.models.forward import ModelForward

pytest.importorskip("lm_eval")

EXAMPLES = Path(__file__).parents[2] / "examples" / "tasks"
WORDS = [
    "where",
    "does",
    "the",
    "old",
    "jar",
    "go",
    "when",
    "it",
    "is",
    "broken",
    "and",
    "newspapers",
    "paper",
    "glass",
    "metal",
]
MERGES = [("Ġ", "p"), ("Ġ", "g"), ("a", "r"), ("Ġ", "a")]  # a space belongs to what follows it
MAX_LENGTH = 96
ROWS = 12

BASE = """
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
metadata: {version: 3}
"""
TASKS = {
    # The context ends with a space, which belongs to the continuation; long contexts are cut.
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer: "
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    # No context at all: the prefix token stands for it.
    "bare": """
tag: short
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "cloze": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{next}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    # The answer is begun already.
    "begun": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
gen_prefix: "It goes into"
metric_list: [{metric: acc_norm}]
""",
    "text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "answer": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{said}}"
generation_kwargs: {until: ["?!"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
filter_list:
  - {name: none, filter: [{function: take_first}]}
  - {name: short, filter: [{function: regex, regex_pattern: "^(.{3})"}, {function: take_first}]}
""",
}
GROUPS = """
group: all_choices
task: [choice, bare]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1}
"""


@dataclass
class RowByRow:
    """A subject that runs a transformers model on one row at a time, in the plainest way."""

    model: Any
    tokenizer: Any
    name: str = "tuned"

    def __post_init__(self) -> None:
        self.forward = SimpleNamespace(base=self.model)
        self.chat = ChatFormat(self.tokenizer)
        self.stages: list[str] = []

    def say(self, stage: str) -> None:
        self.stages.append(stage)
        print("progress:", stage, file=sys.stderr)

    def log_likelihoods(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]], stage: str) -> list[Any]:
        import torch

        self.say(stage)
        found = []
        for context, continuation in requests:
            ids = torch.tensor([[*context, *continuation]])
            with torch.no_grad():
                logits = self.model(ids[:, :-1]).logits[0, len(context) - 1 :].log_softmax(-1)
            picked = logits.gather(-1, ids[0, len(context) :, None])
            greedy = bool((logits.argmax(-1) == ids[0, len(context) :]).all())
            found.append(SimpleNamespace(total=float(picked.sum()), tokens=len(continuation), greedy=greedy))
        return found

    def generate(self, prompts: Sequence[Sequence[int]], stage: str, max_new_tokens: int | None = None) -> list[str]:
        import torch

        self.say(stage)
        answers = []
        assert max_new_tokens is not None
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + max_new_tokens:
                with torch.no_grad():
                    ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] == self.tokenizer.eos_token_id:
                    break
            answers.append(self.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
        return answers


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module", params=["plain", "bos"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RowByRow:
    return make_subject(tmp_path_factory.mktemp("model"), request.param == "bos")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RowByRow:
    return make_subject(tmp_path_factory.mktemp("model"), False)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> RowByRow:
    """A base that differs from `plain` in its weights."""
    return make_subject(tmp_path_factory.mktemp("other"), False, seed=1, name="base")


def make_subject(folder: Path, adds_bos: bool, seed: int = 0, name: str = "tuned") -> RowByRow:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = make_tokenizer(merges=MERGES, adds_bos=adds_bos)
    make_tiny_model(folder, seed=seed, tokenizer=tokenizer, max_position_embeddings=MAX_LENGTH)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    readable = [number for number in range(len(tokenizer)) if tokenizer.decode([number]).strip().isalnum()]
    with torch.no_grad():  # half a character is no text that stop strings could be looked for in
        unreadable = [number for number in range(320) if number not in (*readable, tokenizer.eos_token_id)]
        model.lm_head.weight[unreadable] = 0
    return RowByRow(model, AutoTokenizer.from_pretrained(folder), name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, plain: RowByRow) -> Path:
    """Task files and their rows: some longer than the model reads, half of the expected answers what the plain model says."""
    return write_tasks(tmp_path_factory.mktemp("tasks"), plain)


def write_tasks(folder: Path, subject: RowByRow) -> Path:
    generator = random.Random(0)
    rows = []
    for number in range(ROWS):
        words = generator.choices(WORDS, k=40 if number % 4 == 0 else 6)
        question = " ".join(words)
        choices = [" ".join(generator.choices(WORDS, k=k)) for k in (1, 2, 4)]
        prompt = subject.tokenizer.encode(question)[-(MAX_LENGTH - 12) :]
        (said,) = subject.generate([prompt], "", 12)
        rows.append(
            {
                "question": question,
                "choices": choices,
                "answer": number % 3,
                "next": subject.tokenizer.decode(subject.tokenizer.encode(said)[:1]) if number % 2 else "paper",
                "said": said if number % 2 else "paper",
                "text": " ".join(generator.choices(WORDS, k=10 + 8 * number)),
            }
        )
    write_jsonl(folder / "rows.jsonl", rows)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{BASE}{text}", encoding="utf-8")
    (folder / "groups.yaml").write_text(GROUPS, encoding="utf-8")
    return folder


def by_hflm(subject: RowByRow, names: list[str], folder: Path, shots: int | None, chat: bool) -> dict[str, Any]:
    """The harness's own results, by its own model class."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISABLE_MULTIPROC", "1")
        return simple_evaluate(
            model=HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1),
            tasks=names,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            num_fewshot=shots,
            bootstrap_iters=1000,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )


def row_values(results: dict[str, Any], name: str) -> list[Any]:
    task, metric, *filtered = name.split(".")
    wanted = filtered[0] if filtered else "none"
    return [row[metric] for row in results["samples"][task] if row["filter"] == wanted]


@pytest.mark.parametrize("variant", ["zero-shot", "few-shot", "chat"])
def test_numbers_are_those_of_the_harness(subject: RowByRow, folder: Path, variant: str) -> None:
    chat = variant == "chat"
    shots = {"zero-shot": None, "few-shot": 1, "chat": 2}[variant]
    names = ["all_choices", "cloze", "answer", "begun", *(["text"] if variant == "zero-shot" else [])]
    part = HarnessPart(names, folder, num_fewshot=shots, apply_chat_template=chat)
    asked = part.ask(subject)
    expected = by_hflm(subject, names, folder, shots, chat)
    assert sorted(asked.scores) == sorted(
        [
            "choice.acc",
            "choice.acc_norm",
            "bare.acc",
            "all_choices.acc",
            "cloze.perplexity",
            "cloze.acc",
            "begun.acc_norm",
        ]
        + ["answer.exact_match", "answer.exact_match.short"]
        + (["text.word_perplexity", "text.byte_perplexity", "text.bits_per_byte"] if "text" in names else [])
    )
    for name, score in asked.scores.items():
        task, metric, *filtered = name.split(".")
        wanted = filtered[0] if filtered else "none"
        value, error = (expected["results"][task][f"{key},{wanted}"] for key in (metric, f"{metric}_stderr"))
        assert score.measured.value == pytest.approx(value, rel=1e-5), name
        if error == "N/A":  # of perplexities of words and bytes the harness has none
            assert score.aggregation is not None
            assert score.rows is not None
            resampled = statistic(score.aggregation, list(score.rows.values()))
            assert score.measured.stderr == resampled.stderr, name
            assert score.measured.stderr, name
        else:
            assert score.measured.stderr == pytest.approx(error, rel=1e-4), name
        assert score.measured.share == ("perplexity" not in metric and metric != "bits_per_byte"), name
        if task == "all_choices":
            continue
        assert score.rows is not None
        for ours, theirs in zip(score.rows.values(), row_values(expected, name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
    assert asked.facts["num_fewshot"]["choice"] == expected["n-shot"]["choice"]
    if not chat and subject.tokenizer.bos_token is None and shots is None:
        # The rows are not all alike: an encoding that is wrong would show.
        assert asked.scores["answer.exact_match"].measured.value == 0.5
        assert 0 < asked.scores["choice.acc"].measured.value < 1
        assert 0 < asked.scores["cloze.acc"].measured.value < 1


@pytest.mark.parametrize("context", ["where does the", "where ", "", f"{BOS}where", IM_END + "go", "old jar " * 30])
def test_each_request_is_encoded_as_the_harness_does(subject: RowByRow, context: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from tunesmith.evaluation.harness_model import language_model
    from tunesmith.evaluation.harness_tasks import quiet

    def ask(kind: Any, *arguments: Any) -> Instance:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", 0, 1))

    theirs = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=1)
    pairs = [ask("loglikelihood", context, text) for text in (" paper", "g", " a jar")]
    with quiet() as aloud:
        ours = language_model(subject, aloud)
        for (total, greedy), (their_total, their_greedy) in zip(
            ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True
        ):
            assert total == pytest.approx(their_total, rel=1e-5)
            assert greedy == their_greedy
        if context:
            (whole,) = theirs.generate_until([ask("generate_until", context, {"until": [], "max_gen_toks": 9})])
            stopped = [
                ask("generate_until", context, {"until": [stop, "?!"], "max_gen_toks": 9}) for stop in whole[3:7:2]
            ]
            answers = ours.generate_until(stopped)
            assert answers == theirs.generate_until(stopped)
            assert max(map(len, answers)) < len(whole)
            texts = [ask("loglikelihood_rolling", context)]
            assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    assert ours.max_length == theirs.max_length == MAX_LENGTH


def test_tuned_and_base_share_their_weights(plain: RowByRow, folder: Path) -> None:
    """The subjects of an evaluation, in batches: a LoRA adapter that is on, then off, over one copy of the weights."""
    import torch
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(plain.model), adapter).eval()
    forward, settings = ModelForward(adapted, "cpu", "fp32"), EvaluationConfig(batch_size=5)
    names = ["all_choices", "cloze", "text", "answer"]
    part = HarnessPart(names, folder)
    asked = []
    for name in ("tuned", "base"):
        subject = Subject(name, forward, plain.tokenizer, plain.chat, settings, base_below=name == "base")
        asked.append(part.ask(subject))
    merged = copy.deepcopy(adapted).merge_and_unload()
    for found, model in zip(asked, (merged, plain.model), strict=True):
        expected = by_hflm(RowByRow(model, plain.tokenizer), names, folder, None, False)
        for name, score in found.scores.items():
            task, metric, *filtered = name.split(".")
            value = expected["results"][task][f"{metric},{filtered[0] if filtered else 'none'}"]
            assert score.measured.value == pytest.approx(value, rel=1e-4), name
    result = part.score(*asked)
    assert result.comparison().keys() == result.metrics.keys()
    for name, difference in result.comparison().items():
        assert difference.value == pytest.approx(result.metrics[name].value - result.baseline[name].value), name
    assert result.comparison()["answer.exact_match"].verdict == "worse", (
        "half of the expected answers are the base's own"
    )


def test_a_chat_is_in_the_runs_own_template(plain: RowByRow) -> None:
    from lm_eval.models.huggingface import HFLM

    from tunesmith.evaluation.harness_model import language_model

    def render(template: str, turns: list[dict[str, str]], **settings: Any) -> str:
        subject = RowByRow(plain.model, plain.tokenizer)
        subject.chat = ChatFormat(plain.tokenizer, template) if template == "alpaca" else plain.chat
        return str(language_model(subject, contextlib.nullcontext).apply_chat_template(turns, **settings))

    turns = [{"role": "user", "content": "Which bin?"}]
    assert "### Instruction:\nWhich bin?" in render("alpaca", turns)
    theirs = HFLM(pretrained=plain.model, tokenizer=plain.tokenizer, batch_size=1)
    begun = [*turns, {"role": "assistant", "content": "The bin is"}]
    assert render("auto", begun, add_generation_prompt=False) == theirs.apply_chat_template(begun, False)
    assert render("auto", begun, add_generation_prompt=False).endswith("The bin is")


def test_a_template_without_a_system_role_is_asked_without_one(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from tunesmith.evaluation.harness_model import language_model

    subject = make_subject(tmp_path, False)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    subject.tokenizer.chat_template = refusing + subject.tokenizer.chat_template
    subject.chat = ChatFormat(subject.tokenizer)
    turns = [{"role": "system", "content": "Sort."}, {"role": "user", "content": "Which bin?"}]
    ours = language_model(subject, contextlib.nullcontext).apply_chat_template(turns)
    assert ours == HFLM(pretrained=subject.model, tokenizer=subject.tokenizer).apply_chat_template(turns)
    assert ours == "<|im_start|>user\nWhich bin?<|im_end|>\n<|im_start|>assistant\n"


def test_a_tag_asks_each_of_its_tasks(plain: RowByRow, folder: Path) -> None:
    assert HarnessPart(["short"], folder).ask(plain).scores.keys() == {"bare.acc"}


def test_tuned_and_base_are_compared_row_by_row(plain: RowByRow, other: RowByRow, folder: Path) -> None:
    part = HarnessPart(["all_choices", "text", "answer"], folder)
    part.check(plain.chat)
    tuned, base = part.ask(plain), part.ask(other)
    assert {stage.removesuffix(" of the base model") for stage in other.stages[-3:]} == {
        "task choices",
        "task texts",
        "task answers",
    }
    result = part.score(tuned, base)
    assert result.baseline is not None
    assert result.baseline.keys() == result.metrics.keys()

    accuracy = result.metrics["choice.acc"]
    assert accuracy.rows is not None
    assert accuracy.n == ROWS
    assert accuracy.value == pytest.approx(sum(accuracy.rows) / ROWS)
    # The harness's error of a mean is s / sqrt(n), with n - 1 in s.
    assert accuracy.stderr == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / (ROWS - 1)))
    assert compare(accuracy, result.baseline["choice.acc"]).test == "McNemar"

    group = result.metrics["all_choices.acc"]
    assert group.n == 2 * ROWS
    assert group.value == pytest.approx((accuracy.value + result.metrics["bare.acc"].value) / 2)
    assert compare(group, result.baseline["all_choices.acc"]).test == "McNemar"

    words = result.metrics["text.word_perplexity"]
    assert (words.higher_is_better, accuracy.higher_is_better) == (False, True)
    assert words.rows is None
    assert result.differences.keys() == {
        "text.word_perplexity",
        "text.byte_perplexity",
        "text.bits_per_byte",
    }
    difference = result.differences["text.word_perplexity"]
    assert difference.test == "randomization"
    assert difference.value == pytest.approx(words.value - result.baseline["text.word_perplexity"].value)

    def perplexity(pairs: list[tuple[float, int]]) -> float:
        return math.exp(-sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs))

    name = "text.word_perplexity"
    rows = [list((asked.scores[name].rows or {}).values()) for asked in (tuned, base)]
    by_hand = compare_statistic(perplexity, *rows, higher_is_better=False)
    assert difference.p == by_hand.p
    assert difference.stderr == pytest.approx(by_hand.stderr)

    details = json.loads(json.dumps(result.details))
    assert details["versions"]["choice"] == 3
    assert details["n-samples"]["choice"] == {"original": ROWS, "effective": ROWS}
    assert details["num_fewshot"]["choice"] == 0
    assert details["lm_eval"].startswith("0.4.")
    assert len(details["config_sha256"]["choice"]) == len(details["task_hashes"]["choice"]) == 64


def test_a_metric_that_leaves_rows_out_is_compared_as_two_measurements() -> None:
    def asked(value: float, rows: list[int]) -> Asked:
        measured = Measured(value, 0.1, len(rows), tuple(value for _ in rows))
        return Asked({"t.acc": Score(measured, {("t", row): value for row in rows})}, {})

    result = HarnessPart(["t"]).score(asked(0.9, [0, 1, 3]), asked(0.4, [0, 1]))
    assert result.differences["t.acc"].test == "z"
    assert result.differences["t.acc"].value == pytest.approx(0.5)
    assert result.differences["t.acc"].stderr == pytest.approx(math.hypot(0.1, 0.1))


def test_limit_and_examples_in_the_prompt(plain: RowByRow, folder: Path) -> None:
    part = HarnessPart(["choice"], folder, limit=5, num_fewshot=2)
    asked = part.ask(plain)
    assert asked.scores["choice.acc"].measured.n == 5
    assert asked.facts["n-samples"]["choice"] == {"original": ROWS, "effective": 5}
    assert asked.facts["num_fewshot"]["choice"] == 2
    zero = HarnessPart(["choice"], folder, limit=5).ask(plain)
    assert zero.facts["task_hashes"] != asked.facts["task_hashes"]
    assert part.ask(plain) == asked, "the same examples are drawn again"


def test_both_models_see_the_same_shuffle(plain: RowByRow, folder: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path, plain)
    (tmp_path / "shuffle.py").write_text(
        "import random\ndef rows(data):\n    return data.select(random.sample(range(len(data)), 6))\n"
    )
    (tmp_path / "mixed.yaml").write_text(f"task: mixed\n{BASE}{TASKS['choice']}process_docs: !function shuffle.rows\n")
    found = []
    for seed in (1, 2):  # nobody else's seed counts, and nobody else's numbers change
        random.seed(seed)
        expected = random.Random(seed).random()
        found.append(HarnessPart(["mixed"], tmp_path).ask(plain))
        assert random.random() == expected
    assert found[0] == found[1]


def test_nothing_is_said_written_or_sent(
    plain: RowByRow,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import multiprocessing

    import datasets
    import huggingface_hub

    reached: list[Any] = []

    def refuse(*arguments: Any, **more: Any) -> Any:
        reached.append(arguments)
        raise OSError("no network in this test")

    # Online, so that what would be sent is tried.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(multiprocessing, "Pool", refuse)
    monkeypatch.chdir(tmp_path)
    before = sorted(folder.rglob("*"))
    part = HarnessPart(list(TASKS), folder)
    part.check(plain.chat)
    capfd.readouterr()
    result = part.score(part.ask(plain), part.ask(plain))
    assert result.metrics["cloze.perplexity"].stderr, "bootstrapped by the harness, in this process"
    said = capfd.readouterr()
    assert said.out == ""
    shown = {f"progress: task {what} of the tuned model" for what in ("choices", "texts", "answers")}
    assert set(said.err.splitlines()) == shown
    assert [record.getMessage() for record in caplog.records if record.name.startswith("lm_eval")] == []
    assert reached == []
    assert list(tmp_path.iterdir()) == []
    assert sorted(folder.rglob("*")) == before


def test_data_files_are_found_from_the_working_directory_as_well(
    plain: RowByRow, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "choice.yaml").write_text((folder / "choice.yaml").read_text())
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "choices": ["b", "c"], "answer": 0}])
    monkeypatch.chdir(tmp_path)
    part = HarnessPart(["choice"], Path("tasks"))
    assert part.ask(plain).scores["choice.acc"].measured.n == 1
    assert Path.cwd() == tmp_path


def test_the_examples_run(plain: RowByRow) -> None:
    result = HarnessPart(["bins"], EXAMPLES).ask(plain).measured()
    assert result.keys() == {
        "bins.acc",
        "bins_choice.acc",
        "bins_choice.acc_norm",
        "bins_answer.exact_match",
        "bins_answer.exact_match.first-word",
        "bins_text.word_perplexity",
        "bins_text.bits_per_byte",
    }
    assert {measured.n for measured in result.values()} == {8}


def test_the_page_s_task_runs(plain: RowByRow, tmp_path: Path) -> None:
    page = (EXAMPLES.parents[1] / "docs" / "harness.md").read_text(encoding="utf-8")
    for language, name in (("yaml", "bins_choice.yaml"), ("json", "bins.jsonl")):
        (block,) = re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)
        (tmp_path / name).write_text(block, encoding="utf-8")
    accuracy = HarnessPart(["bins_choice"], tmp_path).ask(plain).scores["bins_choice.acc"].measured
    assert (accuracy.n, accuracy.stderr) == (1, None)


def problems_of(part: HarnessPart, chat: ChatFormat, kind: type[Exception]) -> list[str]:
    with pytest.raises(kind) as caught:
        part.check(chat)
    return str(caught.value).splitlines()


def test_unknown_names_are_refused_with_near_ones(plain: RowByRow, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\noutput_type: [")
    (tmp_path / "choice.yaml").write_text((folder / "choice.yaml").read_text())
    (tmp_path / "all.yaml").write_text("group: all\ntask: [choice, arc_eazy]")
    problems = problems_of(HarnessPart(["choise", "all", "mine"], tmp_path), plain.chat, ConfigError)
    assert f"no task, group or tag 'choise' in {tmp_path} or the harness's catalogue" in problems[0]
    assert "near it: choice" in problems[0]
    assert "no task, group or tag 'arc_eazy'" in problems[2], "a member of a group"
    assert "near it: arc_easy" in problems[2]
    assert problems[3].startswith(f"{tmp_path / 'mine.yaml'}: ")
    assert problems[3].endswith(": not read as a task file")
    assert problems[4].startswith("tasks of the harness's own catalogue need the network")


def test_data_out_of_reach_is_said_by_task(plain: RowByRow, tmp_path: Path) -> None:
    text = BASE + TASKS["choice"]
    (tmp_path / "far.yaml").write_text("task: far\n" + text.replace("dataset_path: json", "dataset_path: no/where"))
    (line,) = problems_of(HarnessPart(["far"], tmp_path), plain.chat, MachineError)
    assert line.startswith(f"task far ({tmp_path / 'far.yaml'}): its data set is neither in the Hugging Face cache")
    assert "no/where" in line
    assert line.endswith("or write the task as a local file: docs/harness.md")

    (tmp_path / "lost.yaml").write_text("task: lost\n" + text)
    (tmp_path / "torn.yaml").write_text("task: torn\n" + text.replace("rows.jsonl", "torn.jsonl"))
    (tmp_path / "torn.jsonl").write_text('{"question": "a"')
    (tmp_path / "odd.yaml").write_text("task: odd\n" + text.replace("rows.jsonl", "odd.jsonl"))
    write_jsonl(tmp_path / "odd.jsonl", [{"frage": "a", "choices": ["b", "c"], "answer": 0}])
    lines = problems_of(HarnessPart(["lost", "torn"], tmp_path), plain.chat, DataError)
    assert lines[0].startswith("task lost (")
    assert "rows.jsonl" in lines[0]
    assert "data_files are looked for from the working directory, then from the task file's folder" in lines[0]
    assert lines[1].startswith("task torn (")
    (line,) = problems_of(HarnessPart(["odd"], tmp_path), plain.chat, ConfigError)
    assert line.startswith("task odd (")
    assert "'question' is undefined" in line


def test_what_would_be_ignored_is_refused(plain: RowByRow, folder: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path, plain)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{BASE}{text}")

    sampled = TASKS["answer"].replace("do_sample: false", "do_sample: true, temperature: 0.7")
    write("sampled", sampled)
    write("warm", TASKS["answer"].replace("false", "false, temperature: 1"))
    write("fixed", TASKS["cloze"] + "num_fewshot: 0\n")
    write("runs", TASKS["answer"] + "unsafe_code: true\n")
    part = HarnessPart(["sampled", "fixed", "runs", "warm", "choice", "all_choices"], tmp_path, num_fewshot=2)
    problems = problems_of(part, plain.chat, ConfigError)
    assert problems == [
        "task sampled sets generation_kwargs do_sample: True, temperature: 0.7; answers here are greedy, so that two models can be "
        "compared: ask another task, or a copy of its file without them",
        "task fixed fixes num_fewshot: 0, so 2 would be ignored; leave it out, or ask 0",
        "task runs runs programs that the model wrote, which is not done here; leave it out",
        "--tasks: all_choices asks again what another name asks: choice; leave one out",
    ]
    assert problems_of(HarnessPart([], tmp_path / "no", 0, -1), plain.chat, ConfigError) == [
        "no task of lm-evaluation-harness is named; name some: --tasks arc_easy,kobest_boolq",
        "the limit of rows is 0; give 1 or more, or none for all rows",
        "the number of few-shot examples is -1; give 0 or more",
        f"{tmp_path / 'no'}: no such folder of task files",
    ]
    long = TASKS["answer"].replace("max_gen_toks: 12", "max_gen_toks: 200")
    write("long", long)
    with pytest.raises(ConfigError, match="task long asks for answers of up to 200 tokens; the model takes 96"):
        HarnessPart(["long"], tmp_path).ask(plain)
    write("wide", TASKS["cloze"].replace("{{next}}", "{{text}}"))
    with pytest.raises(DataError, match="tokens behind its context; the model takes 1 to 96"):
        HarnessPart(["wide"], tmp_path).ask(plain)


def test_without_the_harness_the_extra_is_named(plain: RowByRow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (line,) = problems_of(HarnessPart(["arc_easy"]), plain.chat, MachineError)
    assert line == (
        "tasks of lm-evaluation-harness need the package lm_eval; install it with: pip install 'tunesmith[harness]'"
    )
