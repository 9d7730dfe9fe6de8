"""What goes to the hub and what does not, the card, and how a push meets a hub that fails, against a hub on localhost."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import pickle
import re
import shutil
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import numpy as np
import pytest
import yaml
from huggingface_hub.utils import _http as http_of_hub
from markdown_it import MarkdownIt
from safetensors.numpy import save_file

from stub_hub import DROP, STALL, STALL_INSIDE, TOKEN, Repo, StubHub, stub_hub, write_gguf
from tiny import chat_rows, write_jsonl
from trained import copy_run, tiny_base, tiny_run
from tunesmith import api
from tunesmith.config import RunConfig
from tunesmith.errors import MachineError, ModelError, RunError, UserError, VerificationError
from tunesmith.export import hub_client
from tunesmith.export.card import CardRequest, code, leaf, without_folders, write_card
from tunesmith.export.card import plain as plain_text
from tunesmith.registry.records import Merged, adapter_hash, write_merged_record
from tunesmith.types import Message
from tunesmith.workflows.push import push

NAME = "me/bins"
BASE = "org/base"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    with stub_hub(monkeypatch) as running:
        yield running


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = copy_run(tiny_run(tmp_path_factory), tmp_path_factory.mktemp("hub") / "run")
    api.evaluate(run, write_jsonl(run.parent / "test.jsonl", chat_rows(8, seed=1)), baseline=True)
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return copy_run(evaluated, tmp_path / "run")


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


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The header, read, and the body."""
    assert card.startswith("---\n")
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


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


# -- what goes up -----------------------------------------------------------------------------------------------------


def test_an_adapter_goes_up_whole_private_and_without_paths(run: Path, hub: StubHub) -> None:
    result = push(run, NAME, base_model=BASE, license="mit")
    assert hub.repos[NAME].private is True
    files = hub.files(NAME)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tunesmith.json"]
    assert sorted(files) == names
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == weights
    assert files["chat_template.jinja"] == (run / "adapter" / "chat_template.jinja").read_bytes()
    before = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert json.loads(files["adapter_config.json"]) == {**before, "base_model_name_or_path": BASE}
    assert json.loads(files["tunesmith.json"])["base"]["name"] == BASE
    for name in set(names) - {"adapter_model.safetensors"}:
        assert not re.search(rb"/tmp|pytest|/home", files[name]), name
    assert parts(files["README.md"].decode())[0]["license"] == "mit"
    assert b"| `accuracy` | " in files["README.md"]
    listed = {file["path"]: file["sha256"] for file in result["files"]}
    assert listed == {name: hashlib.sha256(files[name]).hexdigest() for name in names if name != "README.md"}
    assert (result["private"], result["what"], result["left_out"], result["also_there"]) == (
        True,
        "adapter",
        ["README.md"],
        [],
    )


def test_paths_in_what_libraries_note_become_names(run: Path, hub: StubHub) -> None:
    path = run / "adapter" / "tokenizer_config.json"
    noted = {
        "template": str(run / "config.yaml"),
        "nowhere": "/no/such/path",
        "long": "/" + "x" * 5000,
        "user": "~nobody-here/x",
        "mine": "~/models/x",
        "windows": "C:\\Users\\ann\\base",
        "share": "\\\\server\\share\\base",
        "address": "file:///home/ann/base",
        "name_or_path": "/a/b",
        "think": "/think",
        "sep_token": "/a/b",
        "added": [{"content": "/tmp/x"}],
    }
    path.write_text(json.dumps(noted))
    push(run, NAME, base_model=BASE)
    assert json.loads(hub.files(NAME)["tokenizer_config.json"]) == {
        **noted,
        "template": "config.yaml",
        "nowhere": "path",
        "user": "x",
        "mine": "x",
        "windows": "base",
        "share": "base",
        "address": "base",
        "name_or_path": BASE,
    }


def test_the_base_and_the_parent_are_named_without_their_folders(run: Path, hub: StubHub) -> None:
    record = run / "adapter" / "tunesmith.json"
    known = json.loads(record.read_text())
    record.write_text(
        json.dumps({**known, "parent": "../../first/adapter", "base": {**known["base"], "name": "/gone/bases/one"}})
    )
    config = run / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/gone/bases/one"}))
    push(run, NAME)
    files = hub.files(NAME)
    pushed = json.loads(files["tunesmith.json"])
    assert (pushed["parent"], pushed["base"]["name"]) == ("first", "base-32")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "base-32"
    assert b"/gone" not in b"".join(files.values())


