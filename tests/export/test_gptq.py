"""4-bit models: GPTQ does what round-to-nearest does not, transformers loads what was computed, and damage is found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from stub_hub import stub_hub
from tiny import chat_rows, make_tiny_gemma3, make_tiny_model, write_jsonl
from trained import tiny_base, tiny_run
from tunesmith.data.chat import ChatFormat
from tunesmith.errors import ConfigError, DataError, ModelError, RunError, VerificationError
from tunesmith.export import agreement, compressed
from tunesmith.export.calibration import MEASURED_TOKENS, encode, leave_out, measurable
from tunesmith.registry.records import adapter_hash, merged_from
from tunesmith.types import Example, Message
from tunesmith.workflows import export_quantized as workflow
from tunesmith.workflows.export import export
from tunesmith.workflows.push import push

WIDE = {"hidden": 128, "vocab": 320}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 16,
    "kv_heads": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("gptq") / "tiny", **WIDE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("gptq-data") / "rows.jsonl", chat_rows(200))


@pytest.fixture(scope="module")
def exported(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model by GPTQ, made once; copy it to change it."""
    out = tmp_path_factory.mktemp("gptq-out") / "model"
    return out, export(model, "gptq", out, data=data, device="cpu")


def plain(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def rows_of(model: Path, number: int = 48, seed: int = 1) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [row["messages"] for row in chat_rows(number, seed)]
    return [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]


def quantized(model: Path, folder: Path, rows: Sequence[Sequence[int]], steps: Any = None) -> Any:
    """The model quantized on `rows`, by GPTQ or by `steps` (a function of the plan), written and loaded by transformers."""
    source = plain(model)
    found = compressed.plan(source, "tiny")
    compressed.calibrate(source, steps(found) if steps else compressed.modifiers("gptq", found), rows)
    compressed.write(source, found, folder)
    return plain(folder)


def to_nearest(bits: int = 4, symmetric: bool = True) -> Any:
    """llmcompressor's steps for rounding without a look at the inputs."""

    def steps(found: compressed.Plan) -> list[Any]:
        with compressed.quiet():
            from llmcompressor.modifiers.quantization import QuantizationModifier

            weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
            groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": found.group_size}}}
            return [QuantizationModifier(config_groups=groups, ignore=[found.head])]

    return steps


# -- what GPTQ does ----------------------------------------------------------------------------------------------------


def test_gptq_beats_rounding_to_nearest_on_rows_that_neither_saw(model: Path, tmp_path: Path) -> None:
    rows = rows_of(model)
    expected = agreement.reference(plain(model), rows_of(model, 24, seed=7))
    gptq = agreement.compare(quantized(model, tmp_path / "gptq", rows), expected)
    nearest = agreement.compare(quantized(model, tmp_path / "nearest", rows, to_nearest()), expected)
    assert 0 < gptq.kl < 0.3 * nearest.kl  # 0.010 and 0.099
    assert gptq.top1 > nearest.top1


def test_the_calibration_rows_decide_the_weights(model: Path, tmp_path: Path) -> None:
    first = quantized(model, tmp_path / "first", rows_of(model))
    again = quantized(model, tmp_path / "again", rows_of(model))
    letters = [[97 + (7 * i + j) % 26 for j in range(40)] for i in range(48)]
    other = quantized(model, tmp_path / "other", letters)
    for each in (first, again, other):
        each(torch.tensor([[0]]))  # unpacked at the first forward
    path = "model.layers.1.mlp.down_proj"
    weights = [each.get_submodule(path).weight for each in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).float().mean() > 0.05


def test_awq_scales_help_over_rounding_to_nearest(model: Path, data: Path, tmp_path: Path) -> None:
    result = export(model, "awq", tmp_path / "awq", data=data, calibration_rows=16, device="cpu")
    (row,) = result["files"]
    tensors = load(tmp_path / "awq")
    assert tensors["model.layers.0.mlp.up_proj.weight_zero_point"].dtype == torch.int32
    # The scales that AWQ took out of the inputs went into the norm before them.
    source = load(model)
    assert not torch.equal(
        tensors["model.layers.0.post_attention_layernorm.weight"].float(),
        source["model.layers.0.post_attention_layernorm.weight"].bfloat16().float(),
    )
    assert 0 < row["kl"] < 0.3


def load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("phi3", {}),
        ("smollm3", {}),
        ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 64}),
        ("deepseek_v2", DEEPSEEK),
    ],
)
def test_families(family: str, settings: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """The written folder, loaded by transformers alone, computes nearly what the source does; every matrix is packed."""
    source = make_tiny_model(tmp_path / "m", family=family, **WIDE, **settings)
    result = export(source, "gptq", tmp_path / "q", data=data, calibration_rows=32, device="cpu")
    (row,) = result["files"]
    assert result["unquantized"] == [
        name for name in result["unquantized"] if any(part in name for part in ("embed", "lm_head", "mlp.gate.weight"))
    ]
    expected = agreement.reference(plain(source, torch.bfloat16), rows_of(source, 16, seed=9))
    assert agreement.compare(plain(tmp_path / "q", torch.bfloat16), expected).kl < 0.06
    assert row["group_size"] == (64 if settings else 128)
    assert sum(name.endswith("weight_packed") for name in load(tmp_path / "q")) >= 8


def test_unpacked_values_are_codes_times_scales(exported: tuple[Path, dict[str, Any]]) -> None:
    """Eight codes of four bits in an int32, the lowest first, each 8 more than its value; one scale for 128 inputs."""
    folder, result = exported
    tensors, path = load(folder), "model.layers.0.mlp.down_proj"
    packed, scale = tensors[f"{path}.weight_packed"], tensors[f"{path}.weight_scale"]
    codes = torch.stack([(packed >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(1) - 8
    expected = codes.to(scale.dtype) * scale.repeat_interleave(128, dim=1)
    back = plain(folder, torch.bfloat16)
    back(torch.tensor([[0]]))
    assert torch.equal(back.get_submodule(path).weight, expected)
    assert result["files"][0]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert packed.shape == (128, 32)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(
        tmp_path_factory,
        "lora",
        **{
            "model.name": str(tiny_base(tmp_path_factory, 64)),
            "data.eval_fraction": 0.3,
            "optimizer.lr": 2e-2,
            "data.max_rows": 15,
        },
    )


def seen_by(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """The rows that calibration and measurement get, as they get them."""
    calibration: list[Any] = []
    measured: list[Any] = []
    real_calibrate, real_reference = workflow.calibrate, agreement.reference

    def calibrate(model: Any, steps: Any, rows: Any, progress: Any) -> list[str]:
        calibration.extend(rows)
        return real_calibrate(model, steps, rows, progress)

    def reference(model: Any, rows: Any, *progress: Any) -> Any:
        measured.extend(rows)
        return real_reference(model, rows, *progress)

    monkeypatch.setattr(workflow, "calibrate", calibrate)
    monkeypatch.setattr(agreement, "reference", reference)
    return calibration, measured


def test_a_run_is_merged_and_calibrated_on_its_training_rows(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.runs import RunFolder
    from tunesmith.workflows.load import load as load_run
    from tunesmith.workflows.rows import read_rows

    calibration, measured = seen_by(monkeypatch)
    result = export(run, "gptq", tmp_path / "q", device="cpu")
    loaded = load_run(run, device="cpu")
    own = read_rows(RunFolder.open(run).config)

    def texts(rows: Sequence[Any]) -> set[tuple[int, ...]]:
        return {tuple(map(int, each.input_ids)) for each in loaded.chat.encode(rows)}

    assert set(calibration) == texts(own.train)
    assert set(measured) == texts(own.eval) - set(calibration)
    assert result["measured"]["from"] == "the run's held-out rows"
    # What was trained is in the result: it is nearer to the run than the base is.
    expected = agreement.reference(loaded.forward.model.merge_and_unload(), [*measured])
    base = agreement.compare(plain(tiny_base_of(run)), expected)
    written = agreement.compare(plain(tmp_path / "q"), expected)
    assert written.kl < 0.2 * base.kl
    record = json.loads((tmp_path / "q" / "tunesmith.json").read_text())
    assert record["quantized"]["method"] == "gptq"
    assert record["quantized"]["calibration"]["rows"] == len(calibration)
    assert record["base"]["weight_hash"] == RunFolder.open(run).metadata["model"]["weight_hash"]
    assert record["adapters"][0]["sha256"] == adapter_hash(run / "adapter")


def tiny_base_of(run: Path) -> Path:
    from tunesmith.runs import RunFolder

    return Path(RunFolder.open(run).config.model.name)


def test_data_that_is_given_replaces_the_training_rows_alone(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, measured = seen_by(monkeypatch)
    result = export(run, "gptq", tmp_path / "q", data=data, calibration_rows=20, device="cpu")
    assert result["calibration"]["from"] == str(data)
    assert result["measured"]["from"] == "the run's held-out rows"
    assert 0 < len(calibration) <= 20
    assert measured
    assert not set(calibration) & set(measured)


def test_an_adapter_folder_is_merged_too(run: Path, data: Path, tmp_path: Path) -> None:
    result = export(run / "adapter", "gptq", tmp_path / "q", data=data, calibration_rows=20, device="cpu")
    assert result["measured"]["from"] == f"rows of {data} that calibration left out"
    merged = merged_from(tmp_path / "q")
    assert merged is not None
    assert merged.adapters == (adapter_hash(run / "adapter"),)


def test_what_was_exported_is_pushed_as_this_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export(run, "gptq", tmp_path / "q", device="cpu", calibration_rows=20)
    with stub_hub(monkeypatch) as hub:
        pushed = push(run, "ann/small", what=str(tmp_path / "q"), base_model="org/base")
        card = hub.files("ann/small")["README.md"].decode()
        weights = tmp_path / "q" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-3000] ^= 0x7F
        weights.write_bytes(content)
        hub.requests.clear()
        again = (
            rf"nothing was uploaded; remove it, and export again: `tunesmith export {run} --to gptq --out {tmp_path}/q`"
        )
        with pytest.raises(
            VerificationError, match=rf"model.safetensors: its weights are damaged, not those .*{again}"
        ):
            push(run, "ann/small", what=str(tmp_path / "q"), base_model="org/base")
        assert hub.requests == []
    assert pushed["what"] == "quantized"
    row = exported["files"][0]
    assert f"KL {row['kl']:.4g}, the same likeliest token in {row['top1']:.1%} of places, perplexity" in card


def test_a_run_without_held_out_rows_says_what_it_is_measured_on(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path_factory, "lora", **{"model.name": str(tiny_base(tmp_path_factory, 64))})
    calibration, measured = seen_by(monkeypatch)
    result = export(run, "gptq", tmp_path / "q", device="cpu")
    assert "the run held no rows out: perplexity is that of rows that it was trained on" in result["notes"]
    assert measured
    assert not set(calibration) & set(measured)


def test_a_text_tower_is_written_as_the_text_model_that_it_is(data: Path, tmp_path: Path) -> None:
    whole = make_tiny_gemma3(tmp_path)
    export(whole, "gptq", tmp_path / "q", data=data, calibration_rows=16, device="cpu")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["model_type"] == "gemma3_text"
    assert sorted(path.name for path in (tmp_path / "q").iterdir() if path.is_dir()) == []
    plain(tmp_path / "q")


# -- what is chosen ----------------------------------------------------------------------------------------------------


def test_groups_of_64_where_a_width_is_no_multiple_of_128(tmp_path: Path) -> None:
    narrow = make_tiny_model(tmp_path / "m", hidden=64)  # and 128 inputs of down_proj
    found = compressed.plan(plain(narrow), "tiny")
    assert (found.group_size, found.why) == (
        64,
        "gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj: 64 inputs, no multiple of 128",
    )
    assert found.layers["model.layers.1.mlp.down_proj"] == 128
    assert "lm_head" not in found.layers


def test_widths_that_no_group_fits_are_refused(data: Path, tmp_path: Path) -> None:
    odd = make_tiny_model(tmp_path / "m", hidden=96)
    with pytest.raises(ModelError, match=r"q_proj, up_proj, v_proj: 96 inputs, no multiple of 64; a scale stands for"):
        export(odd, "gptq", tmp_path / "q", data=data, device="cpu")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("family", "settings", "to", "message"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, "gptq", "mixture of experts of type mixtral"),
        ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 64}, "gptq,awq", "does not load experts with zero points"),
        ("gpt2", {"n_embd": 128, "n_layer": 2, "n_head": 4}, "gptq", "most of its matrices are no linear layers"),
    ],
)
def test_models_that_would_stay_in_16_bits_are_refused(
    family: str, settings: dict[str, Any], to: str, message: str, data: Path, tmp_path: Path
) -> None:
    source = make_tiny_model(tmp_path / "m", family=family, **WIDE, **settings)
    with pytest.raises(ModelError, match=message):
        export(source, to, tmp_path / "q", data=data, device="cpu")
    assert not (tmp_path / "q").exists()


def test_wrong_requests(
    model: Path, data: Path, exported: tuple[Path, dict[str, Any]], run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="pass --data FILE with rows of the kind"):
        export(model, "gptq", tmp_path / "q", device="cpu")
    with pytest.raises(ConfigError, match="--calibration-rows 0: expected 1 or more"):
        export(model, "gptq", tmp_path / "q", data=data, calibration_rows=0, device="cpu")
    with pytest.raises(ModelError, match="its weights are quantized already"):
        export(exported[0], "gptq", tmp_path / "q", data=data, device="cpu")
    with pytest.raises(RunError, match="exists already"):
        export(model, "gptq", exported[0], data=data, device="cpu")
    with pytest.raises(ConfigError, match="'int3' is no 4-bit method"):
        export(model, "gptq,int3", tmp_path / "q", data=data, device="cpu")
    one = write_jsonl(tmp_path / "one.jsonl", chat_rows(1) * 5)
    with pytest.raises(DataError, match="5 rows, which cannot be parted"):
        export(model, "gptq", tmp_path / "q", data=one, device="cpu")
    moved = tmp_path / "run"
    copy_without_data(run, moved)
    with pytest.raises(DataError, match="pass --data FILE to calibrate on other rows"):
        export(moved, "gptq", tmp_path / "q", device="cpu")


def copy_without_data(run: Path, to: Path) -> None:
    import shutil

    shutil.copytree(run, to)
    config = (to / "config.yaml").read_text()
    lines = [line if not line.lstrip().startswith("path: ") else "  path: gone.jsonl" for line in config.splitlines()]
    (to / "config.yaml").write_text("\n".join(lines))


# -- what is found -----------------------------------------------------------------------------------------------------


def test_one_changed_weight_is_found(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single code of four bits, which no perplexity would show."""
    from safetensors.torch import save_file

    real = compressed.compare_tensors

    def damaged(folder: Path, expected: set[str], found: compressed.Plan) -> None:
        tensors = load(folder)
        tensors["model.layers.0.mlp.up_proj.weight_packed"][3, 5] ^= 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        real(folder, expected, found)

    monkeypatch.setattr(compressed, "compare_tensors", damaged)
    with pytest.raises(VerificationError, match=r"model.layers.0.mlp.up_proj.weight_packed is not what was computed"):
        export(model, "gptq", tmp_path / "q", data=data, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_was_left_out_is_found(exported: tuple[Path, dict[str, Any]], model: Path) -> None:
    folder, _ = exported
    found = compressed.plan(plain(model), "tiny")
    digests = {compressed._digest(tensor) for tensor in load(folder).values()}
    compressed.compare_tensors(folder, digests, found)
    more = compressed.Plan({**found.layers, "model.layers.9.mlp.up_proj": 128}, 0, 128, "", "lm_head")
    with pytest.raises(
        VerificationError, match=r"1 of 15 linear layers were not quantized \(model.layers.9.mlp.up_proj\)"
    ):
        compressed.compare_tensors(folder, digests, more)


def test_a_result_that_is_too_far_off_is_not_kept(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "modifiers", lambda method, found: to_nearest(bits=2)(found))
    with pytest.raises(
        VerificationError, match=r"perplexity is [\d.]+ where the source's is .* KL [\d.]+ nats a token"
    ):
        export(model, "gptq", tmp_path / "q", data=data, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_two_methods_are_kept_together_or_not_at_all(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(workflow.MAX_KL, "awq", 0.0)
    with pytest.raises(VerificationError, match="awq: "):
        export(model, "gptq,awq", tmp_path / "both", data=data, calibration_rows=8, device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("chat_template.jinja", "<|im_end|>", "<|end|>", "chat template renders"),
        (
            "generation_config.json",
            '"eos_token_id": 257',
            '"eos_token_id": 5',
            "generation_config.json: eos_token_id is 5 instead of 257",
        ),
        (
            "tokenizer.json",
            '"add_prefix_space": false',
            '"add_prefix_space": true',
            "its tokenizer: another pre_tokenizer",
        ),
    ],
)
def test_texts_that_come_back_otherwise_are_found(
    file: str, old: str, new: str, message: str, exported: tuple[Path, dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path / "copy"
    shutil.copytree(exported[0], folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    generation = plain(model).generation_config.to_dict()
    chat = ChatFormat(tokenizer)
    workflow._compare_texts(folder, tokenizer, chat, generation)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    with pytest.raises(VerificationError, match=message):
        workflow._compare_texts(folder, tokenizer, chat, generation)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_measured_rows_are_bounded_and_never_calibrated_on() -> None:
    rows = [tuple(range(start, start + 1000)) for start in range(9)]
    found = measurable(rows, [rows[1]])
    assert found == [rows[0], rows[2], rows[3], rows[4], rows[5][: MEASURED_TOKENS - 4000]]


def test_rows_left_out_share_no_question_with_the_others() -> None:
    rows = [
        Example((Message("user", f"question {i // 2}"), Message("assistant", f"answer {i}")), None, "f", i)
        for i in range(40)
    ]
    calibration, measured = leave_out(rows, "f")
    assert len(calibration) + len(measured) == 40
    assert 4 <= len(measured) <= 12
    assert not {row.messages[0].content for row in calibration} & {row.messages[0].content for row in measured}  # type: ignore[union-attr,index]


def test_rows_are_whole_conversations_cut_to_the_limit(model: Path) -> None:
    from transformers import AutoTokenizer

    chat = ChatFormat(AutoTokenizer.from_pretrained(model), "auto")
    row = Example((Message("user", "Hi?"), Message("assistant", "Yes.")), None, "f", 1)
    (whole,) = encode(chat, [row, row], 1000)
    assert chat.tokenizer.decode(whole) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert encode(chat, [row], 10) == [whole[:10]]


# -- the caller's process ----------------------------------------------------------------------------------------------


def test_nothing_of_the_process_is_changed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llmcompressor patches torch while it traces, talks on stdout, and sets a variable; nothing is left of it."""
    import os

    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
    from transformers.models.llama import modeling_llama

    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)

    def state() -> list[Any]:
        places = (torch, torch.nn.functional, modeling_llama, modeling_llama.LlamaForCausalLM)
        return [{key: id(value) for key, value in vars(place).items() if callable(value)} for place in places] + [
            dict(_MODEL_TO_CONVERSION_PATTERN),
            dict(os.environ),
        ]

    environment = dict(os.environ)
    quantized(model, tmp_path / "warm", rows_of(model, 4))  # imports
    assert dict(os.environ) == environment
    before = state()
    source = plain(model)
    capsys.readouterr()
    found = compressed.plan(source, "tiny")
    stages: list[tuple[str, int, int]] = []
    compressed.calibrate(
        source, compressed.modifiers("gptq", found), rows_of(model, 4), lambda *told: stages.append(told)
    )
    compressed.write(source, found, tmp_path / "q")
    assert state() == before
    assert capsys.readouterr() == ("", "")
    assert stages == [("calibrating layers", done, 2) for done in range(3)]


def test_llmcompressor_takes_a_device_that_it_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.hardware import Hardware

    compressed.refuse_device(Hardware("cuda:0", "a GPU", 80.0, True))
    with pytest.raises(ConfigError, match="run with CUDA_VISIBLE_DEVICES=1 in the environment"):
        compressed.refuse_device(Hardware("cuda:1", "a GPU", 80.0, True))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="run with CUDA_VISIBLE_DEVICES= in the environment to hide it"):
        compressed.refuse_device(Hardware("cpu", "a CPU", 8.0, True))
