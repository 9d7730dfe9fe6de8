"""Finding and loading base models: what is refused, with which words, and that nothing is ever filled with random weights."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import CHATML, make_tiny_model, make_tokenizer
from tunesmith.config import ModelConfig, QuantizationConfig
from tunesmith.errors import MachineError, ModelError
from tunesmith.hardware import probe
from tunesmith.models import load
from tunesmith.models.load import ModelSource, fetch_weights, find_model, load_model, load_tokenizer, weight_hash

CPU = probe("cpu")


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def open_model(name: Path | str, **settings: Any) -> Any:
    config = ModelConfig(name=str(name), **settings)
    source = find_model(config)
    load_tokenizer(source, config)
    return load_model(source, config, CPU, "fp32")


def refusal(name: Path | str, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(name, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- what loads -------------------------------------------------------------------------------------------------------


def test_a_folder_loads_with_exactly_its_weights(tiny_model: Path) -> None:
    saved = load_file(tiny_model / "model.safetensors")
    model = open_model(tiny_model)
    assert {name for name, _ in model.named_parameters()} == set(saved)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, saved[name]), name


def test_weights_are_stored_in_the_compute_type(tiny_model: Path) -> None:
    config = ModelConfig(name=str(tiny_model))
    model = load_model(find_model(config), config, CPU, "bf16")
    saved = load_file(tiny_model / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name].bfloat16()), name


def test_the_attention_implementation_is_the_one_asked_for(tiny_model: Path) -> None:
    assert open_model(tiny_model).config._attn_implementation == "sdpa"
    assert open_model(tiny_model, attention="eager").config._attn_implementation == "eager"


def test_sharded_weights_load_through_their_index(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    open_model(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert all(torch.equal(p, whole[name]) for name, p in open_model(folder).named_parameters())


# -- folders that are refused -----------------------------------------------------------------------------------------


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder}: not a model folder (it has no config.json)"
    (folder / "adapter_config.json").write_text("{}")
    assert refusal(folder).endswith("(it has no config.json); it is a PEFT adapter: pass its base model")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_a_config_that_is_no_json_object(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_text(text)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: not valid JSON: {reason}")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str (value: 'wide')"),
        ({"num_attention_heads": 0}, "integer modulo by zero"),
    ],
)
def test_a_config_that_transformers_refuses(folder: Path, values: dict[str, Any], reason: str) -> None:
    edit_config(folder, **values)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: transformers refuses this configuration: ")
    assert reason in message


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dtype": []}, 'dtype is []: expected a type\'s name, e.g. "bfloat16"'),
        ({"torch_dtype": 16}, 'torch_dtype is 16: expected a type\'s name, e.g. "bfloat16"'),
        ({"model_type": {}}, "model_type is {}: expected a family's name"),
        ({"quantization_config": 3}, "quantization_config is 3: expected an object"),
        (
            {"quantization_config": {"quant_method": []}},
            "quantization_config.quant_method is []: expected a method's name",
        ),
        ({"text_config": "x" * 99}, f"text_config is '{'x' * 56}...: expected an object"),
        ({"auto_map": 3}, "auto_map is 3: expected an object"),
    ],
)
def test_a_field_of_the_config_of_another_type(folder: Path, values: dict[str, Any], reason: str) -> None:
    edit_config(folder, **values)
    assert refusal(folder) == f"{folder / 'config.json'}: {reason}"


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder}: no weights in this folder; expected *.safetensors beside config.json"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickled_weights_are_never_read(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    message = refusal(folder)
    assert message == (
        f"{folder}: its weights are pickled ({name}), which can run code when loaded; "
        "only safetensors are read: convert them first"
    )


def test_pickled_weights_beside_safetensors_are_ignored(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    open_model(folder)


def test_a_missing_shard_of_an_index(folder: Path) -> None:
    open_model(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink()
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    assert refusal(folder) == f"{folder}: the weight files {lost.name} are missing (of those its index names)"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("{}", "weight_map is None: expected an object"),
        ("[]", "expected a JSON object"),
        ('{"weight_map": []}', "weight_map is []: expected an object"),
        ('{"weight_map": {"a": 3}}', "a is in 3: expected a file's name"),
        ('{"weight_map": {"a": ["x"]}}', "a is in ['x']: expected a file's name"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_a_damaged_index(folder: Path, text: str, reason: str) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(text)
    assert refusal(folder) == f"{index}: not an index of weight files: {reason}"


def test_an_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="zork")
    assert refusal(folder) == f"{folder}: model_type 'zork' is unknown to transformers"


def test_a_model_that_does_not_generate_text(folder: Path) -> None:
    edit_config(folder, model_type="t5")
    assert refusal(folder).startswith(f"{folder} cannot be loaded: Unrecognized configuration class")


def test_remote_code_is_refused_and_the_message_names_the_setting(folder: Path) -> None:
    edit_config(folder, model_type="zork", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    assert refusal(folder) == (
        f"{folder}: this model runs its own Python code; read it, then allow it with --set model.trust_remote_code=true"
    )
    assert not (folder / "ran").exists()


def test_remote_code_of_a_known_architecture_is_not_run(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    assert type(open_model(folder)).__module__ == "transformers.models.llama.modeling_llama"
    assert not (folder / "ran").exists()


def test_a_missing_tensor_is_refused_not_drawn_at_random(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert refusal(folder) == (
        f"{folder}: 1 weights are missing from its files and would be random (model.layers.1.mlp.up_proj.weight); "
        "the model is not complete"
    )


def test_a_config_with_more_layers_than_the_weights(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    message = refusal(folder)
    assert f"{folder}: 9 weights are missing from its files and would be random (model.layers.2." in message
    assert ", ...); the model is not complete" in message


def test_weights_of_another_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=96)
    assert refusal(folder) == (
        f"{folder}: 6 weights do not have the shape that its config.json says "
        "(model.layers.0.mlp.down_proj.weight: (32, 64) in the file, (32, 96) expected)"
    )


@pytest.mark.parametrize("size", [0, 4, 200, -1, -5000])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert refusal(folder).startswith(f"{folder} cannot be loaded: Error while deserializing header: ")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{", "not valid JSON: Expecting property name enclosed in double quotes"),
        ("tokenizer.json", "[]", "not valid JSON: expected a JSON object"),
        ("tokenizer.json", "[" * 100_000, "not valid JSON: it is nested too deeply"),
        ("tokenizer.json", "{}", "Model missing"),
        (
            "tokenizer.json",
            '{"version": "1.0", "added_tokens": [], "model": {"type": "Zork"}}',
            "data did not match any variant",
        ),
        ("tokenizer_config.json", "{", "not valid JSON: Expecting property name enclosed in double quotes"),
        ("tokenizer_config.json", "null", "not valid JSON: expected a JSON object"),
        ("tokenizer_config.json", "[" * 100_000, "not valid JSON: it is nested too deeply"),
    ],
)
def test_a_damaged_tokenizer_is_named_by_its_file(folder: Path, name: str, content: str, reason: str) -> None:
    (folder / name).write_text(content)
    message = refusal(folder)
    assert message.startswith(f"{folder / name}: the tokenizer cannot be loaded: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("compressed-tensors", "its weights are stored by compressed-tensors; install what reads them with: pip install 'tunesmith[gptq]'"),
        ("nothing-known", "cannot be loaded without a package that is not installed: no zork here"),
    ],
)  # fmt: skip
def test_a_stored_model_whose_package_is_missing(
    folder: Path, method: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("no zork here\nand more")

    if method == "compressed-tensors":  # what transformers itself looks for
        name = "transformers.quantizers.quantizer_compressed_tensors.is_compressed_tensors_available"
        monkeypatch.setattr(name, lambda: False)
    else:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    edit_config(folder, quantization_config={"quant_method": method, "format": "pack-quantized", "config_groups": {}})
    with pytest.raises(MachineError) as caught:
        open_model(folder)
    assert str(caught.value) == f"{folder}{':' if method == 'compressed-tensors' else ''} {said}"
    assert caught.value.exit_code == 3


def test_a_missing_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert refusal(folder).startswith(f"{folder}: its tokenizer cannot be loaded (there is no tokenizer.json): ")


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_that_are_nothing(tmp_path: Path, tiny_model: Path) -> None:
    assert refusal("") == "no model given; pass --model with a model folder, a .gguf file or a hub id (org/model)"
    for name in (str(tmp_path / "absent"), "./absent", "../absent", "~/absent-model", "absent", "absent.gguf", "a/b/c"):
        assert refusal(name) == f"{name}: no such model folder or .gguf file (a hub id looks like org/model)"
    weights = tiny_model / "model.safetensors"
    assert refusal(weights) == (
        f"{weights}: expected a model folder or a .gguf file, found a file of type .safetensors"
    )


def test_a_revision_of_a_folder_would_be_ignored_and_is_refused(tiny_model: Path) -> None:
    assert refusal(tiny_model, revision="main") == (
        f"model.revision is 'main', but {tiny_model} is on this disk, not on the hub; remove it"
    )


@pytest.mark.parametrize("revision", [None, "0123abc"])
def test_a_hub_id_offline_is_one_clear_line_at_once(revision: str | None) -> None:
    started = time.perf_counter()
    assert refusal("no-such-org/no-such-model", revision=revision) == (
        "no-such-org/no-such-model: no such folder here, and the hub cannot be reached; check the name or the network"
    )
    assert time.perf_counter() - started < 10, "retries would take 24"


def test_an_id_that_the_hub_would_not_take() -> None:
    assert refusal("org/a..b").startswith("org/a..b: not found on the hub, or no access to it: ")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A hub cache that knows which files of a commit there are, and has none of them."""
    folder = tmp_path / "hub" / "models--some-org--some-model"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    files = {name: {"size": 9, "blob_id": "ab"} for name in ("config.json", "tokenizer.json")}
    (folder / "trees").mkdir()
    (folder / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    return tmp_path


def found_without_a_hub(cache: Path, revision: str | None) -> tuple[str, float, str]:
    """What `find_model` comes to where nothing answers, after how many seconds, and what it prints."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing listens on the discard port
        "HF_HOME": str(cache),
        "NO_PROXY": "127.0.0.1",
    }
    script = (
        "import sys, time\n"
        "from tunesmith.config import ModelConfig\n"
        "from tunesmith.models.load import find_model\n"
        "started = time.perf_counter()\n"
        f"try: found = find_model(ModelConfig(name='some-org/some-model', revision={revision!r})).path\n"
        "except Exception as error: found = f'{type(error).__name__}: {error}'\n"
        "print(found, time.perf_counter() - started, sep='|')"
    )
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    found, seconds = result.stdout.strip().split("|")
    return found, float(seconds), result.stderr


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("revision", [None, COMMIT])
def test_an_unreachable_hub_is_one_clear_line_at_once(
    hub_cache: Path, tmp_path: Path, revision: str | None, known: bool
) -> None:
    """Of a commit too, whose files are asked for at once: huggingface_hub would warn and try again for 24 seconds."""
    found, seconds, said = found_without_a_hub(hub_cache if known else tmp_path / "empty", revision)
    assert found == (
        "ModelError: some-org/some-model: no such folder here, and the hub cannot be reached; check the name or the network"
    )
    assert seconds < 20, "1 s on a quiet machine; its own retries would take 24"
    assert said == ""


def test_what_is_in_the_cache_needs_no_hub(hub_cache: Path, tiny_model: Path) -> None:
    snapshot = hub_cache / "hub" / "models--some-org--some-model" / "snapshots" / COMMIT
    shutil.copytree(tiny_model, snapshot, dirs_exist_ok=True)
    found, seconds, said = found_without_a_hub(hub_cache, COMMIT)
    assert (found, said) == (str(snapshot), "")
    assert seconds < 20, "1 s on a quiet machine; its own retries would take 24"


def test_a_hub_that_is_lost_on_the_way_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    import huggingface_hub

    def snapshot_download(name: str, **settings: Any) -> str:
        raise httpx.ReadError("the connection was reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert refusal("some-org/some-model") == (
        "some-org/some-model: no such folder here, and the hub cannot be reached; check the name or the network"
    )


HUB_FILES = [
    "README.md",
    "code.py",
    "config.json",
    "consolidated.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "onnx/model.safetensors",
    "original/consolidated.00.pth",
    "original/model.safetensors",
    "pytorch_model.bin",
    "tokenizer.json",
]
SMALL = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_fetched_from_the_hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool) -> None:
    """First the small files, then the weights that transformers reads; code only where it may run."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    fetched: list[list[str]] = []

    def snapshot_download(name: str, revision: str | None, local_files_only: bool, **patterns: list[str]) -> str:
        assert (name, revision, local_files_only) == ("org/model", "main", False)
        fetched.append(list(filter_repo_objects(HUB_FILES, **patterns)))
        return str(tiny_model)

    monkeypatch.setattr(load, "why_unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    config = ModelConfig(name="org/model", revision="main", trust_remote_code=trusted)
    assert fetch_weights(find_model(config), config).path == tiny_model
    code = ["code.py"] if trusted else []
    assert fetched == [sorted(SMALL + code), sorted(SMALL + WEIGHTS + code)]


# -- the longest sequence ---------------------------------------------------------------------------------------------


def context_of(folder: Path, **values: Any) -> int | None:
    (folder / "config.json").write_text(json.dumps(values))
    return ModelSource("some-model", folder).context_length


@pytest.mark.parametrize(
    ("value", "length"),
    [(2048, 2048), (1, 1), (10**9 - 1, 10**9 - 1), (10**9, None), (10**30, None), (0, None), (None, None)],
)
def test_the_longest_sequence_of_a_model(tmp_path: Path, value: int | None, length: int | None) -> None:
    assert context_of(tmp_path, max_position_embeddings=value) == length
    assert context_of(tmp_path, text_config={"max_position_embeddings": value}) == length


def test_a_model_that_says_nothing_of_its_longest_sequence(tmp_path: Path) -> None:
    assert context_of(tmp_path) is None
    assert context_of(tmp_path, text_config=None) is None
    assert context_of(tmp_path, text_config=[4096]) is None
    assert context_of(tmp_path, max_position_embeddings=4096, text_config={"max_position_embeddings": 64}) == 4096


@pytest.mark.parametrize("value", ["2048", "many", -1, True, 2048.5, 1e30, [2048], {"a": 1}])
def test_a_longest_sequence_that_is_no_number_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ModelError) as caught:
        context_of(tmp_path, max_position_embeddings=value)
    assert str(caught.value) == (
        f"{tmp_path / 'config.json'}: max_position_embeddings is {value!r}: expected a whole number without quotes, or null"
    )


# -- the hash of the weights ------------------------------------------------------------------------------------------


def source_of(folder: Path) -> ModelSource:
    return ModelSource(str(folder), folder)


def test_the_weight_hash_is_that_of_the_content(folder: Path, tiny_model: Path) -> None:
    first = weight_hash(source_of(folder))
    assert len(first) == 64
    assert weight_hash(source_of(tiny_model)) == first  # a copy elsewhere
    edit_config(folder, note="another config")
    assert weight_hash(source_of(folder)) == first
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert weight_hash(source_of(folder)) != first


def test_the_weight_hash_depends_on_the_names_of_the_files(folder: Path) -> None:
    first = weight_hash(source_of(folder))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert weight_hash(source_of(folder)) != first


def test_a_file_is_hashed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []
    real = load.sha256_file
    monkeypatch.setattr(load, "sha256_file", lambda path: read.append(path) or real(path))
    first = weight_hash(source_of(folder))
    assert weight_hash(source_of(folder)) == first
    assert read == [folder / "model.safetensors"]
    (tmp_path / "cache" / "hashes.json").write_text("damaged")
    assert weight_hash(source_of(folder)) == first
    assert len(read) == 2


def test_a_hub_file_is_known_by_the_name_of_its_blob(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weight_hash(source_of(folder))
    blob = tmp_path / load.sha256_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    monkeypatch.setattr(load, "sha256_file", lambda path: pytest.fail(f"{path} was read"))
    assert weight_hash(source_of(folder)) == expected


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weight_hash(source_of(folder))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "file" / "cache"))
    assert weight_hash(source_of(folder)) == expected