def test_nothing_else_in_the_folder_goes_up(run: Path, hub: StubHub) -> None:
    adapter = run / "adapter"
    (adapter / "optimizer.pt").write_bytes(pickle.dumps([1]))
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps([1]))
    (adapter / ".unfinished-1.jsonl").write_text("{}")
    (adapter / "modeling.py").write_text("1")
    (adapter / "notes.json").write_text("{}")
    save_file({"m": np.zeros(2)}, adapter / "optimizer.safetensors")
    (adapter / "sub").mkdir()
    (adapter / "sub" / "config.json").write_text("{}")
    (run / "evaluations" / "test.json").unlink()  # of one weight file, not of two
    result = push(run, NAME)
    assert sorted(hub.files(NAME)) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tunesmith.json",
    ]
    assert set(result["left_out"]) == {
        "README.md",
        "optimizer.pt",
        "adapter_model.bin",
        ".unfinished-1.jsonl",
        "modeling.py",
        "notes.json",
        "optimizer.safetensors",
        "sub/config.json",
    }


@pytest.mark.parametrize("place", ["adapter/vocab.json", "adapter/sub", "adapter"])
def test_a_symbolic_link_is_refused_before_anything_is_asked(
    run: Path, hub: StubHub, tmp_path: Path, place: str
) -> None:
    path = run / place
    if path.exists():
        shutil.move(path, tmp_path / "elsewhere")
    target = tmp_path / "elsewhere"
    if not target.exists():
        target.mkdir()
    path.symlink_to(target)
    with pytest.raises(ModelError, match=rf"{place}: is a symbolic link .*nothing was uploaded"):
        push(run, NAME)
    assert hub.requests == []


def test_weights_that_are_not_those_that_were_measured_are_refused(run: Path, hub: StubHub) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"adapter: its weights are not those that training wrote \(recorded "):
        push(run, NAME)
    record = run / "adapter" / "tunesmith.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "adapter_sha256": adapter_hash(run / "adapter")}))
    with pytest.raises(VerificationError, match=r"test.json: was measured on other weights than the run has now"):
        push(run, NAME)
    path.write_bytes(content[:-8])
    (run / "evaluations" / "test.json").unlink()
    with pytest.raises(VerificationError, match=r"adapter_model.safetensors: damaged \(.*\); nothing was uploaded"):
        push(run, NAME)
    assert hub.requests == []


def test_a_missing_or_incomplete_artifact_is_named_with_the_command_that_makes_it(run: Path, hub: StubHub) -> None:
    with pytest.raises(RunError, match=rf"{run}/merged: missing; `tunesmith merge {run}` makes it"):
        push(run, NAME, what="merged")
    merged = shard(run)
    (merged / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"incomplete: model-00002-of-00002.safetensors missing"):
        push(run, NAME, what="merged")
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"incomplete: adapter_config.json missing; nothing was uploaded"):
        push(run, NAME)
    with pytest.raises(UserError, match=r"--what 'weights': expected adapter, merged, or the path of a model's folder"):
        push(run, NAME, what="weights")
    (run / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"not finished \(no metrics.json\); `tunesmith resume"):
        push(run, NAME)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo": "bins"}, r"--repo 'bins': expected ORG/NAME"),
        ({"repo": "me/../etc"}, r"--repo 'me/../etc': expected ORG/NAME"),
        ({"repo": 'me/a"b'}, r"--repo .*: expected ORG/NAME"),
        ({"repo": "me/a--b"}, r"--repo 'me/a--b': expected ORG/NAME"),
        ({"revision": "refs/pr/1"}, r"--revision 'refs/pr/1': expected a branch's name"),
        ({"license": "mit\nx: y"}, r"--license 'mit\\nx: y': expected an identifier"),
        ({"base_model": "/models/x"}, r"--base-model '/models/x': expected the base's hub id"),
    ],
)
def test_names_are_checked_first(run: Path, hub: StubHub, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        push(run, **{"repo": NAME, **options})
    assert hub.requests == []


def test_a_base_from_the_hub_is_known_and_another_is_refused(run: Path, hub: StubHub) -> None:
    metadata = json.loads((run / "metadata.json").read_text())
    metadata["model"]["name"] = "their/base"
    (run / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"--base-model org/base: the run was trained on their/base"):
        push(run, NAME, base_model=BASE)
    assert push(run, NAME)["base_model"] == "their/base"
    assert parts(hub.files(NAME)["README.md"].decode())[0]["base_model"] == "their/base"


def test_of_a_full_fine_tuning_the_model_goes_up(run: Path, hub: StubHub) -> None:
    for name, old in (("config.yaml", "method: lora"), ("metadata.json", '"method": "lora"')):
        path = run / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, old.replace("lora", "full")))
    shard(run).rename(run / "model")
    (run / "model" / "tunesmith.json").unlink()
    shutil.rmtree(run / "adapter")
    (run / "evaluations" / "test.json").unlink()
    with pytest.raises(
        UserError, match=r"a full fine-tuning has no adapter; --what merged pushes its model, .*/run/model"
    ):
        push(run, NAME)
    push(run, NAME, what="merged", base_model=BASE)
    assert len(hub.files(NAME)) == 5
    header, body = parts(hub.files(NAME)["README.md"].decode())
    assert (header["base_model_relation"], header["library_name"]) == ("finetune", "transformers")
    assert "before it was" not in body


