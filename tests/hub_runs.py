"""What tests of the hub make of a run: merged and quantized models with their records, other weights, texts that training wrote.

merged = shard(run)   # RUN/merged, of the run's adapter
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from tunesmith.files import sha256_text
from tunesmith.models.load import ModelSource
from tunesmith.registry.records import Merged, adapter_hash, write_merged_record
from tunesmith.workflows.lineage import tokenizer_hash

NAME = "me/bins"
BASE = "org/base"


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The header, read, and the body."""
    assert card.startswith("---\n")
    _, head, body = card.split("---\n", 2)
    return yaml.safe_load(head), body


def shard(run: Path, folder: Path | None = None, **changes: Any) -> Path:
    """A model in two shards at RUN/merged (or at `folder`), with a record that says it was made of the run's adapter."""
    merged = folder or run / "merged"
    merged.mkdir()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"w{number}": np.full(50_000, number, dtype=np.float32)}, merged / name)
    (merged / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w0": names[0], "w1": names[1]}}))
    (merged / "config.json").write_text(json.dumps({"_name_or_path": "/somewhere/base", "model_type": "llama"}))
    return record_merge(run, merged, **changes)


def record_merge(run: Path, merged: Path, **changes: Any) -> Path:
    """Record that the files in a folder are what was merged from the run's adapter."""
    base_hash = json.loads((run / "metadata.json").read_text())["model"]["weight_hash"]
    made = {"adapters": (adapter_hash(run / "adapter"),), "names": ("run",), "base": "base-32", "base_hash": base_hash}
    facts = {"tokenizer_hash": "0" * 64, "template_hash": "0" * 64, "dtype": "fp32", "onto": "16bit"}
    write_merged_record(merged, Merged(**{**made, **facts, **changes}))
    return merged


def quantize(run: Path, folder: Path, **measured: Any) -> Path:
    """A quantized model's folder, with what its export measured."""
    shard(run, folder)
    config = {"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "recipe.yaml").write_text("quant_stage: {}\n")
    record_merge(run, folder)
    record = json.loads((folder / "tunesmith.json").read_text())
    (folder / "tunesmith.json").write_text(
        json.dumps({**record, "quantized": {"method": "gptq", "verified": measured}})
    )
    return folder


def train_on(run: Path) -> None:
    """Another adapter than the run had, as a resumed run leaves it."""
    path = run / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    record = run / "adapter" / "tunesmith.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "adapter_sha256": adapter_hash(run / "adapter")}))
    shutil.rmtree(run / "evaluations")


def flip(path: Path, at: int = -50) -> None:
    """One changed byte."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x55
    path.write_bytes(content)


def record_texts(run: Path) -> None:
    """Record the chat template and the tokenizer that are beside the adapter as those that training wrote."""
    adapter = run / "adapter"
    for path, own in (
        (
            run / "metadata.json",
            {"chat_template": {"hash": sha256_text([(adapter / "chat_template.jinja").read_text()])}},
        ),
        (adapter / "tunesmith.json", {"adapter_tokenizer": {"hash": tokenizer_hash(ModelSource("", adapter))}}),
    ):
        value = json.loads(path.read_text())
        path.write_text(json.dumps(value | {key: (value[key] or {}) | facts for key, facts in own.items()}))
