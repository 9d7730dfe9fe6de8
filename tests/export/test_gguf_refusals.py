"""What a GGUF export refuses: files that are not what they should be, models that GGUF cannot hold, places that are taken."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_models import family, sentencepiece
from tiny import make_tiny_model
from tunesmith.errors import ConfigError, MachineError, ModelError, RunError, VerificationError
from tunesmith.workflows import export_gguf as workflow
from tunesmith.workflows.export import export

# -- refusals ----------------------------------------------------------------------------------------------------------


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Have the export write other weights than the source's: what `change` makes of them."""
    plain = workflow.write_model
    monkeypatch.setattr(workflow, "write_model", lambda path, state, *others: plain(path, change(dict(state)), *others))


def test_a_file_with_other_weights_is_not_kept(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights spoiled behind the source's back: nothing stays, and the error says where."""
    name = "model.layers.1.mlp.down_proj.weight"
    spoil(monkeypatch, lambda state: {**state, name: state[name].flip(0)})
    with pytest.raises(
        VerificationError, match=r"down_proj.weight: the file does not hold the source's weights: .*nothing was kept"
    ):
        export(models("llama"), "gguf:q8_0", tmp_path / "out" / "deeper", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_k_m", "q2_k"])
def test_the_base_without_the_adapter_is_not_kept(
    kind: str, gguf_run: Path, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug of others: the base's weights under the adapter's name. As the file's, and as the merged model's."""
    base = state_of(models("llama"))
    with monkeypatch.context() as patch:
        spoil(patch, lambda state: base)
        with pytest.raises(VerificationError, match="the file does not hold the source's weights"):
            export(gguf_run, f"gguf:{kind}", tmp_path / "a.gguf", device="cpu")
    monkeypatch.setattr(workflow, "merge", lambda target, out, **_: shutil.copytree(models("llama"), out))
    with pytest.raises(VerificationError, match=r"merged model does not compute what base . adapter do"):
        export(gguf_run, f"gguf:{kind}", tmp_path / "a.gguf", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_written_wrong_is_not_kept(
    gguf_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.export import gguf as writer

    for wrong in (lambda settings, module, rank: 0.0, lambda settings, module, rank: 2.0):
        with monkeypatch.context() as patch:
            patch.setattr(writer, "_scale", wrong)
            with pytest.raises(
                VerificationError, match=r"base and adapter in llama.cpp do not .* changes .*nothing was"
            ):
                export(gguf_run, "gguf:q8_0", tmp_path / "a.gguf", lora=True, device="cpu")
    monkeypatch.setattr(writer, "as_stored", lambda name, tensor, found: tensor)  # rows of q and k in the wrong order
    with pytest.raises(VerificationError, match=r"base and adapter in llama.cpp do not"):
        export(gguf_run, "gguf:f16", tmp_path / "a.gguf", lora=True, device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f16", "q2_k"])
def test_rows_that_are_written_in_another_order_than_they_are_read_are_noticed(
    kind: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp computes from the file what the source does with the weights that are read back: other ones than the source's."""
    from tunesmith.export import gguf_architectures

    monkeypatch.setattr(gguf_architectures, "pair_rows", lambda tensor, heads: tensor)
    with pytest.raises(VerificationError, match=r"[qk]_proj.weight: the file does not hold the source's weights"):
        export(models("llama"), f"gguf:{kind}", tmp_path / "a.gguf", device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f16", "q4_k_m", "q2_k"])
@pytest.mark.parametrize("fault", ["order", "rotation", "epsilon"])
def test_what_llama_cpp_would_compute_wrong_is_seen_in_every_type(
    kind: str, fault: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of q and k left in transformers' order (and read back so); RoPE with another base; another epsilon in the norms."""
    from tunesmith.export import gguf as writer
    from tunesmith.export import gguf_reading as reading

    if fault == "order":
        for module in (writer, reading):
            monkeypatch.setattr(module, "as_stored", lambda name, tensor, found: tensor, raising=False)
        monkeypatch.setattr(
            writer,
            "tensors",
            lambda state, found: (
                (translated(name, found), tensor) for name, tensor in state.items() if name != "lm_head.weight"
            ),
        )
        monkeypatch.setattr(reading, "as_read", lambda name, tensor, found: tensor)
    else:
        key, factor = ("rope.freq_base", 3.0) if fault == "rotation" else ("attention.layer_norm_rms_epsilon", 1e5)
        plain = writer.describe

        def changed(config: Any) -> Any:
            found = plain(config)
            found.keys[key] *= factor
            return found

        monkeypatch.setattr(writer, "describe", changed)
    with pytest.raises(
        VerificationError, match=rf"{kind}: llama.cpp does not compute .* own weights: KL .*nothing was"
    ):
        export(models("llama"), f"gguf:{kind}", tmp_path / "a.gguf", device="cpu")
    assert list(tmp_path.iterdir()) == []


def translated(name: str, found: Any) -> str:
    from tunesmith.export.gguf_architectures import tensor_names, translate

    return translate(name, tensor_names(found), found)


def test_a_type_whose_error_hides_the_training_is_said(models: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from adapters_of import plain

    adapter = get_peft_model(plain(models("llama")), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"]))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.ones_like(parameter))
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    result = export(tmp_path / "adapter", "gguf:f16,q2_k", tmp_path / "out", device="cpu")
    fine, coarse = result["files"]
    assert fine["kl"] < 0.1 * result["effect"] < result["effect"] < coarse["kl"]
    assert fine["warning"] is None
    said = (
        rf"q2_k: this type's error \(\S+ nats a token\) is larger than what training changed \({result['effect']:.2g}\)"
    )
    assert re.match(said, coarse["warning"])
    assert result["notes"] == [coarse["warning"]]


def test_what_was_there_before_stays_and_nothing_else(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure after the files were written, when the second one is moved into its place: the first goes again too."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    plain = Path.replace

    def full(self: Path, target: Path) -> Path:
        if str(target).endswith("q8_0.Modelfile"):
            raise OSError(28, "No space left on device")
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(MachineError, match="no space left on the disk"):
        export(models("llama"), "gguf:f16,q8_0", out, device="cpu")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    monkeypatch.undo()
    with pytest.raises(ModelError, match="there is no adapter to write"):
        export(models("llama"), "gguf:f16", tmp_path / "a" / "b" / "c.gguf", lora=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_cleared_by_the_next(models: Any, tmp_path: Path) -> None:
    import signal
    import subprocess
    import sys
    import time

    code = "import sys; from tunesmith.workflows.export import export; export(sys.argv[1], 'gguf:f16,q8_0,q4_0', sys.argv[2], device='cpu')"
    with subprocess.Popen([sys.executable, "-c", code, str(models("llama")), str(tmp_path)]) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob(".tmp-*/*q8_0.gguf")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("*.gguf")) == []
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    export(models("llama"), "gguf:f16", tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-f16.Modelfile", "llama-f16.gguf"]


def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    shape = family("gemma2")
    folder = make_tiny_model(tmp_path / "a", **{**shape, "query_pre_attn_scalar": 32})
    with pytest.raises(ModelError, match=r"query_pre_attn_scalar is 32: llama.cpp scales by 16"):
        export(folder, "gguf:f16", device="cpu")
    folder = make_tiny_model(
        tmp_path / "b", family="smollm3", hidden=64, vocab=800, tokenizer=family("llama")["tokenizer"]
    )
    with pytest.raises(ModelError, match="model_type 'smollm3' cannot be exported"):
        export(folder, "gguf:f16", device="cpu")
    folder = make_tiny_model(tmp_path / "c", **{**family("llama"), "hidden_act": "relu"})
    with pytest.raises(ModelError, match=r"hidden_act is 'relu': llama.cpp computes silu"):
        export(folder, "gguf:f16", device="cpu")


def test_wrong_requests_name_what_is_right(models: Any, tmp_path: Path) -> None:
    folder = models("llama")
    with pytest.raises(ConfigError, match=r"gguf:q9: no such type; expected one of f32, f16"):
        export(folder, "gguf:q9")
    with pytest.raises(ConfigError, match=r"--to onnx: expected gguf:TYPE"):
        export(folder, "onnx")
    with pytest.raises(ConfigError, match="is one file, and 2 types"):
        export(folder, "gguf:f16,q8_0", tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="there is no adapter to write"):
        export(folder, "gguf:f16", tmp_path, lora=True)
    (tmp_path / "b.gguf").touch()
    with pytest.raises(RunError, match="already there"):
        export(folder, "gguf:f16", tmp_path / "b.gguf")


def test_a_window_that_llama_cpp_does_not_have_is_said(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m", **{**family("mistral"), "sliding_window": 128})
    result = export(folder, "gguf:f16", device="cpu")
    assert result["notes"] == [
        "the model looks back 128 tokens, llama.cpp at everything: the same up to 128 tokens of context, not beyond"
    ]


def test_a_space_before_the_first_text_only(tmp_path: Path) -> None:
    """Mistral v0.3's way: prompts begin with a control token, so they are exact; of plain text it is said."""
    shape = family("mistral")
    tokenizer = sentencepiece("first", shape["tokenizer"].chat_template)
    result = export(make_tiny_model(tmp_path / "m", **{**shape, "tokenizer": tokenizer}), "gguf:f16", device="cpu")
    assert result["notes"] == [
        "plain text that begins without a control token is read without the space that the tokenizer puts first"
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(
            (name, text)
            for name in ("config.json", "generation_config.json")
            for text in ("", "null", "[]", "3", '{"a":')
        ),
        ("generation_config.json", '{"eos_token_id": [null]}'),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("config.json", {"num_key_value_heads": -1}),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", '{"weight_map": 3}'),
    ],
)
def test_damaged_files_are_named_in_one_line(name: str, content: Any, models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(models("llama"), folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content)
    (folder / name).write_text(content)
    with pytest.raises(ModelError) as found:
        export(folder, "gguf:f16", tmp_path / "out", device="cpu")
    assert name in str(found.value)
    assert "\n" not in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