def test_a_gguf_file_goes_up_alone(run: Path, hub: StubHub, tmp_path: Path) -> None:
    own = adapter_hash(run / "adapter")
    file = write_gguf(tmp_path / "bins-q8_0.gguf", own)
    result = push(run, NAME, what=str(file), base_model=BASE)
    assert sorted(hub.files(NAME)) == ["README.md", "bins-q8_0.gguf"]
    assert hub.files(NAME)["bins-q8_0.gguf"] == file.read_bytes()
    header, body = parts(hub.files(NAME)["README.md"].decode())
    assert (header["base_model_relation"], header["library_name"], header["tags"][-1]) == ("quantized", "gguf", "gguf")
    assert f'hf_hub_download("{NAME}", "bins-q8_0.gguf")' in body
    assert f"llama-cli -hf {NAME}:Q8_0" in body.splitlines()
    assert f"llama-cli --hf-repo {NAME} --hf-file bins-q8_0.gguf" in body.splitlines()
    assert f"ollama run hf.co/{NAME}:Q8_0" in body.splitlines()
    assert result["what"] == "gguf"
    write_gguf(file, own, note=str(run.absolute()))
    with pytest.raises(UserError, match=r"bins-q8_0.gguf: a path of this machine stands in it"):
        push(run, NAME, what=str(file))
    file.write_bytes(b"PK\3\4")
    with pytest.raises(VerificationError, match=r"not a GGUF file \(it begins with b'PK"):
        push(run, NAME, what=str(file))
    with pytest.raises(ModelError, match=r"there is no such file; `tunesmith export .*/run --to gguf"):
        push(run, NAME, what=str(tmp_path / "none.gguf"))
    link = tmp_path / "link.gguf"
    link.symlink_to(file)
    with pytest.raises(ModelError, match=r"link.gguf: is a symbolic link"):
        push(run, NAME, what=str(link))


def test_a_lora_gguf_says_that_it_needs_the_base(run: Path, hub: StubHub, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "bins-lora-f16.gguf", adapter_hash(run / "adapter"), "adapter")
    assert push(run, NAME, what=str(file), base_model=BASE)["what"] == "gguf-lora"
    header, body = parts(hub.files(NAME)["README.md"].decode())
    assert (header["base_model_relation"], header["library_name"], header["tags"][-1]) == ("adapter", "gguf", "gguf")
    assert f"A LoRA adapter for `{BASE}`, in GGUF for llama.cpp (`bins-lora-f16.gguf`), trained" in body
    assert "llama-cli -m PATH/TO/THE/BASE.gguf --lora bins-lora-f16.gguf" in body.splitlines()
    assert "ollama" not in body


# -- of which adapter it is -------------------------------------------------------------------------------------------


