"""Damaged or hostile JSON beside an adapter: every command ends with one line that names the file, or takes what it can be taken for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import tunesmith
from tiny import write_jsonl
from trained import copy_run, tiny_base, tiny_run
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.registry.fields import check_config, check_metadata, check_record
from tunesmith.runs import RunFolder
from tunesmith.workflows.adapters import list_adapters, show_adapter
from tunesmith.workflows.load import adapter_record, find
from tunesmith.workflows.merge import merge

WRONG: tuple[Any, ...] = (None, True, -1, 1.5, "", "text", [], [1], ["a"], [[]], {}, {"a": 1}, {"hash": [1]}, {"": {}})


@pytest.fixture
def run(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny_run(tmp_path_factory), tmp_path / "run")


def leaves(value: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys."""
    for key, inner in value.items():
        yield (*place, key)
        if isinstance(inner, dict):
            yield from leaves(inner, (*place, key))


def with_value(value: dict[str, Any], place: tuple[str, ...], new: Any, remove: bool = False) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(value))
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    if remove:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return changed


def outcome(action: Any, *names: str) -> str | None:
    """What an action says that is refused; it names one of the files, on one line."""
    try:
        action()
    except TunesmithError as error:
        said = str(error)
        assert "\n" not in said, said
        assert any(name in said for name in names), said
        return said
    return None


@pytest.mark.parametrize("name", ["tunesmith.json", "adapter_config.json"])
def test_every_key_of_an_adapters_files_with_every_wrong_type(name: str, run: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))
    whole = json.loads((adapter / name).read_text())
    refused = 0
    for place in leaves(whole):
        for new in (*WRONG, "REMOVE"):
            changed = with_value(whole, place, new, new == "REMOVE")
            (adapter / name).write_text(json.dumps(changed))
            (record,) = list_adapters([adapter])
            assert record["status"] in ("ok", "refused")
            show_adapter(adapter)
            # A base of another name is not found, an adapter of another shape does not fit: both say which.
            said = outcome(lambda: find(adapter, dtype="fp32"), name, str(new), str(tmp_path))
            refused += said is not None
    assert refused > 50


def test_every_key_of_a_runs_metadata_with_every_wrong_type(run: Path) -> None:
    path = run / "metadata.json"
    whole = json.loads(path.read_text())
    refused = 0
    for place in leaves(whole):
        if place[0] in ("packages", "hardware", "format_version"):
            continue  # shown alone; runs.py has the version
        for new in (None, 1.5, "text", [1], {"a": 1}, "REMOVE"):
            path.write_text(json.dumps(with_value(whole, place, new, new == "REMOVE")))
            (record,) = list_adapters([run])
            assert record["status"] in ("ok", "refused")
            show_adapter(run)
            refused += (
                outcome(
                    lambda: find(run, dtype="fp32"),
                    "metadata.json",
                    "chat_template.jinja",
                    "not those",
                    "its config.json is not",
                )
                is not None
            )
    assert refused > 20


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"a"', "\x00", '{"a": NaN', "[" * 10000], ids=range(9))
@pytest.mark.parametrize("file", ["adapter/tunesmith.json", "adapter/adapter_config.json", "metadata.json"])
def test_commands_end_with_one_line_that_names_the_file(file: str, text: str, run: Path, tmp_path: Path) -> None:
    name = Path(file).name
    if name == "metadata.json" and len(text) > 100:
        pytest.skip("runs.py reads it")
    (run / file).write_text(text)
    data = write_jsonl(
        tmp_path / "data.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    )
    for arguments in (
        ("adapters", "verify", run), ("merge", run), ("eval", run, "--data", data), ("chat", run, "--prompt", "a"),
    ):  # fmt: skip
        result = tunesmith(*arguments)
        assert (result.code, len(result.problems)) == (2, 1), (arguments, result.err)
        assert name in result.problems[0], result.problems
    assert tunesmith("adapters", "list", run.parent).code == 0
    assert not (run / "merged").exists()


def test_what_peft_itself_trips_over_is_one_line(run: Path) -> None:
    path = run / "adapter" / "adapter_config.json"
    whole = json.loads(path.read_text())
    for key in ("r", "rank_pattern", "peft_type", "target_modules", "bias", "init_lora_weights"):
        for new in (*WRONG, 10**9):
            path.write_text(json.dumps(whole | {key: new}))
            outcome(lambda: merge(run, dtype="fp32"), "adapter")
            shutil.rmtree(run / "merged", ignore_errors=True)


def test_whole_files_pass(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for each in (
        run,
        tiny_run(tmp_path_factory, "qlora"),
        tiny_run(tmp_path_factory, "lora", **{"adapter.new_tokens": ["bin"]}),
    ):
        adapter = each / "adapter"
        check_record(adapter / "tunesmith.json", adapter_record(RunFolder.open(each), adapter))
        check_config(adapter / "adapter_config.json", json.loads((adapter / "adapter_config.json").read_text()))
        check_metadata(each / "metadata.json", RunFolder.open(each).metadata)
    assert tiny_base(tmp_path_factory).is_dir()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "base is missing"),
        ({"base": []}, "base is []: input should be a valid dictionary or instance of _Base"),
        ({"base": {"weight_hash": "abc"}}, "base.weight_hash is 'abc': string should match pattern"),
        (
            {"base": {"weight_hash": "a" * 64}, "dtype": "float8"},
            "dtype is 'float8': input should be 'bf16', 'fp16' or 'fp32'",
        ),
        ({"base": {"weight_hash": "a" * 64}, "quantization": {"scheme": "nf5"}}, "quantization.scheme is 'nf5': "),
    ],
)
def test_what_is_wrong_is_said(value: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_record(Path("x/tunesmith.json"), value)
    assert str(caught.value).startswith(f"x/tunesmith.json: damaged: {said}")
    assert str(caught.value).endswith("; restore it, or remove it to load on any base")
