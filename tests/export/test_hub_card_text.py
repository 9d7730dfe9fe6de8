"""The text of a model card: what it says of a run, and what hostile names in a run cannot do to it."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from hub_runs import BASE, NAME, parts
from stub_hub import StubHub
from trained import copy_run, tiny_base, tiny_run
from tunesmith import api
from tunesmith.config import RunConfig
from tunesmith.errors import RunError
from tunesmith.export.card import CardRequest, code, leaf, without_folders, write_card
from tunesmith.export.card import plain as plain_text
from tunesmith.types import Message
from tunesmith.workflows.push import push


def metric(value: float, stderr: float | None = 0.01, share: bool = True) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "n": 400, "higher_is_better": True, "share": share}


def recorded(**changes: Any) -> dict[str, Any]:
    """What a run's files hold: arguments of `write_card`."""
    values: dict[str, Any] = {
        "config": RunConfig.model_validate(
            {"optimizer": {"lr": 1e-3}, "data": {"path": "/home/ann/secret/train.jsonl"}}
        ),
        "metadata": {
            "tunesmith": "9.8.7",
            "method": "lora",
            "objective": "sft",
            "model": {"name": "/home/ann/models/llama", "revision": None, "weight_hash": "ab" * 32},
            "chat_template": {"name": "chatml", "hash": "cd" * 32},
            "data": {
                "path": "/home/ann/secret/train.jsonl",
                "sha256": "12" * 32,
                "train_rows": 1340,
                "train_tokens": 5000,
                "supervised_tokens": 700,
                "eval_path": "https://host/held.jsonl?key=topsecret",
                "eval_rows": 60,
                "eval_sha256": "34" * 32,
            },
            "packages": {"torch": "2.99.0"},
            "hardware": {"device": "cuda", "name": "NVIDIA H100", "memory_gb": 79.2},
            "dtype": "bf16",
            "seed": 7,
            "parent": None,
        },
        "metrics": {
            "steps": 84,
            "tokens_per_second": 1234.0,
            "peak_memory_gb": 3.25,
            "train_loss": 0.5,
            "eval_loss": 0.625,
            "wall_seconds": 90.0,
            "train_seconds": 61.5,
            "trainable_parameters": 4880000,
            "total_parameters": 139000000,
        },
        "evaluations": [
            {
                "task": "intents",
                "n": 400,
                "data": "/home/ann/test.jsonl",
                "data_sha256": "56" * 32,
                "model": {"forced": False},
                "metrics": {
                    "accuracy": metric(0.975, 0.008),
                    "retain": metric(0.31, 0.017),
                    "bleu": metric(20.5, 0.5, False),
                },
                "baseline": {"accuracy": metric(0.41, 0.024), "retain": metric(0.33, 0.017)},
                "comparison": {
                    "accuracy": {"difference": 0.565, "p": 0.0001, "verdict": "better"},
                    "retain": {"difference": -0.02, "p": 0.031, "verdict": "worse"},
                },
                "gate": {"passed": True, "conditions": [{"condition": "accuracy >= 0.9"}]},
            }
        ],
    }
    return values | changes


REQUEST = CardRequest(NAME, "adapter", ["adapter_model.safetensors", "adapter_config.json"], BASE, "apache-2.0")


# -- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_run_recorded() -> None:
    header, body = parts(write_card(REQUEST, **recorded()))
    assert header == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", "lora", "sft"],
    }
    lines = body.splitlines()
    for line in (
        f"| training | `train.jsonl` | 1,340 | `{'12' * 32}` |",
        f"| held out | `held.jsonl` | 60 | `{'34' * 32}` |",
        "| `optimizer.lr` | `0.001` | `None` |",
        "- hardware: `NVIDIA H100` (`cuda`, 79 GB), compute type `bf16`",
        "- time: 61.5 s of training, 90.0 s in all; 84 steps, 1234 tokens/s, peak memory 3.25 GB",
        "- parameters: 4,880,000 of 139,000,000 were trained",
        "- loss: 0.5000 in training, 0.6250 on held-out rows",
        f"400 rows of `test.jsonl` (SHA-256 `{'56' * 32}`), greedy decoding; ± is one standard error.",
        "| `accuracy` | 41.0% ± 2.4 | 97.5% ± 0.8 | +56.5 points, p < 0.001: better |",
        "| `bleu` | not measured | 20.5 ± 0.5 | not measured |",
        "Gate: passed (`accuracy >= 0.9`).",
        "- general knowledge (share of general questions that are right): base 33.0% ± 1.7, tuned 31.0% ± 1.7; "
        "-2.0 points, p = 0.031: worse.",
        "- Not measured: refusal_unsafe, refusal_safe, memorized. Training for one task can take away from others; what is "
        "not measured is not known.",
        "| `torch` | `2.99.0` |",
    ):
        assert line in lines, line
    assert [line for line in lines if line.startswith("| `")].count("| `optimizer.lr` | `0.001` | `None` |") == 1
    assert not re.search(r"/home|ann\b|topsecret", body)


def test_without_a_license_a_hub_id_or_an_evaluation_the_card_says_so() -> None:
    header, body = parts(write_card(CardRequest(NAME, "adapter", [], None), **recorded(evaluations=[])))
    assert "license" not in header
    assert "base_model" not in header
    assert "No license was chosen for this repository." in body
    assert "This model was not evaluated." in body
    assert "A LoRA adapter for `llama`" in body
    assert 'base = "PATH/TO/THE/BASE"' in body
    assert "Not measured: retain, refusal_unsafe, refusal_safe, memorized." in body