def train_on(run: Path) -> None:
    """Another adapter than the run had, as a resumed run leaves it."""
    path = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    record = run / "adapter" / "tunesmith.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "adapter_sha256": adapter_hash(run / "adapter")}))
    shutil.rmtree(run / "evaluations")


def test_a_merged_model_of_an_earlier_adapter_is_refused(run: Path, hub: StubHub) -> None:
    shard(run)
    push(run, NAME, what="merged")
    hub.requests.clear()
    train_on(run)
    with pytest.raises(
        VerificationError,
        match=rf"{run}/merged: was made of other weights than the run has now \(it holds \w{{12}}, the run has \w{{12}}\); nothing was "
        rf"uploaded; remove it, and merge again: `tunesmith merge {run} --out {run}/merged`",
    ):
        push(run, NAME, what="merged")
    assert hub.requests == []


def test_a_merged_model_of_unknown_or_several_adapters_is_refused(run: Path, hub: StubHub) -> None:
    own = adapter_hash(run / "adapter")
    merged = shard(run)
    (merged / "tunesmith.json").unlink()
    with pytest.raises(VerificationError, match=r"merged: does not say which adapter it was made of .*merge again"):
        push(run, NAME, what="merged")
    shutil.rmtree(merged)
    shard(run, adapters=(own, "1" * 64), names=("a", "b"))
    with pytest.raises(VerificationError, match=r"merged: was made of 2 adapters, and the card would state what was"):
        push(run, NAME, what="merged")
    shutil.rmtree(merged)
    shard(run, base_hash="2" * 64)
    with pytest.raises(VerificationError, match=r"merged: was merged into another base than the run was trained on"):
        push(run, NAME, what="merged")
    (merged / "tunesmith.json").write_text('{"kind": "merged", "adapters": 5}')
    with pytest.raises(ModelError, match=r"merged/tunesmith.json: damaged \(it names no adapter\); merge again"):
        push(run, NAME, what="merged")
    assert hub.requests == []


def test_a_gguf_file_of_an_earlier_or_unknown_adapter_is_refused(run: Path, hub: StubHub, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "bins-q8_0.gguf", adapter_hash(run / "adapter"))
    train_on(run)
    with pytest.raises(
        VerificationError,
        match=rf"bins-q8_0.gguf: was made of other weights than the run has now .*`tunesmith export {run} --to gguf:q8_0`",
    ):
        push(run, NAME, what=str(file))
    write_gguf(file, None)
    with pytest.raises(VerificationError, match=r"bins-q8_0.gguf: does not say which adapter it was made of.*export"):
        push(run, NAME, what=str(file))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ModelError, match=r"bins-q8_0.gguf: not a whole GGUF file"):
        push(run, NAME, what=str(file))
    assert hub.requests == []


def test_what_merge_writes_is_known_as_the_runs_own(run: Path, hub: StubHub) -> None:
    api.merge(run)
    push(run, NAME, what="merged")
    record = json.loads(hub.files(NAME)["tunesmith.json"])
    assert [one["sha256"] for one in record["adapters"]] == [adapter_hash(run / "adapter")]


def quantize(run: Path, folder: Path, **measured: Any) -> Path:
    """A quantized model's folder, with what its export measured."""
    shard(run, folder)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text("quant_stage: {}\n")
    record = json.loads((folder / "tunesmith.json").read_text())
    (folder / "tunesmith.json").write_text(
        json.dumps({**record, "quantized": {"method": "gptq", "verified": measured}})
    )
    return folder


def test_a_quantized_folder_goes_up_with_what_was_measured(run: Path, hub: StubHub, tmp_path: Path) -> None:
    folder = quantize(run, tmp_path / "gptq", kl=0.0125, perplexity=21.5, source_perplexity=21.0, top1=0.975)
    result = push(run, NAME, what=str(folder), base_model=BASE)
    assert result["what"] == "quantized"
    assert "recipe.yaml" in hub.files(NAME)
    header, body = parts(hub.files(NAME)["README.md"].decode())
    assert header == {
        "base_model": BASE,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", "lora", "sft", "compressed-tensors"],
    }
    lines = body.splitlines()
    assert any(
        line.startswith(f"`{BASE}`, fine-tuned, its weights quantized with `compressed-tensors`, ") for line in lines
    )
    assert f"- size: {sum(file['size'] for file in result['files']) / 2**20:,.1f} MB" in lines
    assert f"vllm serve {NAME}" in lines
    assert "transformers needs the package `compressed-tensors` for these weights." in lines
    assert (
        "Beside the model before it was quantized, on the text that was measured: KL 0.0125, the same likeliest token in 97.5% of places, "
        "perplexity 21.5 (before: 21)." in lines
    )
    assert "The numbers are those of the model as it was trained, before it was quantized." in lines
    train_on(run)
    with pytest.raises(VerificationError, match=r"gptq: was made of other weights than the run has now"):
        push(run, NAME, what=str(folder))


