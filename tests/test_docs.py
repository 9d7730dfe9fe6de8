"""Pages that are made from the code are up to date, and relative links in the docs lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from command_line import tunesmith
from tiny import chat_rows, write_jsonl
from tunesmith.runs import RunFolder

ROOT = Path(__file__).parents[1]


def test_generated_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, content in generate.pages().items():
        assert path.read_text(encoding="utf-8") == content, f"{path.name} is out of date: run `make docs`"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_placeholder_is_left() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.findall(r"QUICKSTART_OUTPUT|QUARTER_HOUR|TODO|FIXME|TBD", page.read_text(encoding="utf-8")), page


def test_every_module_says_what_lives_there() -> None:
    for module in sorted((ROOT / "src").rglob("*.py")):
        assert module.read_text(encoding="utf-8").lstrip().startswith('"""'), f"{module} has no docstring"


def test_the_commands_about_preferences_run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"question {n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(30)]
    rated = [{"prompt": f"question {n}?", "completion": f"yes {n}", "label": n % 3 > 0} for n in range(30)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "rated.jsonl", rated)
    commands = [line.removeprefix("$ tunesmith ") for line in block.splitlines()]
    assert len(commands) == 4
    for number, command in enumerate(commands):
        out = ["--out", str(tmp_path / f"run-{number}")] if command.startswith("train") else []
        result = tunesmith(*shlex.split(command.replace("MODEL", str(tiny_model))), *out)
        assert result.code == 0, f"{command}\n{result.err}"
    assert [RunFolder.open(tmp_path / f"run-{number}").config.objective.name for number in (1, 2, 3)] == [
        "dpo",
        "dpo",
        "kto",
    ]


def test_the_commands_about_evaluation_run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    block, *_ = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "test.jsonl", chat_rows(12))
    trained = tunesmith(
        "train", "--model", tiny_model, "--data", "test.jsonl", "--out", "run", "--set", "training.max_steps=2",
        "--set", "model.dtype=fp32",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    commands = [line.removeprefix("$ tunesmith ") for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        given = shlex.split(command.replace("RUN", "run").replace("MODEL", str(tiny_model)))
        result = tunesmith(*given, "--max-new-tokens", "2") if "--data" in given else tunesmith(*given)
        assert result.code in ((0, 1) if "--retain" in given else (0,)), f"{command}: {result.err}"
