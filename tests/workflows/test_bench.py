"""`tunesmith bench`: rows that can be trusted, failures that are rows, a table that fits a terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from command_line import tunesmith
from tunesmith.cli.bench import notes, summary, table
from tunesmith.errors import ConfigError, DataError, MachineError
from tunesmith.hardware import probe
from tunesmith.workflows import bench as benchmark
from tunesmith.workflows.bench import (
    CHAT_DOCUMENTS,
    RUNNERS,
    SHAPES,
    SUITES,
    Row,
    bench,
    draw_documents,
    lognormal_lengths,
    plan_rows,
    read_lengths,
)
from tunesmith.workflows.bench_check import References, compare, in_fp32
from tunesmith.workflows.bench_step import (
    build,
    documents,
    measure,
    peer_inputs,
    random_model,
    write_checkpoint,
)

TINY = Row("tunesmith", "tiny", "lora", (24, 24), steps=2, warmup=1, device="cpu", dtype="fp32")
CPU = ("--device", "cpu", "--dtype", "fp32", "--model", "tiny", "--seq", "24", "--batch", "2", "--steps", "2")


# -- which rows -------------------------------------------------------------------------------------------------------


def test_a_row_survives_its_json() -> None:
    row = Row("unsloth", "tiny", "qlora", (5, 7), packed=True, limit_gb=16, checkpointing="auto", group="g", check=True)
    assert Row.from_json(row.to_json()) == row
    assert (row.name, row.label, row.tokens) == ("g/unsloth-auto-16gb", "Unsloth, auto, 16 GB", 12)
    assert row.workload == "tiny qlora, 2 documents of 12 tokens, rank 16"
    assert replace(row, packed=False, documents=(8, 8)).workload == "tiny qlora, 2 x 8 tokens, rank 16"


def test_a_workload_has_our_modes_the_reference_and_the_installed_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "is_installed", lambda runner: runner != "liger")
    rows = plan_rows(model="smollm2-135m", method="lora", batch=3, seq=32, check=True)
    assert [row.name for row in rows] == [
        "tunesmith-auto",
        "tunesmith-fast",
        "tunesmith-min",
        "reference-auto",
        "transformers-default",
        "unsloth-default",
        "unsloth-none",
        "unsloth-auto",
    ]
    assert {(row.model, row.method, row.documents, row.packed) for row in rows} == {
        ("smollm2-135m", "lora", (32, 32, 32), False)
    }
    assert [row.check for row in rows] == [True] * 3 + [False] * 5
    chosen = plan_rows(model="tiny", method="lora", batch=1, seq=32, only=["tunesmith"], memory=["min", "7.5"])
    assert [(row.name, row.memory, row.limit_gb) for row in chosen] == [
        ("tunesmith-min", "min", None),
        ("tunesmith-auto-7.5gb", "auto", 7.5),
    ]
    chosen = plan_rows(
        model="tiny", method="lora", batch=1, seq=32, only=["reference", "transformers"], memory=["min", "7"]
    )
    assert [(row.name, row.label, row.memory) for row in chosen] == [
        ("reference-min", "reference engine min", "min"),
        ("reference-auto-7gb", "reference engine, 7 GB", "auto"),
        ("transformers-default", "transformers + PEFT", "auto"),
    ]


def test_on_the_cpu_the_defaults_are_tiny() -> None:
    (row,) = plan_rows(device="cpu", only=["tunesmith"], memory=["auto"])
    assert (row.model, row.method, row.documents, row.device) == ("tiny", "lora", (64, 64), "cpu")


def test_the_suite_holds_the_rows_of_the_results_table() -> None:
    rows = SUITES["h100"]
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    tokens = {row.group: (row.model, row.method, row.tokens, row.packed) for row in rows}
    assert tokens == {
        "8b-qlora-4x2048": ("llama-3.1-8b", "qlora", 8192, False),
        "8b-lora-4x2048": ("llama-3.1-8b", "lora", 8192, False),
        "8b-qlora-2x2048": ("llama-3.1-8b", "qlora", 4096, False),
        "8b-qlora-8x2048": ("llama-3.1-8b", "qlora", 16384, False),
        "8b-qlora-16gb": ("llama-3.1-8b", "qlora", 4096, False),
        "3b-qlora-4x1024": ("qwen2.5-3b", "qlora", 4096, False),
        "3b-qlora-8x2048": ("qwen2.5-3b", "qlora", 16384, False),
        "8b-qlora-documents": ("llama-3.1-8b", "qlora", 8192, True),
    }
    for group in tokens:
        members = {row.name.partition("/")[2] for row in rows if row.group == group}
        assert any(name.startswith("tunesmith-") for name in members)
        cap = "-16gb" if group.endswith("16gb") else ""
        assert {f"unsloth-default{cap}", f"unsloth-none{cap}", f"unsloth-auto{cap}"} <= members
    assert {row.limit_gb for row in rows if row.group == "8b-qlora-16gb"} == {16}
    assert {row.rank for row in rows} == {16}


def test_rows_are_selected_by_group_name_or_pattern() -> None:
    assert [row.name for row in plan_rows(suite="h100", select=["8b-lora-4x2048/tunesmith-min"])] == [
        "8b-lora-4x2048/tunesmith-min"
    ]
    assert {row.group for row in plan_rows(suite="h100", select=["3b-qlora-4x1024"])} == {"3b-qlora-4x1024"}
    chosen = plan_rows(suite="h100", select=["*/tunesmith-min", "8b-qlora-16gb/unsloth-*"], rank=8)
    assert {(row.runner, row.rank) for row in chosen} == {("tunesmith", 8), ("unsloth", 8)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "h200"}, "--suite is 'h200': expected one of h100"),
        (
            {"suite": "h100", "model": "tiny", "memory": ["min"]},
            "--model, --memory: the rows of a suite have their own; leave out, or leave out --suite",
        ),
        (
            {"suite": "h100", "select": ["9b"]},
            "--row '9b' matches none of 8b-qlora-4x2048, 8b-lora-4x2048, 8b-qlora-2x2048, 8b-qlora-8x2048, "
            "8b-qlora-16gb, 3b-qlora-4x1024, 3b-qlora-8x2048, 8b-qlora-documents",
        ),
        ({"model": "gpt-5"}, f"--model is 'gpt-5': expected one of {', '.join(SHAPES)}"),
        ({"method": "full"}, "--method is 'full': expected one of lora, qlora"),
        ({"only": ["axolotl"]}, f"--only is 'axolotl': expected one of {', '.join(RUNNERS)}"),
        ({"memory": ["most"]}, "--memory is 'most': expected one of auto, fast, min, or a cap in GB"),
        ({"memory": ["-3"]}, "--memory is -3: expected a cap above 0 GB"),
        ({"memory": ["nan"]}, "--memory is nan: expected a cap above 0 GB"),
        ({"documents": "normal"}, "--documents is 'normal': expected one of lognormal"),
        (
            {"documents": "lognormal", "lengths": "x"},
            "--lengths and --documents both say how long the documents are; give one of the two",
        ),
        ({"seq": 5000}, "--seq is 5000, but tiny takes at most 4096 tokens"),
        ({"dtype": "int8"}, "--dtype is 'int8': expected one of auto, bf16, fp16, fp32"),
        ({"device": "cpu", "dtype": "fp16"}, "model.dtype is fp16, but fp16 training on the CPU is not supported; "),
        ({"device": "tpu"}, "model.device is 'tpu': expected auto, cpu, cuda, cuda:N or mps"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options: dict[str, Any], message: str) -> None:
    workload = {} if "suite" in options else {"model": "tiny", "method": "lora", "batch": 2, "seq": 32}
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        plan_rows(**workload | options)


# -- documents --------------------------------------------------------------------------------------------------------


def test_the_real_lengths_fill_the_budget() -> None:
    assert sum(CHAT_DOCUMENTS) == 8192
    assert (min(CHAT_DOCUMENTS), max(CHAT_DOCUMENTS), len(CHAT_DOCUMENTS)) == (49, 608, 35)


def test_drawn_documents_fit_the_budget_and_keep_the_mix() -> None:
    pool = [10] * 50 + [40] * 50
    chosen = draw_documents(pool, 1000)
    assert 990 <= sum(chosen) <= 1000
    assert 0.3 < chosen.count(40) / len(chosen) < 0.7
    assert chosen == draw_documents(pool, 1000) != draw_documents(pool, 1000, seed=1)
    lengths = lognormal_lengths(8192)
    assert 270 < sorted(lengths)[500] < 330
    assert (min(lengths) >= 16, max(lengths) <= 8192, max(lengths) > 1500) == (True, True, True)


def test_lengths_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("10\n\n 20 \n30\n")
    assert read_lengths(path, 64) == [10, 20, 30]
    (row,) = plan_rows(model="tiny", method="lora", batch=1, seq=64, lengths=path, only=["reference"])
    assert (sorted(row.documents), row.packed) == ([10, 20, 30], True)
    path.write_text("10\n65\n1\nten\n")
    with pytest.raises(DataError) as error:
        read_lengths(path, 64)
    wanted = "expected a whole number from 2 to 64 (batch x seq)"
    assert error.value.problems == [
        f"{path}:2: '65': {wanted}",
        f"{path}:3: '1': {wanted}",
        f"{path}:4: 'ten': {wanted}",
    ]
    path.write_text("\n")
    with pytest.raises(DataError, match=r": no lengths; expected one whole number a line$"):
        read_lengths(path, 64)
    with pytest.raises(DataError, match=r"absent: cannot be read: No such file or directory$"):
        read_lengths(tmp_path / "absent", 64)


def test_peers_get_our_tokens_and_our_targets() -> None:
    """Packed: no document predicts the next one's first token, and positions restart."""
    row = replace(TINY, documents=(3, 5), packed=True)
    ids = [torch.from_numpy(example.input_ids).long() for example in documents(row, row.documents)]
    inputs = peer_inputs(row, "cpu")
    assert inputs["input_ids"].tolist() == [torch.cat(ids).tolist()]
    assert inputs["labels"].tolist() == [[-100, *ids[0][1:].tolist(), -100, *ids[1][1:].tolist()]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert "packed_seq_lengths" not in inputs
    assert peer_inputs(replace(row, runner="unsloth"), "cpu")["packed_seq_lengths"].tolist() == [3, 5]
    rows = peer_inputs(TINY, "cpu")
    expected = [example.input_ids.tolist() for example in documents(TINY, TINY.documents)]
    assert rows["input_ids"].tolist() == rows["labels"].tolist() == expected
    assert rows["attention_mask"].tolist() == [[1] * 24] * 2


# -- models -----------------------------------------------------------------------------------------------------------


def test_random_models_are_the_same_for_everybody() -> None:
    plain = random_model(TINY, "fp32", "cpu", quantize=False)
    again = random_model(TINY, "fp32", "cpu", quantize=False)
    for (name, one), (_, two) in zip(plain.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    weight, norm = plain.model.layers[1].mlp.up_proj.weight, plain.model.norm.weight
    assert (round(weight.std().item(), 3), abs(norm.mean().item() - 1) < 0.03) == (0.02, True)
    assert plain.model.layers[0].self_attn.q_proj.bias.std() > 0.01
    assert plain.model.rotary_emb.inv_freq.device.type == "cpu"
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in plain.parameters())


def test_quantized_models_hold_the_same_weights_in_four_bits() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = random_model(TINY, "fp32", "cpu", quantize=False)
    quantized = random_model(TINY, "fp32", "cpu", quantize=True)
    layers = [module for module in quantized.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    layer, original = quantized.model.layers[1].mlp.down_proj, plain.model.layers[1].mlp.down_proj.weight
    state = layer.weight.quant_state
    assert (layer.weight.dtype, state.quant_type, state.nested) == (torch.uint8, "nf4", True)
    restored = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
    assert (restored - original).norm() / original.norm() < 0.12  # NF4 of Gaussian weights: about 0.095
    assert torch.equal(quantized.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert type(quantized.lm_head) is torch.nn.Linear


def test_the_checkpoint_for_peers_is_the_same_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = replace(TINY, models=str(tmp_path))
    write_checkpoint(row, "cpu", "fp32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    expected = random_model(TINY, "fp32", "cpu", quantize=False)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path / "tiny").eos_token == "</s>"


def test_the_checkpoint_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, calls = replace(TINY, models=str(tmp_path)), []
    monkeypatch.setattr(benchmark, "_process", lambda row, *flags: calls.append(flags) or {"error": "no disk"})
    assert benchmark._write_checkpoint(row) == "no disk"
    write_checkpoint(row, "cpu", "fp32")
    assert benchmark._write_checkpoint(row) is None
    assert calls == [("--write-checkpoint",)]


# -- measuring --------------------------------------------------------------------------------------------------------


def test_the_median_is_of_the_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 10.5, 11.0, 12.0, 20.0, 20.75])
    monkeypatch.setattr("tunesmith.workflows.bench_step.time.perf_counter", lambda: next(clock))
    losses = iter([3.0, 2.5, 2.25, 2.0])
    result = measure(lambda: torch.tensor(next(losses)), replace(TINY, steps=3, warmup=1), probe("cpu"))
    assert (result["first_step_s"], result["step_ms"], result["spread"]) == (9.0, 750.0, 2.0)
    assert result["tokens_per_second"] == 48 / 0.75
    assert (result["losses"], result["reserved_gb"]) == ([3.0, 2.5, 2.25, 2.0], None)
    assert result["peak_gb"] > 0.1


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "qlora", "memory": "min"}, {"documents": (9, 24, 15), "packed": True}],
    ids=["lora", "qlora-min", "packed"],
)
def test_the_fused_step_checks_out_and_falls_like_the_reference(changes: dict[str, Any]) -> None:
    """The check ends where it began: the losses are those of a row that was not checked."""
    row = replace(TINY, engine="fused", **changes)
    checked = build(replace(row, check=True), probe("cpu"), "fp32")
    assert checked.plan.engine == "fused"
    assert checked.engine_notes[0].startswith("fused engine: 2 of 2 layers (Qwen2)")
    assert checked.check is not None
    assert checked.check["tensors"] == 28
    assert checked.check["norm_difference"] < 1e-5
    assert checked.check["difference"] < 1e-4
    assert checked.check["cosine"] > 0.9999999
    assert checked.check["total_norm_difference"] < 1e-5
    assert checked.check["fp32"]["norm_difference"] < 1e-5
    unchecked = build(row, probe("cpu"), "fp32")
    assert (unchecked.check, unchecked.check_s) == (None, 0.0)
    losses = [checked.step().item() for _ in range(3)]
    assert losses == [unchecked.step().item() for _ in range(3)]
    reference = build(replace(row, runner="reference", memory="auto"), probe("cpu"), "fp32")
    assert (reference.plan.engine, reference.check) == ("reference", None)
    assert losses == pytest.approx([reference.step().item() for _ in range(3)], rel=1e-5)
    assert losses[2] < losses[1] < losses[0] < math.log(320) + 0.3


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_in_16_bits_both_engines_are_held_to_fp32(method: Any) -> None:
    """Rounding noise is measured, in either engine; the model is left as it was."""
    row = replace(TINY, engine="fused", method=method)
    trainee = build(replace(row, check=True), probe("cpu"), "bf16")
    check = trainee.check
    assert check is not None
    assert check["fp32"]["norm_difference"] < 1e-5 < 1e-3 < check["difference"]
    assert 1e-3 < check["error"] < 1.1 * check["reference_error"] < 0.05
    assert check["total_norm_difference"] < 0.005
    unchecked = build(row, probe("cpu"), "bf16")
    assert [trainee.step().item() for _ in range(2)] == [unchecked.step().item() for _ in range(2)]