def test_a_quantized_folder_that_is_damaged_or_unmeasured(run: Path, hub: StubHub, tmp_path: Path) -> None:
    folder = quantize(run, tmp_path / "gptq")
    push(run, NAME, what=str(folder))
    assert b"Beside the model before" not in hub.files(NAME)["README.md"]
    record = json.loads((folder / "tunesmith.json").read_text())
    (folder / "tunesmith.json").write_text(json.dumps({**record, "quantized": {"verified": {"kl": "low"}}}))
    with pytest.raises(
        RunError, match=r"gptq/tunesmith.json: damaged: verified.kl: input should be a valid number, found 'low'"
    ):
        push(run, NAME, what=str(folder))
    (folder / "tunesmith.json").write_text(json.dumps(record))
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "[x](y)"}}')
    with pytest.raises(ModelError, match=r"gptq/config.json: quantization_config has no quant_method"):
        push(run, NAME, what=str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"gptq: not a model's folder \(it has no config.json\)"):
        push(run, NAME, what=str(folder))


# -- the repository ---------------------------------------------------------------------------------------------------


def test_a_public_repository_is_written_to_only_when_asked(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=False)
    with pytest.raises(UserError, match=r"me/bins: exists and is public: .* Pass --public to write to it"):
        push(run, NAME)
    assert hub.files(NAME) == {}
    assert [method for method, _ in hub.requests if method in ("POST", "PUT")] == []
    assert push(run, NAME, public=True)["private"] is False
    assert "adapter_model.safetensors" in hub.files(NAME)


def test_public_makes_a_new_repository_public_and_no_old_one(run: Path, hub: StubHub) -> None:
    assert push(run, "me/open", public=True)["private"] is False
    assert hub.repos["me/open"].private is False
    hub.repos[NAME] = Repo(private=True)
    with pytest.raises(UserError, match=r"exists and is private, and --public does not change that"):
        push(run, NAME, public=True)
    assert hub.files(NAME) == {}


def test_a_repository_that_came_out_public_gets_nothing(run: Path, hub: StubHub) -> None:
    hub.forced_private = False
    with pytest.raises(
        VerificationError, match=r"was to be made private, and the hub made it public .*nothing was uploaded"
    ):
        push(run, NAME)
    assert hub.files(NAME) == {}
    assert hub.count("POST", "preupload") == 0


def test_a_name_that_is_taken_unseen(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=True)
    hub.hidden.add(NAME)
    with pytest.raises(UserError, match=r"the name is taken, but the token cannot see it"):
        push(run, NAME)


def test_an_existing_private_repository_is_updated_and_keeps_its_files(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=True, branches={"main": {"old.bin": (b"x", False), ".gitattributes": (b"y", False)}})
    assert push(run, NAME)["also_there"] == ["old.bin"]
    assert hub.files(NAME)["old.bin"] == b"x"
    commits = hub.count("POST", "/commit/")
    again = push(run, NAME)  # nothing changed: no upload, no commit
    assert (hub.count("POST", "/commit/"), hub.count("PUT", "/lfs/")) == (commits, 1)
    assert again["also_there"] == ["old.bin"]


