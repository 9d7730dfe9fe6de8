"""Tokenize, mask and pack the same file with tunesmith and with TRL, side by side, all caches off.

    python benchmarks/data_preparation.py --data DATA_FOLDER [--model MODEL] [--rows 50000] [--processes 1 2] [--repeat 3]

The file holds `--rows` distinct conversations made from the folder's chats and question-answer pairs (of the layout of
tests' shared data): each as it is, then, until there are enough, two of them one after the other. Each side runs in a
process of its own, with the same number of processes of its own; the model's tokenizer is loaded, and the file is in the
page cache, before the clock starts. Both supervise the assistant's turns only and pack best-fit into 8,192 tokens. TRL is
timed in its own `_prepare_dataset` after `load_dataset`; tunesmith from the file to packs, with the row-by-row checks of
reading (those over the whole file, `data check`, are no part of TRL's preparation and of neither time). Prints a table, and
stops if the two sides do not supervise the same number of tokens.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BUDGET = 8192

# ChatML with TRL's marks, so that TRL can mask: the tokens are those of SmolLM2's and Qwen2.5's own templates.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

FILES = (
    "chat/sgd_train_messages.jsonl",
    "chat/sgd_dev_messages.jsonl",
    "chat/openassistant_seed_messages.jsonl",
    "chat/fastchat_identity_sharegpt.jsonl",
    "instruct/dolly_hhrlhf_1k.jsonl",
    "instruct/gpteacher_roleplay.jsonl",
    "instruct/gpteacher_toolformer.jsonl",
    "instruct/self_instruct_seed.jsonl",
    "instruct_ko/hrc_sft.jsonl",
    "instruct_ko/songys_chatbot.jsonl",
    "gsm8k/train.jsonl",
    "banking77/ten_class_train_chat.jsonl",
    "banking77/train_10shot_chat.jsonl",
)


def make_file(folder: Path, rows: int, path: Path) -> None:
    """Write `rows` distinct conversations as JSON Lines of `messages`."""
    from tunesmith.data.formats import read_examples

    pool: list[list[dict[str, str]]] = []
    for name in FILES:
        for example in read_examples(folder / name).examples:
            turns = [{"role": m.role, "content": m.content} for m in example.messages or ()]  # type: ignore[union-attr]
            pool.append(turns[1:] if turns[0]["role"] == "system" else turns)
    generator = random.Random(0)
    seen: set[str] = set()
    with path.open("w", encoding="utf-8") as file:
        candidates = iter(pool)
        while len(seen) < rows:
            messages = next(candidates, None) or generator.choice(pool) + generator.choice(pool)
            if messages[-1]["role"] != "assistant":
                messages = messages[:-1]
            line = json.dumps({"messages": messages}, ensure_ascii=False)
            if line not in seen:
                seen.add(line)
                file.write(line + "\n")


def run_tunesmith(path: Path, model: str, processes: int) -> dict[str, Any]:
    from tunesmith.config import DataConfig, ModelConfig
    from tunesmith.data.chat import ChatFormat
    from tunesmith.data.formats import read_examples
    from tunesmith.data.packing import best_fit
    from tunesmith.data.tokens import tokenize
    from tunesmith.models.load import find_model, load_tokenizer

    tokenizer = load_tokenizer(find_model(ModelConfig(name=model)), ModelConfig(name=model))
    tokenizer.chat_template = TEMPLATE
    chat = ChatFormat(tokenizer)
    settings = DataConfig(path=str(path), max_seq_length=BUDGET, overlong="truncate", cache=False, num_proc=processes)
    path.read_bytes()
    began = time.perf_counter()
    examples = read_examples(settings).examples
    read = time.perf_counter()
    tokens = tokenize(chat, examples, settings)  # type: ignore[arg-type]
    tokenized = time.perf_counter()
    packs = best_fit(tokens.examples.lengths.tolist(), BUDGET)
    done = time.perf_counter()
    return {
        "read_seconds": read - began,
        "prepare_seconds": done - read,
        "pack_seconds": done - tokenized,
        "seconds": done - began,
        "rows": len(tokens.examples),
        "tokens": int(tokens.examples.lengths.sum()),
        "supervised_tokens": sum(example.supervised for example in tokens.examples),
        "packs": len(packs),
    }


def run_trl(path: Path, model: str, processes: int) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from tunesmith.config import ModelConfig
    from tunesmith.models.load import find_model, load_tokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(find_model(ModelConfig(name=model)), ModelConfig(name=model))
    tokenizer.chat_template = TEMPLATE
    times: list[float] = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            prepared = super()._prepare_dataset(*args, **kwargs)
            times.append(time.perf_counter() - began)
            return prepared

    tiny = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32)
    path.read_bytes()
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=out)
        read = time.perf_counter() - began
        settings = SFTConfig(
            output_dir=out, max_length=BUDGET, packing=True, packing_strategy="bfd", assistant_only_loss=True,
            dataset_num_proc=processes if processes > 1 else None, report_to=[], use_cpu=True, bf16=False,
        )  # fmt: skip
        trainer = Timed(model=network, args=settings, train_dataset=rows, processing_class=tokenizer)
        packed = trainer.train_dataset
        labels = packed.with_format("numpy")["labels"]
        return {
            "read_seconds": read,
            "prepare_seconds": times[0],
            "seconds": read + times[0],
            "rows": len(rows),
            "tokens": sum(len(row) for row in labels),
            "supervised_tokens": int(sum((row != -100).sum() for row in labels)),
            "packs": len(packed),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of data sets")
    parser.add_argument("--model", default="embedded", help="whose tokenizer (default: the quickstart's model)")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--side", choices=["tunesmith", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model == "embedded":
        from tunesmith.workflows.quickstart import embedded_model

        arguments.model = str(embedded_model())
    if arguments.side:
        side = run_tunesmith if arguments.side == "tunesmith" else run_trl
        print(json.dumps(side(arguments.file, arguments.model, arguments.processes[0])))
        return
    versions = {name: importlib.metadata.version(name) for name in ("trl", "datasets", "tokenizers", "transformers")}
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        make_file(arguments.data, arguments.rows, file)
        print(f"{arguments.rows} rows, {file.stat().st_size / 2**20:.0f} MB\n")
        print("| processes | side | seconds | of it reading | rows/s | tokens/s | supervised tokens | packs | ratio |")
        print("|---|---|---|---|---|---|---|---|---|")
        for processes in arguments.processes:
            medians: dict[str, float] = {}
            supervised: set[int] = set()
            for side in ("trl", "tunesmith"):
                runs = [_side(side, file, arguments.model, processes) for _ in range(arguments.repeat)]
                run = min(runs, key=lambda run: abs(run["seconds"] - statistics.median(r["seconds"] for r in runs)))
                medians[side] = run["seconds"]
                supervised.add(run["supervised_tokens"])
                if len(supervised) > 1:
                    sys.exit(f"the sides supervise other tokens: {sorted(supervised)}")
                ratio = f"{medians['trl'] / run['seconds']:.1f}x" if side == "tunesmith" else ""
                print(
                    f"| {processes} | {side} | {run['seconds']:.1f} | {run['read_seconds']:.1f} | "
                    f"{run['rows'] / run['seconds']:.0f} | {run['tokens'] / run['seconds']:,.0f} | "
                    f"{run['supervised_tokens']:,} | {run['packs']} | {ratio} |",
                    flush=True,
                )


def _side(side: str, file: Path, model: str, processes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--file", str(file), "--model", model]
    # One process is one core on both sides, unless the environment lets the tokenizers use threads.
    environment = {"TOKENIZERS_PARALLELISM": "false"} | os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--processes", str(processes)], check=True, capture_output=True, text=True, env=environment
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
