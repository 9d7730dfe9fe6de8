"""Somebody else's trainer on fused layers: TRL's SFTTrainer, and one line that is ours.

    python examples/trl_sft.py --model MODEL --data train.jsonl [--steps 20] [--no-fuse]

MODEL is a folder or a hub id; each row of the data has `messages`. Prints the loss of every step. `tunesmith.fuse` acts on
the model that the trainer holds: its layers are swapped for ours, everything else is TRL's, transformers' and PEFT's.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import tunesmith


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="trl-run")
    parser.add_argument("--no-fuse", action="store_true")
    options = parser.parse_args()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        train_dataset=load_dataset("json", data_files=options.data, split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    if not options.no_fuse:
        tunesmith.fuse(trainer.model)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            print(f"step {entry['step']} loss {entry['loss']}")


if __name__ == "__main__":
    main()