def test_shards_of_an_earlier_push_go_in_the_same_commit(run: Path, hub: StubHub) -> None:
    shard(run)
    push(run, NAME, what="merged")
    hub.repos[NAME].branches["main"] |= {"notes.txt": (b"mine", False), "sub/model.safetensors": (b"mine", True)}
    shutil.rmtree(run / "merged")
    merged = shard(run)
    whole = {"w": np.zeros(8, dtype=np.float32)}
    for path in merged.glob("model*"):
        path.unlink()
    save_file(whole, merged / "model.safetensors")
    commits = hub.count("POST", "/commit/")
    result = push(run, NAME, what="merged")
    gone = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert result["deleted"] == gone
    assert result["also_there"] == ["notes.txt", "sub/model.safetensors"]
    assert hub.count("POST", "/commit/") == commits + 1
    assert sorted(hub.files(NAME)) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "notes.txt",
        "sub/model.safetensors",
        "tunesmith.json",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "adapter_model.bin",
        "tf_model.h5",
        "other-q4_k_m.gguf",
    ],
)
def test_weights_that_others_put_there_are_refused_unless_replaced(run: Path, hub: StubHub, name: str) -> None:
    hub.repos[NAME] = Repo(private=True, branches={"main": {name: (b"old", True), "old.txt": (b"x", False)}})
    with pytest.raises(
        UserError, match=rf"me/bins: {name}: other weights, .*; nothing was uploaded\. .*or pass --replace"
    ):
        push(run, NAME)
    assert [method for method, _ in hub.requests if method in ("POST", "PUT")] == []
    result = push(run, NAME, replace=True)
    assert (result["deleted"], result["also_there"]) == ([name], ["old.txt"])
    assert name not in hub.files(NAME)


def test_weights_of_another_kind_are_refused_though_tunesmith_put_them_there(run: Path, hub: StubHub) -> None:
    push(run, NAME)
    shard(run)
    with pytest.raises(UserError, match=r"me/bins: adapter_config.json, adapter_model.safetensors: other weights"):
        push(run, NAME, what="merged")
    assert push(run, NAME, what="merged", replace=True)["deleted"] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_types_of_one_gguf_stand_side_by_side_and_those_of_earlier_weights_go(
    run: Path, hub: StubHub, tmp_path: Path
) -> None:
    own = adapter_hash(run / "adapter")
    push(run, NAME, what=str(write_gguf(tmp_path / "bins-q8_0.gguf", own)))
    hub.repos[NAME].branches["main"]["foreign-q2_k.gguf"] = (b"theirs", True)
    result = push(run, NAME, what=str(write_gguf(tmp_path / "bins-q4_k_m.gguf", own)))
    assert (result["deleted"], result["also_there"]) == ([], ["bins-q8_0.gguf", "foreign-q2_k.gguf"])
    train_on(run)
    new = write_gguf(tmp_path / "bins-q5_k_m.gguf", adapter_hash(run / "adapter"))
    result = push(run, NAME, what=str(new))
    assert (result["deleted"], result["also_there"]) == (["bins-q4_k_m.gguf", "bins-q8_0.gguf"], ["foreign-q2_k.gguf"])


def test_a_deletion_whose_answer_was_lost_is_not_made_twice(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=True, branches={"main": {"pytorch_model.bin": (b"old", True)}})
    left = [500]
    hub.after = lambda method, path: left.pop() if "/commit/" in path and left else None
    push(run, NAME, replace=True)
    assert left == []
    assert "pytorch_model.bin" not in hub.files(NAME)


def test_a_repository_that_others_change_meanwhile_is_looked_at_again(run: Path, hub: StubHub) -> None:
    hub.repos[NAME] = Repo(private=True)
    theirs = [{"pytorch_model.bin": (b"theirs", True)}]

    def meanwhile(method: str, path: str) -> None:
        if "/commit/" in path and theirs:
            hub.repos[NAME].branches["main"] |= theirs.pop()

    hub.fail = meanwhile
    with pytest.raises(UserError, match=r"me/bins: pytorch_model.bin: other weights"):
        push(run, NAME)
    assert list(hub.files(NAME)) == ["pytorch_model.bin"]


def test_a_revision_is_a_branch_of_its_own(run: Path, hub: StubHub) -> None:
    for _ in range(2):  # the second time it is there: 409
        push(run, NAME, revision="v2")
    assert hub.files(NAME) == {}
    assert "adapter_model.safetensors" in hub.files(NAME, "v2")
    assert f'snapshot_download("{NAME}", revision="v2")'.encode() in hub.files(NAME, "v2")["README.md"]