def test_fp32_is_for_a_while() -> None:
    model = random_model(replace(TINY, method="qlora"), "bf16", "cpu", quantize=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model.model.layers[0].self_attn.q_proj
    norm = model.model.norm.weight
    with in_fp32(model):
        assert (norm.dtype, layer.compute_dtype, layer.weight.dtype) == (torch.float32, torch.float32, torch.uint8)
    assert layer.compute_dtype == torch.bfloat16
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )


def test_the_check_finds_a_gradient_that_is_off() -> None:
    torch.manual_seed(0)
    reference = {name: torch.randn(4, 8) for name in ("a", "b", "c")}
    same = compare(reference, {name: tensor.clone() for name, tensor in reference.items()})
    assert (same["norm_difference"], same["difference"], same["tensors"]) == (0.0, 0.0, 3)
    assert same["cosine"] == pytest.approx(1.0, abs=1e-12)
    scaled = compare(reference, reference | {"b": 1.02 * reference["b"]})
    assert (scaled["norm_tensor"], scaled["tensor"]) == ("b", "b")
    assert scaled["norm_difference"] == pytest.approx(0.02, rel=1e-4)
    assert 0 < scaled["total_norm_difference"] < 0.015
    off = References(low=reference, exact=reference, fused_exact=reference).check(
        reference | {"b": 1.3 * reference["b"]}
    )
    assert off["error"] == pytest.approx(0.1, rel=1e-3)
    assert (off["reference_error"], off["fp32"]["norm_difference"]) == (0.0, 0.0)
    flipped = compare(reference, reference | {"c": -reference["c"]})
    assert (flipped["norm_difference"], flipped["tensor"]) == (0.0, "c")
    assert flipped["difference"] == pytest.approx(2.0)
    assert flipped["cosine"] < 0.6
    for wrong in (math.nan, math.inf):
        broken = compare(reference, reference | {"a": torch.full((4, 8), wrong)})
        assert (broken["norm_tensor"], broken["norm_difference"]) == ("a", math.inf)
    with pytest.raises(RuntimeError, match=r"^gradients of different tensors: \['c'\]$"):
        compare(reference, {name: reference[name] for name in ("a", "b")})


