"""Nothing goes to the hub that was made of other weights than the run has now, or changed since it was verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hub_runs import BASE, NAME, flip, parts, quantize, record_texts, shard, train_on
from stub_hub import StubHub, write_gguf
from trained import tiny_base
from tunesmith import api
from tunesmith.errors import ModelError, RunError, VerificationError
from tunesmith.registry.records import adapter_hash
from tunesmith.workflows.push import push

# -- of which adapter it is -------------------------------------------------------------------------------------------


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


# -- damage after verification ----------------------------------------------------------------------------------------


NOT_VERIFIED = (
    r"verified \(recorded \w{{4,12}}, found \w{{4,12}}\); nothing was uploaded; remove it, and {}: `tunesmith "
)


def test_a_merged_model_that_changed_since_it_was_verified_is_refused(run: Path, hub: StubHub) -> None:
    api.merge(run)
    merged = run / "merged"
    again = NOT_VERIFIED.format("merge again")
    for name in ("model.safetensors", "chat_template.jinja", "tokenizer.json", "config.json", "generation_config.json"):
        before = (merged / name).read_bytes()
        if name == "model.safetensors":
            flip(merged / name)
        else:
            (merged / name).write_bytes(before + b" ")
        what = (
            "its weights are damaged, not those that were"
            if name == "model.safetensors"
            else "is not the file that was"
        )
        with pytest.raises(VerificationError, match=rf"merged/{name}: {what} {again}"):
            push(run, NAME, what="merged")
        (merged / name).write_bytes(before)
    (merged / "tokenizer.json").rename(merged / "gone")
    with pytest.raises(VerificationError, match=r"merged/tokenizer.json: is not the file .*, found none\)"):
        push(run, NAME, what="merged")
    (merged / "gone").rename(merged / "tokenizer.json")
    (merged / "added_tokens.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"added_tokens.json: is not the file .*\(recorded none, found"):
        push(run, NAME, what="merged")
    (merged / "added_tokens.json").unlink()
    assert hub.requests == []
    push(run, NAME, what="merged")


def test_a_quantized_model_that_changed_since_it_was_verified_is_refused(
    run: Path, hub: StubHub, tmp_path: Path
) -> None:
    folder = quantize(run, tmp_path / "gptq")
    flip(folder / "model-00002-of-00002.safetensors")
    again = NOT_VERIFIED.format("export again") + rf"export {run} --to gptq --out {folder}`"
    with pytest.raises(
        VerificationError, match=rf"00002.safetensors: its weights are damaged, not those that were {again}"
    ):
        push(run, NAME, what=str(folder))
    assert hub.requests == []


def test_a_model_whose_files_were_not_recorded_is_refused(run: Path, hub: StubHub, tmp_path: Path) -> None:
    record = shard(run) / "tunesmith.json"
    record.write_text(
        json.dumps({key: value for key, value in json.loads(record.read_text()).items() if key != "files"})
    )
    with pytest.raises(
        VerificationError, match=r"merged: its tunesmith.json has no hashes of the files that were verif"
    ):
        push(run, NAME, what="merged")
    file = write_gguf(tmp_path / "bins-q8_0.gguf", adapter_hash(run / "adapter"), sealed=False)
    with pytest.raises(
        VerificationError, match=r"q8_0.gguf: does not hold the hash of what was verified, .*`tunesmith e"
    ):
        push(run, NAME, what=str(file))
    assert hub.requests == []


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_gguf_file_that_changed_since_it_was_verified_is_refused(
    kind: str, run: Path, hub: StubHub, tmp_path: Path
) -> None:
    note = "a template"
    file = write_gguf(tmp_path / "bins-q8_0.gguf", adapter_hash(run / "adapter"), kind, note=note)
    whole = file.read_bytes()
    for content in (whole[:-9] + b"\x55" + whole[-8:], whole.replace(b"a template", b"b template")):
        file.write_bytes(content)
        with pytest.raises(
            VerificationError,
            match=r"q8_0.gguf: its weights or metadata are damaged, not those that were verified \(recorded \w{12}, found \w{12}\)",
        ):
            push(run, NAME, what=str(file))
    file.write_bytes(whole[:-30])
    with pytest.raises((VerificationError, ModelError), match=r"q8_0.gguf: (its weights|not a whole GGUF file)"):
        push(run, NAME, what=str(file))
    assert hub.requests == []
    file.write_bytes(whole)
    push(run, NAME, what=str(file))


def test_an_adapter_whose_config_was_changed_is_refused(run: Path, hub: StubHub) -> None:
    path = run / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 999}))
    with pytest.raises(VerificationError, match=r"adapter_config.json: is not what training wrote: lora_alpha 999"):
        push(run, NAME)
    assert hub.requests == []


def test_another_template_or_tokenizer_beside_an_adapter_is_refused(run: Path, hub: StubHub) -> None:
    template = run / "adapter" / "chat_template.jinja"
    before = template.read_bytes()
    template.write_text("{{ messages }}")
    with pytest.raises(
        VerificationError, match=r"adapter/chat_template.jinja: is not the chat template that the run was"
    ):
        push(run, NAME)
    template.unlink()
    with pytest.raises(
        VerificationError, match=r"chat_template.jinja: is not the chat .*, found none\); nothing was upl"
    ):
        push(run, NAME)
    template.write_bytes(before)
    (run / "adapter" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        VerificationError, match=r"adapter: the tokenizer in it is not .* training wrote \(recorded none,"
    ):
        push(run, NAME)
    assert hub.requests == []
    record_texts(run)
    push(run, NAME)
    (run / "adapter" / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    with pytest.raises(VerificationError, match=r"adapter: the tokenizer in it is not the one that training wrote"):
        push(run, NAME)


def test_no_folder_is_to_be_removed_that_no_merge_made(
    run: Path, hub: StubHub, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.raises(ModelError, match=r"not a model's folder") as caught:
        push(run, NAME, what=str(tmp_path))
    assert "remove it" not in str(caught.value)
    with pytest.raises(
        VerificationError, match=r"does not say .* merge again into a folder that is not there"
    ) as other:
        push(run, NAME, what=str(tiny_base(tmp_path_factory)))
    assert "remove it" not in str(other.value)
    assert hub.requests == []