# -- a hub that fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/", "/preupload/", "/lfs/", "/objects/batch", "/tree/"])
def test_a_busy_hub_is_asked_again(run: Path, hub: StubHub, place: str) -> None:
    left = [503, 429]
    hub.fail = lambda method, path: left.pop() if place in path and left else None
    push(run, NAME)
    assert left == []
    assert len(hub.files(NAME)) == 5


def test_a_commit_whose_answer_was_lost_is_not_made_twice(run: Path, hub: StubHub) -> None:
    left = [500]
    hub.after = lambda method, path: left.pop() if "/commit/" in path and left else None
    push(run, NAME)
    assert len(hub.files(NAME)) == 5
    left = [500]
    hub.after = lambda method, path: left.pop() if "/repos/create" in path and left else None
    push(run, "me/second")
    assert len(hub.files("me/second")) == 5


def shard(run: Path, folder: Path | None = None, **changes: Any) -> Path:
    """A model in two shards at RUN/merged (or at `folder`), with a record that says it was made of the run's adapter."""
    merged = folder or run / "merged"
    merged.mkdir()
    base_hash = json.loads((run / "metadata.json").read_text())["model"]["weight_hash"]
    made = {"adapters": (adapter_hash(run / "adapter"),), "names": ("run",), "base": "base-32", "base_hash": base_hash}
    facts = {"tokenizer_hash": "0" * 64, "template_hash": "0" * 64, "dtype": "fp32", "onto": "16bit"}
    write_merged_record(merged, Merged(**{**made, **facts, **changes}))
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"w{number}": np.full(50_000, number, dtype=np.float32)}, merged / name)
    (merged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w0": names[0], "w1": names[1]}}))
    (merged / "config.json").write_text(json.dumps({"_name_or_path": "/somewhere/base", "model_type": "llama"}))
    return merged


def test_an_interrupted_upload_goes_on_where_it_was(run: Path, hub: StubHub) -> None:
    merged = shard(run)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(merged.glob("*.safetensors"))]
    hub.fail = lambda method, path: DROP if path == f"/lfs/{hashes[1]}" else None
    with pytest.raises(
        MachineError, match=r"me/bins: the upload .*push again: what was uploaded is not uploaded again"
    ):
        push(run, NAME, what="merged")
    assert list(hub.stored) == [hashes[0]]
    assert hub.files(NAME) == {}
    hub.fail = lambda method, path: None
    hub.requests.clear()
    push(run, NAME, what="merged")
    assert [path for method, path in hub.requests if method == "PUT"] == [f"/lfs/{hashes[1]}"]
    assert json.loads(hub.files(NAME)["config.json"])["_name_or_path"] == "base-32"
    assert sorted(hub.files(NAME)) == [
        "README.md",
        "config.json",
        *sorted(path.name for path in merged.glob("*.safetensors")),
        "model.safetensors.index.json",
        "tunesmith.json",
    ]


PLACES = [
    "/api/models/me/bins",
    "/repos/create",
    "/validate-yaml",
    "/preupload/",
    "/objects/batch",
    "/lfs/",
    "/lfs-verify",
    "/commit/",
    "/tree/",
]


@pytest.mark.parametrize("how", [STALL, STALL_INSIDE])
@pytest.mark.parametrize("place", PLACES)
def test_a_hub_that_stops_answering_is_left_after_three_times(
    run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch, place: str, how: int
) -> None:
    if (place, how) == ("/lfs/", STALL_INSIDE):
        pytest.skip("an upload's answer has no body that is read")
    monkeypatch.setattr(hub_client, "SILENCE", 0.5)
    before = http_of_hub._GLOBAL_CLIENT_FACTORY
    hub.fail = lambda method, path: how if place in path else None
    begun = time.monotonic()
    with pytest.raises(MachineError, match=r"^me/bins: .* failed: the hub did not answer 3 times in a row; ") as caught:
        push(run, NAME)
    assert time.monotonic() - begun < 60  # the library's tries times ours would be 30 x 0.5 s and more for one question
    assert sum(place in path for _, path in hub.requests) == 3
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert http_of_hub._GLOBAL_CLIENT_FACTORY is before
    assert huggingface_hub.get_session().timeout == httpx.Timeout(None)