# -- whole rows in their processes ------------------------------------------------------------------------------------

MEASURED = {
    "tokens_per_second": float,
    "step_ms": float,
    "spread": float,
    "peak_gb": float,
    "reserved_gb": type(None),
    "first_step_s": float,
    "load_s": float,
    "losses": list,
    "trainable_parameters": int,
    "hardware": dict,
    "compute_dtype": str,
    "versions": dict,
    "error": type(None),
}


@pytest.mark.slow
def test_ours_and_a_peer_start_from_the_same_loss_and_fall_alike(tmp_path: Path) -> None:
    """Real processes. Same weights, same batch, same optimizer: only the code that runs differs."""
    rows = [
        replace(TINY, documents=(9, 24, 15), packed=True, check=True),
        replace(TINY, documents=(9, 24, 15), packed=True, runner="transformers"),
        replace(TINY, model="tiny", runner="liger"),
    ]
    seen: list[str] = []
    result = bench(rows, on_row=lambda row: seen.append(row["name"]))
    assert seen == ["tunesmith-auto", "transformers-default", "liger-default"]
    assert result["problems"] == []
    ours, peer, absent = result["rows"]
    assert absent["error"] == "liger_kernel is not installed"
    for row in (ours, peer):
        for name, kind in MEASURED.items():
            assert type(row[name]) is kind, name
        assert row["step_ms"] == pytest.approx(1e3 * row["tokens"] / row["tokens_per_second"])
        assert row["spread"] >= 1
        assert len(row["losses"]) == 3
        assert row["losses"][-1] < row["losses"][0]
        assert (row["tokens"], row["compute_dtype"], row["trainable_parameters"]) == (48, "fp32", 32768)
        assert row["hardware"]["device"] == "cpu"
    assert ours["losses"] == pytest.approx(peer["losses"], rel=1e-5)
    assert ours["check_result"]["norm_difference"] < 1e-4
    assert ours["plan"]
    assert json.loads(json.dumps(result)) == result