def test_a_full_disk_under_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weight_hash(source_of(folder))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert weight_hash(source_of(folder)) == expected
    assert list((tmp_path / "cache").iterdir()) == []


def test_weights_that_are_never_loaded_are_not_hashed(folder: Path) -> None:
    expected = weight_hash(source_of(folder))
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert weight_hash(source_of(folder)) == expected


# -- quantized bases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_a_quantized_base_holds_its_linear_layers_in_four_bits(tmp_path: Path, scheme: str) -> None:
    base = make_tiny_model(tmp_path / "base", hidden=64)
    config = ModelConfig(name=str(base))
    model = load_model(find_model(config), config, CPU, "fp32", QuantizationConfig(scheme=scheme, double_quant=False))
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert (weight.dtype, weight.numel()) == (torch.uint8, 64 * 64 // 2)
    assert (weight.quant_state.quant_type, weight.quant_state.nested) == (scheme, False)
    assert model.lm_head.weight.dtype == torch.float32
    # Rounding to 16 levels a block of 64 costs about a tenth of the weights' norm, never much more.
    from bitsandbytes.functional import dequantize_4bit

    exact = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    error = (dequantize_4bit(weight.data, weight.quant_state) - exact).norm() / exact.norm()
    assert 0.02 < error < 0.15


def test_without_bitsandbytes_the_message_says_what_to_install(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = ModelConfig(name=str(tiny_model))
    with pytest.raises(MachineError) as caught:
        load_model(find_model(config), config, CPU, "fp32", QuantizationConfig())
    assert str(caught.value) == (
        "method qlora needs bitsandbytes; install it with: pip install 'tunesmith[quantization]'"
    )


# -- GGUF -------------------------------------------------------------------------------------------------------------

MERGES = [("h", "e"), ("l", "l"), ("i", "n")]


def write_gguf(path: Path, folder: Path) -> Path:
    """The Llama model in `folder` as a GGUF file, in fp32."""
    import gguf
    import numpy as np
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    pieces = {number: piece for piece, number in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([pieces.get(number, f"[UNUSED{number}]") for number in range(config.vocab_size)])
    control, normal, unused = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED
    specials = tokenizer.added_tokens_decoder
    writer.add_token_types(
        [control if n in specials else normal if n in pieces else unused for n in range(config.vocab_size)]
    )
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        rows = tensor.shape[0]
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the two halves of each head for its RoPE
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.view(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(rows, -1)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_and_original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    original = make_tiny_model(folder / "original", tokenizer=make_tokenizer(merges=MERGES))
    tensors = load_file(original / "model.safetensors")  # values that bf16 holds exactly: the conversion stores bf16
    save_file({n: t.bfloat16().float() for n, t in tensors.items()}, original / "model.safetensors", {"format": "pt"})
    return write_gguf(folder / "tiny.gguf", original), original


def test_a_gguf_file_becomes_the_model_it_was_made_from(gguf_and_original: tuple[Path, Path]) -> None:
    file, original = gguf_and_original
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(open_model(file)(ids).logits, open_model(original)(ids).logits)
    config = ModelConfig(name=str(file))
    ours, theirs = (load_tokenizer(find_model(ModelConfig(name=str(path))), config) for path in (file, original))
    text = "<|im_start|>user\nhello in the hall , here's 오늘 . end!<|im_end|>\n"
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == text
    assert ours.chat_template == CHATML
    # transformers alone gives the end token the name of the first one.
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<|im_start|>", "<|im_end|>", "<|pad|>")


def test_a_gguf_file_is_converted_once_by_its_content(
    gguf_and_original: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = gguf_and_original
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    first = find_model(ModelConfig(name=str(file)))
    digest = load.sha256_file(file)
    assert first.path.parent == tmp_path / "cache" / "models"
    assert first.path.name.startswith(f"tiny-{digest[:16]}-")
    assert first.name == str(file)
    (first.path / "seen").write_text("")  # would vanish in a second conversion
    copy = tmp_path / "tiny.gguf"
    copy.write_bytes(file.read_bytes())
    assert find_model(ModelConfig(name=str(copy))).path == first.path
    assert (first.path / "seen").exists()
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    copy.write_bytes(data)
    assert find_model(ModelConfig(name=str(copy))).path != first.path


def test_a_conversion_that_another_process_finished_first_is_kept(
    gguf_and_original: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look for the folder and our own, another one converts the file and begins to read: it goes on reading."""
    from transformers import PreTrainedTokenizerBase

    file, _ = gguf_and_original
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    write, seen = PreTrainedTokenizerBase.save_pretrained, []

    def overtaken(tokenizer: Any, folder: Path, **options: Any) -> Any:
        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", write)
        theirs = find_model(ModelConfig(name=str(file))).path
        seen.append((theirs, theirs.stat().st_ino))
        return write(tokenizer, folder, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", overtaken)
    ours = find_model(ModelConfig(name=str(file))).path
    assert seen == [(ours, ours.stat().st_ino)]
    assert [path.name for path in ours.parent.iterdir()] == [ours.name], "nothing is left of the second conversion"


LOADS_AGAIN_AND_AGAIN = """
import os, sys
from pathlib import Path
from tunesmith.config import ModelConfig
from tunesmith.hardware import probe
from tunesmith.models.load import find_model, load_model, load_tokenizer
import transformers.models.llama.modeling_llama
config = ModelConfig(name=sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(8):
    source = find_model(config)
    load_tokenizer(source, config)
    load_model(source, config, probe("cpu"), "fp32")
print(source.path.stat().st_ino)
"""


def test_processes_that_load_the_same_gguf_file_at_once(gguf_and_original: tuple[Path, Path], tmp_path: Path) -> None:
    environment = os.environ | {"TUNESMITH_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LOADS_AGAIN_AND_AGAIN, str(gguf_and_original[0])]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outcomes
    assert len({text for text, _ in outcomes}) == 1, "one folder, and all of them saw it to the end"
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 1


@pytest.mark.parametrize("size", [0, 6, 30, 500, 5000, 20000, -100])
def test_a_truncated_gguf_file(
    gguf_and_original: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_and_original[0].read_bytes()[:size])
    assert refusal(cut).startswith(f"{cut}: transformers cannot read this GGUF file: ")
    assert list(tmp_path.glob("cache/models/*")) == []


def test_without_the_gguf_package_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MachineError, match=r"needs the gguf package; install it with: pip install 'tunesmith\[gguf\]'"):
        find_model(ModelConfig(name=str(tmp_path / "new.gguf")))
