"""What goes to the hub and what does not, against a hub on localhost."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub_runs import BASE, NAME, parts, record_texts, shard
from stub_hub import StubHub, write_gguf
from tunesmith.errors import ModelError, RunError, UserError, VerificationError
from tunesmith.registry.records import adapter_hash
from tunesmith.workflows.push import push

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
    record_texts(run)
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