@pytest.mark.slow
def test_a_row_that_fails_is_a_row_with_its_error() -> None:
    failing = replace(TINY, runner="tunesmith", memory="min", device="tpu")
    with pytest.raises(MachineError) as error:
        bench([failing])
    wanted = "ConfigError: model.device is 'tpu': expected auto, cpu, cuda, cuda:N or mps"
    assert str(error.value) == f"no row could be measured: tunesmith-min: {wanted}"


@pytest.mark.slow
def test_the_command_prints_json_or_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*CPU, "--method", "lora", "--only", "reference", "--only", "liger")
    as_json = tunesmith("bench", *options, "--json")
    assert (as_json.code, as_json.problems) == (0, [])
    value = json.loads(as_json.out)
    assert list(value) == ["rows", "problems"]
    ours, absent = value["rows"]
    assert (ours["name"], ours["documents"], ours["error"]) == ("reference-auto", [24, 24], None)
    assert re.search(r"^reference-auto: [\d,]+ tokens/s, \d\.\d\d GB$", as_json.err, re.MULTILINE)

    done = {row["name"]: row for row in value["rows"]}
    monkeypatch.setattr(benchmark, "_run", lambda row: done[row.name])
    result = tunesmith("bench", *options)
    assert (result.code, result.problems) == (0, [])
    lines = result.out.splitlines()
    assert lines[1].split() == ["tokens/s", "spread", "peak", "GB", "reserved", "1st", "s", "loss"]
    assert re.match(r"reference engine +[\d,]+ +\d+% +\d\.\d\d +- +\d+\.\d +\d\.\d\d → \d\.\d\d", lines[2])
    assert lines[3].split() == ["PEFT", "+", "Liger", "failed"]
    assert lines[4] == f"PEFT + Liger: {absent['error']}" == "PEFT + Liger: liger_kernel is not installed"


