"""Peak memory and time of merging an adapter into a base of a real model's shape, with random weights.

    python benchmarks/merge_memory.py --shape 8B [--device cuda] [--qlora] [--onto quantized] [--dtype bf16] [--work DIR] [--out OUT.json]

The base is written in shards of at most --shard-gb (5, as the hub's files are), tensor by tensor, out of one block of random numbers: the 8B takes
its 16 GB of disk and about a minute. The merge, with everything that it compares, runs in a process of its own; reported are that process's peak
resident memory (VmHWM, pages of mapped files included), what it had before the merge (Python, PyTorch, CUDA's context), the growth between them, and the
peak of the GPU's allocator. Held: the growth is under the largest shard plus 2 GB (of 2^30 bytes). Exits 1 where it is not, or the merge fails.

Twice the base's size must be free on the disk at --work (default: a new temporary folder, removed at the end).
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import make_tokenizer
from tunesmith.export.tensors import Entry, write_tensors
from tunesmith.files import write_json
from tunesmith.models.load import ModelSource, weight_hash
from tunesmith.types import GB

ALLOWED_GB = 2.0

SHAPES: dict[str, dict[str, Any]] = {  # config.json of Llama-3.1-8B and Llama-3.2-3B/1B, Qwen2.5-0.5B's sizes without its biases
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024},
}  # fmt: skip

RANK = 16

MERGE = """
import json, sys, time
from pathlib import Path
import torch
from tunesmith.workflows.merge import merge

def now(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

options = json.loads(sys.argv[1])
if options["device"].startswith("cuda"):
    torch.zeros(1, device=options["device"])
before = now("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
start = time.perf_counter()
result = merge(**options)
seconds = time.perf_counter() - start
gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps({"before": before, "peak": now("VmHWM"), "gpu": gpu, "seconds": seconds, "result": result}))
"""


def parameters(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors, in the order of its layers."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys), ("o_proj", hidden)):
            yield f"{at}.self_attn.{name}.weight", (rows, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        for name, size in (
            ("gate_proj", (inner, hidden)),
            ("up_proj", (inner, hidden)),
            ("down_proj", (hidden, inner)),
        ):
            yield f"{at}.mlp.{name}.weight", size
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (shape["vocab_size"], hidden)


def random_tensor(size: tuple[int, ...], block: torch.Tensor) -> torch.Tensor:
    """Ones for a norm, else the block of random numbers as often as it takes."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    count = size[0] * size[1]
    return block.repeat(-(-count // len(block)))[:count].view(size)


def write_base(folder: Path, shape: dict[str, Any], shard_gb: float) -> list[int]:
    """A model folder in bf16; returns the sizes of its shards in bytes."""
    from transformers import LlamaConfig

    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    folder.mkdir(parents=True)
    LlamaConfig(**shape, **ends, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    block = 0.02 * torch.randn(2**22 + 7, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
    shards: list[list[Entry]] = [[]]
    for name, size in parameters(shape):
        entry = Entry(name, size, torch.bfloat16)
        if shards[-1] and sum(each.size for each in shards[-1]) + entry.size > shard_gb * GB:
            shards.append([])
        shards[-1].append(entry)
    weight_map = {}
    for number, entries in enumerate(shards, 1):
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(file, entries, ((entry.name, random_tensor(entry.shape, block)) for entry in entries))
        weight_map |= {entry.name: file.name for entry in entries}
    sizes = [sum(entry.size for entry in entries) for entries in shards]
    write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    )
    return sizes


def write_adapter(folder: Path, base: Path, shape: dict[str, Any], qlora: bool) -> None:
    """A LoRA adapter of all linear layers, in fp32; with `qlora` its record says that it was trained over NF4."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, size in parameters(shape):
        if "proj" not in name:
            continue
        place = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, size[1], generator=generator) / size[1] ** 0.5
        tensors[f"{place}.lora_B.weight"] = 0.02 * torch.randn(size[0], RANK, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".")[-2] for name, _ in parameters(shape) if "proj" in name})
    LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=targets, base_model_name_or_path=str(base)
    ).save_pretrained(folder)
    if qlora:
        known = {"base": {"name": base.name, "weight_hash": weight_hash(ModelSource(str(base), base))}}
        write_json(
            folder / "tunesmith.json",
            {**known, "dtype": "bf16", "quantization": {"scheme": "nf4", "double_quant": True}},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument(
        "--layers",
        type=int,
        help="fewer layers than the shape has: the peak is a shard's and a matrix's, the time is not",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--onto", default="16bit")
    parser.add_argument("--qlora", action="store_true")
    parser.add_argument("--shard-gb", type=float, default=5.0)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-memory-", dir=arguments.work) as place:
        work = Path(place)
        started = time.perf_counter()
        shape = SHAPES[arguments.shape] | ({"num_hidden_layers": arguments.layers} if arguments.layers else {})
        sizes = write_base(work / "base", shape, arguments.shard_gb)
        write_adapter(work / "adapter", work / "base", shape, arguments.qlora)
        print(
            f"{arguments.shape}: {sum(sizes) / GB:.1f} GB in {len(sizes)} shards, made in {time.perf_counter() - started:.0f} s",
            file=sys.stderr,
        )
        options = {
            "target": str(work / "adapter"), "out": str(work / "merged"), "device": arguments.device, "dtype": arguments.dtype,
            "onto": arguments.onto,
        }  # fmt: skip
        found = subprocess.run(
            [sys.executable, "-c", MERGE, json.dumps(options)], stdout=subprocess.PIPE, text=True, check=False
        )
        if found.returncode:
            raise SystemExit("the merge failed")
        measured = json.loads(found.stdout.splitlines()[-1])
    growth, allowed = (measured["peak"] - measured["before"]) / GB, max(sizes) / GB + ALLOWED_GB
    result = measured["result"]
    row = {
        "shape": arguments.shape,
        "layers": shape["num_hidden_layers"],
        "device": torch.cuda.get_device_name()
        if arguments.device.startswith("cuda")
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": arguments.dtype,
        "onto": arguments.onto,
        "qlora": arguments.qlora,
        "base_gb": round(sum(sizes) / GB, 2),
        "largest_shard_gb": round(max(sizes) / GB, 2),
        "host_peak_gb": round(measured["peak"] / GB, 2),
        "host_before_gb": round(measured["before"] / GB, 2),
        "host_growth_gb": round(growth, 2),
        "allowed_gb": round(allowed, 2),
        "gpu_peak_gb": round(measured["gpu"] / GB, 2),
        "seconds": round(measured["seconds"], 1),
        "loaded_whole": result["loaded_whole"],
        **{key: result[key] for key in ("difference", "kl", "top1", "kl_of_trained") if key in result},
        "torch": torch.__version__,
    }
    print(json.dumps(row, indent=2))
    if arguments.out:
        write_json(arguments.out, row)
    if growth > allowed:
        raise SystemExit(f"the merge took {growth:.2f} GB of host memory; allowed are {allowed:.2f}")


if __name__ == "__main__":
    main()