def test_files_go_up_by_plain_lfs_where_the_faster_transfer_is_installed(
    run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet has no limit of time: it would wait for this hub without end."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail = lambda method, path: STALL if "xet" in path else None
    push(run, NAME)
    assert hub.count("PUT", "/lfs/") == 1
    assert hub.count("GET", "xet") == 0


def test_the_clients_own_factory_is_used_and_comes_back(run: Path, hub: StubHub) -> None:
    made: list[httpx.Client] = []

    def factory() -> httpx.Client:
        made.append(http_of_hub.default_client_factory())
        made[-1].headers["X-Of-The-Caller"] = "1"
        return made[-1]

    huggingface_hub.set_client_factory(factory)
    try:
        push(run, NAME)
        assert http_of_hub._GLOBAL_CLIENT_FACTORY is factory
    finally:
        huggingface_hub.set_client_factory(http_of_hub.default_client_factory)
    assert len(made) == 1
    assert made[0].is_closed
    assert hub.count("POST", "/commit/") == 1


def test_how_long_a_busy_hub_is_waited_for(run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    left = [429]
    hub.headers = {"Retry-After": "7"}
    hub.fail = lambda method, path: left.pop() if "/repos/create" in path and left else None
    push(run, NAME)
    assert waited == [7.0]
    for place in ("/repos/create", "/preupload/", "/commit/"):
        waited.clear()
        hub.headers = {"Retry-After": "3600"}
        hub.fail = lambda method, path, place=place: 429 if place in path else None  # type: ignore[misc]
        with pytest.raises(MachineError, match=r"failed: the hub answered 429, and asks to try again in 3600 seconds"):
            push(run, f"me/other{PLACES.index(place)}")
        assert waited == []
    hub.headers = {"RateLimit": '"api";r=0;t=1234'}
    with pytest.raises(MachineError, match=r"asks to try again in 1234 seconds"):
        push(run, "me/third")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("adapter_model.safetensors", "size", 5, r"adapter_model.safetensors has 5 bytes, sent were \d+"),
        ("adapter_model.safetensors", "lfs", "00" * 32, r"adapter_model.safetensors has SHA-256 0{64}, sent was"),
        ("README.md", "oid", "11" * 20, r"README.md has git hash 1{40}, sent was"),
        ("tunesmith.json", None, None, r"tunesmith.json is missing"),
    ],
)
def test_a_listing_that_differs_is_found(
    run: Path, hub: StubHub, name: str, key: str | None, value: Any, message: str
) -> None:
    def spoil(path: str, entry: dict[str, Any]) -> dict[str, Any] | None:
        if path != name:
            return entry
        if key is None:
            return None
        return {**entry, key: {**entry["lfs"], "oid": value} if key == "lfs" else value}

    hub.spoil = spoil
    with pytest.raises(VerificationError, match=rf"me/bins: the hub does not list what was sent: {message}"):
        push(run, NAME)


# -- the token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "place"),
    [
        *((status, place) for status in (401, 403, 500) for place in PLACES if place != "/validate-yaml"),
        (400, "/validate-yaml"),
        (404, "/commit/"),
    ],
)
def test_no_error_shows_the_token(
    run: Path,
    hub: StubHub,
    status: int,
    place: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.fail = lambda method, path: status if place in path else None
    for name in ("", "huggingface_hub", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    with pytest.raises(
        MachineError if status == 500 else UserError, match=rf"^me/bins: .*the hub answered {status}: "
    ) as caught:
        push(run, NAME)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(capsys.readouterr())


def test_no_token_and_a_token_in_the_run_are_refused(
    run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    template = run / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text() + f"{{# {TOKEN} #}}")
    with pytest.raises(
        UserError, match=r"chat_template.jinja: the hub's token stands in it; nothing was uploaded"
    ) as caught:
        push(run, NAME)
    assert TOKEN not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no token for the hub; set HF_TOKEN, or run `hf auth login`"):
        push(run, NAME)
    assert hub.requests == []


def test_loggers_are_as_they_were_afterwards(run: Path, hub: StubHub) -> None:
    logging.getLogger("httpx").setLevel(logging.INFO)
    push(run, NAME)
    assert logging.getLogger("httpx").level == logging.INFO


def test_a_hub_that_does_not_answer(run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match=r"me/bins: the hub cannot be reached; check the network"):
        push(run, NAME)