# -- results that are none --------------------------------------------------------------------------------------------


def measured(**changes: Any) -> dict[str, Any]:
    """A result as an H100 would give it."""
    row = Row("tunesmith", "llama-3.1-8b", "qlora", (2048,) * 4, group="g")
    return {
        **json.loads(row.to_json()),
        "name": row.name,
        "label": row.label,
        "workload": row.workload,
        "tokens": row.tokens,
        "error": None,
        "tokens_per_second": 16987.3,
        "step_ms": 482.2,
        "spread": 1.021,
        "peak_gb": 131.98,
        "reserved_gb": 133.31,
        "first_step_s": 21.34,
        "losses": [12.262, 12.001],
        "engine_used": "fused",
        "plan": "keep everything",
        "check_result": None,
        "compute_dtype": "bf16",
        "hardware": {"name": "NVIDIA H100 80GB HBM3"},
        **changes,
    }


PRECISE = {"norm_difference": 0.0004, "norm_tensor": "q.lora_A", "difference": 0.002, "cosine": 1.0, "tensors": 448}
CHECK = PRECISE | {
    "norm_difference": 0.02,  # of one tensor in bf16: noise
    "total_norm_difference": 0.004,
    "error": 0.024,
    "reference_error": 0.03,
    "fp32": PRECISE,
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"check_result": CHECK}, None),
        (
            {"losses": [12.2, 12.3]},
            "g/tunesmith-auto: the loss on one repeated batch went from 12.2000 to 12.3000; it must fall",
        ),
        (
            {"losses": [12.2, math.nan]},
            "g/tunesmith-auto: the loss on one repeated batch went from 12.2000 to nan; it must fall",
        ),
        (
            {"check_result": CHECK | {"fp32": PRECISE | {"norm_difference": 0.0151}}},
            "g/tunesmith-auto: in fp32 the gradient norm of q.lora_A differs by 1.51% from the reference engine's; "
            "1% is allowed",
        ),
        (
            {"check_result": CHECK | {"fp32": PRECISE | {"norm_difference": math.inf}}},
            "g/tunesmith-auto: in fp32 the gradient norm of q.lora_A differs by inf%",
        ),
        (
            {"check_result": CHECK | {"total_norm_difference": 0.0123}},
            "g/tunesmith-auto: the norm of the whole gradient differs by 1.23% from the reference engine's; 1% is allowed",
        ),
        (
            {"check_result": CHECK | {"error": 0.034}},
            "g/tunesmith-auto: gradients are 3.40% from those of fp32, the reference engine's 3.00%; 1.1 times that is allowed",
        ),
        ({"error": "OutOfMemoryError: CUDA out of memory"}, None),
        ({"runner": "unsloth", "losses": [1.0, 2.0]}, None),
    ],
)
def test_a_speed_without_a_matching_loss_is_no_result(
    changes: dict[str, Any], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = measured(name="fine")
    monkeypatch.setattr(benchmark, "_run", lambda row: fine if row.steps == 1 else measured(**changes))
    result = bench([replace(TINY, steps=1), TINY])
    if problem is None:
        assert result["problems"] == []
        return
    assert [text[: len(problem)] for text in result["problems"]] == [problem]
    monkeypatch.setattr(benchmark, "find_device", lambda device, dtype: "cpu")
    out = tunesmith("bench", *CPU, "--method", "lora", "--only", "reference")
    assert out.code == 1
    assert [line.removeprefix("tunesmith: ")[: len(problem)] for line in out.problems] == [problem]


@pytest.mark.parametrize(
    ("stdout", "stderr", "code", "error"),
    [
        ('banner\nBENCH_RESULT {"step_ms": 1}\nbye\n', "", 0, None),
        ('BENCH_RESULT {"step_ms": 1}\n', "crash at exit", -11, None),
        (
            "",
            "Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB.\nlater noise\n",
            1,
            "OutOfMemoryError: CUDA out of memory. Tried 2 GiB.",
        ),
        ("", "", -9, "killed by SIGKILL (SIGKILL: the machine was out of memory)"),
        ("", "", 7, "exit code 7"),
    ],
)
def test_what_a_process_leaves_behind(
    stdout: str, stderr: str, code: int, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done:
        pass

    done: Any = Done()
    done.stdout, done.stderr, done.returncode = stdout, stderr, code
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: done)
    result = benchmark._process(TINY)
    assert (result["error"], result.get("step_ms")) == (error, 1 if error is None else None)


def test_the_table_fits_eighty_columns() -> None:
    rows = [
        measured(label=Row("unsloth", "tiny", "lora", (8,), checkpointing="none", limit_gb=16).label),
        measured(label=RUNNERS["transformers"], runner="transformers", check_result=None, tokens_per_second=123456.0),
        measured(check_result=CHECK),
        measured(engine_used="reference", plan="no GPU"),
        measured(label="Unsloth [auto]", error="OutOfMemoryError: [x] CUDA out of memory"),
    ]
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(table(rows))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
    assert "16,987     2%  131.98   133.31  21.3 12.26 → 12.00" in lines[-5]
    assert "123,456" in lines[-4]
    assert lines[-1].split() == ["Unsloth", "[auto]", "failed"]
    assert "llama-3.1-8b qlora, 4 x 2048 tokens, rank 16, NVIDIA H100 80GB HBM3" in " ".join(out.getvalue().split())
    assert notes(rows) == [
        "tunesmith auto: gradients of 448 adapter tensors: in fp32 every norm within 0.040% of the reference engine's; in "
        "bf16 the whole norm within 0.40%, and 2.40% from fp32 where the reference engine's are 3.00%",
        "tunesmith auto: ran the reference engine (no GPU)",
        "Unsloth [auto]: OutOfMemoryError: [x] CUDA out of memory",
    ]
    exact = notes([measured(check_result=CHECK, compute_dtype="fp32")])
    assert exact == [
        "tunesmith auto: gradients of 448 adapter tensors: in fp32 every norm within 0.040% of the reference engine's"
    ]
    assert summary(rows[2]) == "g/tunesmith-auto: 16,987 tokens/s, 131.98 GB"


# -- the scripts that judge -------------------------------------------------------------------------------------------


def script(name: str) -> Any:
    """A module of benchmarks/."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_table_says_what_missed_its_target(tmp_path: Path) -> None:
    engine = script("engine")
    assert set(engine.TARGETS) < {row.name for row in SUITES["h100"]}
    rows: dict[str, Any] = {}
    for row in SUITES["h100"]:
        speed = 11_600.0 if row.memory == "min" else 17_000.0
        values = {**json.loads(row.to_json()), "name": row.name, "label": row.label, "workload": row.workload}
        rows[row.name] = measured() | values | {"tokens_per_second": speed, "peak_gb": 6.75}
    unsloth = "8b-qlora-4x2048/unsloth-none"
    rows[unsloth]["tokens_per_second"] = 15_000.0
    rows["8b-qlora-8x2048/tunesmith-min"]["peak_gb"] = 10.0
    rows["8b-qlora-8x2048/tunesmith-min"]["tokens_per_second"] = 13_000.0
    rows["8b-qlora-documents/tunesmith-auto"]["tokens_per_second"] = 0.94 * 17_000
    rows["3b-qlora-8x2048/tunesmith-auto"]["error"] = "OutOfMemoryError"
    missed = {name: why for name, row in rows.items() if (why := engine.misses(row, rows))}
    assert missed == {
        "8b-lora-4x2048/tunesmith-auto": "17,000 of 17,500 tokens/s",
        "8b-qlora-8x2048/tunesmith-min": "10.00 GB; at most 9.9 GB",
        "3b-qlora-4x1024/tunesmith-auto": "17,000 of 35,000 tokens/s",
        "3b-qlora-4x1024/tunesmith-min": "11,600 of 22,000 tokens/s",
        "3b-qlora-8x2048/tunesmith-auto": "failed: OutOfMemoryError",
        "8b-qlora-documents/tunesmith-auto": "15,980 of 16,150 tokens/s",
    }
    lines = engine.markdown(rows).splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {11}
    assert "| tunesmith auto | **17,000** | 1.00 |" in lines[2]
    for number, half in enumerate((list(rows.values())[:20], [*list(rows.values())[10:], rows[unsloth] | {"rank": 8}])):
        (tmp_path / f"{number}.json").write_text(json.dumps({"rows": half}))
    merged = engine.read([str(tmp_path / "0.json"), str(tmp_path / "1.json")])
    assert list(merged) == [row.name for row in SUITES["h100"]]
    assert merged[unsloth]["rank"] == 8


def test_drift_is_the_difference_that_grows() -> None:
    convergence = script("convergence")
    reference = [2.0] * 8
    shifted = convergence.compare(reference, [2.002] * 8)
    assert shifted["difference"] == pytest.approx(0.001)
    assert shifted["drift"] == pytest.approx(0.0, abs=1e-12)
    assert convergence.lies_on(shifted)
    noisy = convergence.compare(reference, [2.004, 1.996] * 4)
    assert (noisy["difference"], noisy["signed_difference"]) == (pytest.approx(0.002), pytest.approx(0.0, abs=1e-12))
    growing = convergence.compare(reference, [2.0] * 4 + [2.016, 2.016, 2.0, 2.02])
    assert growing["drift"] == pytest.approx(0.005)
    assert not convergence.lies_on(growing)
    assert not convergence.lies_on(convergence.compare(reference, [math.nan] * 8))