@pytest.mark.parametrize(
    "changes", [{}, {"baseline": {}, "gate": None}, {"model": {"forced": True}, "gate": None}, None]
)
def test_a_blank_line_stands_before_every_heading_and_behind_every_table(changes: dict[str, Any] | None) -> None:
    results = [] if changes is None else [recorded()["evaluations"][0] | changes] * 2
    for kind in ("adapter", "merged", "gguf"):
        request = CardRequest(NAME, kind, ["model-q8_0.gguf"], None)  # type: ignore[arg-type]
        lines = parts(write_card(request, **recorded(evaluations=results)))[1].split("\n")
        fenced = False
        for before, line in itertools.pairwise(lines):
            fenced ^= line.startswith("```")
            if fenced:
                continue
            assert not line.startswith("#") or before == "", (before, line)
            assert not before.startswith("|") or line == "" or line.startswith("|"), (before, line)


HOSTILE = [
    "x\n---\nlicense: evil\n---\n# Owned",
    "a | b | c",
    "``` `` ` code ```",
    "<script>alert(1)</script><img src=x onerror=y>",
    "{{ 7 * 7 }}{% for x in range(9) %}{{ cycler.__init__.__globals__ }}{% endfor %}",
    "[click](https://evil.example) https://evil.example ![p](https://evil.example/p.png)",
    "\u202egnp.exe\u2066 \x00\x1b[31m \ue000",
    "`",
    "",
    "\\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    values = recorded()
    metadata, evaluation = values["metadata"], values["evaluations"][0]
    metadata["data"]["path"] = metadata["tunesmith"] = metadata["method"] = metadata["hardware"]["name"] = text
    metadata["model"]["name"] = metadata["parent"] = metadata["chat_template"]["name"] = text
    metadata["packages"] = {text: text}
    evaluation |= {"task": text, "data": text, "metrics": {text: metric(0.5)}, "baseline": {text: metric(0.25)}}
    evaluation["comparison"] = {text: {"difference": 0.25, "p": 0.5, "verdict": "unclear"}}
    evaluation["gate"]["conditions"][0]["condition"] = text
    values["config"].data.columns = {"prompt": text}
    header, body = parts(write_card(CardRequest(NAME, "adapter", [], None, f"{text}: [x"), **values))
    assert list(header) == ["library_name", "license", "pipeline_tag", "tags"]
    assert header["license"] == plain_text(f"{text}: [x")
    assert header["tags"] == ["tunesmith", plain_text(text), "sft"]
    assert "49" not in body
    assert not re.search("[\u202e\u2066\x00\x1b\ue000]", body)
    page = MarkdownIt("gfm-like", {"linkify": False}).render(body)  # HTML in Markdown is let through
    plain = parts(write_card(CardRequest(NAME, "adapter", [], None, "mit"), **recorded()))[1]
    calm = MarkdownIt("gfm-like", {"linkify": False}).render(plain)
    assert "<script" not in page
    assert "<img" not in page
    assert "<a " not in page
    for tag in ("h1", "h2", "h3", "table", "pre"):
        assert page.count(f"<{tag}>") == calm.count(f"<{tag}>"), tag
    for row in re.findall(r"<tr>.*?</tr>", page, flags=re.DOTALL):
        assert row.count("<td") + row.count("<th") in (2, 3, 4)
    assert "| 25.0% ± 1.0 | 50.0% ± 1.0 | +25.0 points, p = 0.500: unclear |" in body
    assert page.count("<td") == calm.count("<td") - 2 * 4 + 3  # two metrics fewer, one more changed setting


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "`a`"),
        ("a`b", "`` a`b ``"),
        ("a``b`", "``` a``b` ```"),
        ("a|b", "`a\u2223b`"),
        ("a\n\tb", "`a b`"),
        ("", "`(empty)`"),
    ],
)
def test_a_code_span_cannot_be_left(text: str, expected: str) -> None:
    assert code(text) == expected


def test_paths_become_names() -> None:
    assert [leaf(path) for path in ("/a/b.jsonl", "C:\\x\\y.csv", "https://h/z?key=1#f", "a/", "/")] == [
        "b.jsonl",
        "y.csv",
        "z",
        "a",
        "(unnamed)",
    ]
    mix = [{"path": "../up/general.txt", "weight": 0.2}, {"note": "/etc/x"}]
    assert without_folders(mix) == [{"path": "general.txt", "weight": 0.2}, {"note": "x"}]


def test_a_damaged_record_is_an_error_of_one_line() -> None:
    values = recorded()
    del values["metadata"]["hardware"]["name"]
    with pytest.raises(RunError, match=r"card cannot be written \(UndefinedError: .*'name'\): metadata.json"):
        write_card(REQUEST, **values)


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_the_code_on_the_card_loads_what_was_pushed(
    what: str, hub: StubHub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any
) -> None:
    run = copy_run(
        tiny_run(tmp_path_factory, **{"data.chat_template": "alpaca"}), tmp_path / "run"
    )  # not the base's own
    if what == "merged":
        api.merge(run)
    push(run, NAME, what=what, base_model=BASE)
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in hub.files(NAME).items():
        (fetched / name).write_bytes(content)
    monkeypatch.setattr("huggingface_hub.snapshot_download", {NAME: str(fetched)}.__getitem__)
    (program,) = re.findall(r"```python\n(.*?)```", (fetched / "README.md").read_text(), flags=re.DOTALL)
    program = program.replace(f'"{BASE}"', repr(str(tiny_base(tmp_path_factory)))).replace('"..."', '"the jar?"')
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(program, {})  # noqa: S102 - the card's own code
    loaded = api.load(run)
    prompt = loaded.chat.encode_prompt([Message("user", "the jar?")])
    import torch

    answer = loaded.forward.model.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False)
    expected = loaded.tokenizer.decode(answer[0, len(prompt) :], skip_special_tokens=True)
    assert said.getvalue() == expected + "\n"
    assert expected
