"""One row of `tunesmith bench` (workflows/bench.py) in a process of its own: build it, time its steps, print one line.

    python -m tunesmith.workflows.bench_step '{"runner": "tunesmith", "model": "tiny", "method": "lora", "documents": [64]}'

Our side goes the way of `tunesmith train`, through the same functions: adapter, memory plan, prepare, and in each step
the loop's accumulate_gradients, clipping and optimizer. The batch is the same in every step, so the loss must fall; and
weights, biases and tokens come from one seed, so the first loss is the same whoever runs the row.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tunesmith.workflows.bench import RESULT_MARK, SEED, SHAPES, Row

if __name__ == "__main__" and len(sys.argv) == 2 and Row.from_json(sys.argv[1]).runner == "unsloth":
    importlib.import_module("unsloth")  # before PyTorch and transformers, by its own rule

import numpy as np
import torch

from tunesmith.config import RunConfig, load_config
from tunesmith.hardware import ComputeDType, Hardware, compute_dtype, memory_in_use_gb, probe, torch_dtype
from tunesmith.models.adapters import add_adapter, count_parameters, target_modules
from tunesmith.models.forward import ModelForward
from tunesmith.models.fuse import engine_of
from tunesmith.training.graphs import GraphedMicroBatches, micro_batch_graphs
from tunesmith.training.loop import accumulate_gradients
from tunesmith.training.objectives import Objective, SupervisedFineTuning
from tunesmith.training.optimizers import Optimizer, make_optimizer
from tunesmith.training.prepare import prepare
from tunesmith.types import GB, IGNORE_INDEX, Event, MemoryPlan, TokenizedExample
from tunesmith.workflows.bench_check import References
from tunesmith.workflows.run_plan import limit_memory, plan_run

LEARNING_RATE = 1e-3
"""High, so that a handful of steps on one batch show whether the loss falls."""

CHECK_TOKENS = 2048
"""Gradients are compared on the row's documents, shortened to about this many tokens together."""

Step = Callable[[], torch.Tensor]
"""One optimizer step; returns its loss, a scalar on the device."""


@dataclass
class Trainee:
    """A model that is ready to train, what the loop needs beside it, and its one batch.

    `check` is bench_check.py's result for the plan that runs, and `check_s` the time of that gradient; None and 0 unasked.
    """

    config: RunConfig
    forward: ModelForward
    objective: Objective
    optimizer: Optimizer
    graphs: GraphedMicroBatches | None
    scaler: torch.amp.GradScaler
    plan: MemoryPlan
    examples: list[TokenizedExample]
    engine_notes: list[str]
    check: dict[str, Any] | None
    check_s: float

    def step(self) -> torch.Tensor:
        """What training/loop.py does in an optimizer step."""
        packing = self.config.data.packed
        loss = accumulate_gradients(self.forward, self.objective, [self.examples], packing, 0, self.scaler, self.graphs)
        self.optimizer.step(self.scaler, self.config.optimizer.max_grad_norm)
        return loss


def configuration(row: Row, engine: str) -> RunConfig:
    """The row as the configuration of a run."""
    values: dict[str, Any] = {
        "method": row.method,
        "model.engine": engine,
        "model.device": row.device,
        "model.dtype": row.dtype,
        "data.packing": row.packed,
        "adapter.r": row.rank,
        "adapter.alpha": 2 * row.rank,
        "optimizer.name": "adamw_8bit",
        "optimizer.lr": LEARNING_RATE,
        "training.batch_size": len(row.documents),
        "training.micro_batch_size": len(row.documents),
        "training.seed": SEED,
        "memory.mode": row.memory,
        "memory.limit_gb": row.limit_gb,
    }
    return load_config(None, [], values).resolved()


def documents(row: Row, lengths: Iterable[int]) -> list[TokenizedExample]:
    """Documents of random tokens, every token supervised."""
    rng = np.random.default_rng(SEED)
    vocabulary = SHAPES[row.model]["vocab_size"]
    return [
        TokenizedExample(rng.integers(3, vocabulary, length, dtype=np.int32), np.ones(length, dtype=bool))
        for length in lengths
    ]


def random_model(row: Row, dtype: ComputeDType, device: str, quantize: bool) -> Any:
    """A transformers model of the row's shape with random weights, made on `device` tensor by tensor.

    The same weights whoever asks: N(0, 0.02²) for matrices, 1 + N(0, 0.05²) for norms, N(0, 0.02²) for biases, so that code
    which ignores one of them is found out. Quantized (NF4, double quantization), no more than one matrix is ever there
    in 16 bits, and nothing is written to the disk.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[row.model], bos_token_id=1, eos_token_id=2, pad_token_id=0)
    with init_empty_weights(include_buffers=False):
        attention = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"  # as models/load.py
        model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), attn_implementation=attention)
    if quantize:
        _use_4bit_layers(model, torch_dtype(dtype))
    generator = torch.Generator(device).manual_seed(SEED)
    for name, empty in list(model.named_parameters()):
        values = torch.empty(empty.shape, dtype=torch_dtype(dtype), device=device)
        if name.endswith("norm.weight"):
            values.normal_(1.0, 0.05, generator=generator)
        else:
            values.normal_(0.0, 0.02, generator=generator)
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if hasattr(empty, "quant_state"):
            # Moving one to its device quantizes it.
            parameter = type(empty)(values, **vars(empty) | {"requires_grad": False}).to(device)
        else:
            parameter = torch.nn.Parameter(values, requires_grad=False)
        setattr(module, attribute, parameter)
    model.tie_weights()
    return model.to(device)


def _use_4bit_layers(model: Any, dtype: torch.dtype) -> None:
    """Put bitsandbytes' 4-bit layers, still empty, in the place of all linear layers but the head."""
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    replace_with_bnb_linear(model, ["lm_head"], settings)
    model.config.quantization_config = settings
    model.is_loaded_in_4bit = model.is_quantized = True  # what PEFT and its prepare_model_for_kbit_training ask
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as models/load.py does: the other layout has no backward


# -- our side ---------------------------------------------------------------------------------------------------------


def run_ours(row: Row, hardware: Hardware, dtype: ComputeDType) -> dict[str, Any]:
    """Measure `tunesmith train`'s step, with the engine that the row names."""
    began = time.perf_counter()
    trainee = build(row, hardware, dtype)
    load_s = time.perf_counter() - began - trainee.check_s
    result = measure(trainee.step, row, hardware)
    result["first_step_s"] += trainee.check_s  # the check was the first to run the kernels
    return result | {
        "load_s": load_s,
        "engine_used": trainee.plan.engine,
        "plan": trainee.plan.reason,
        "engine_notes": trainee.engine_notes,
        "recompute_layers": trainee.plan.recompute_layers,
        "predicted_peak_gb": trainee.plan.predicted_peak_gb,
        "trainable_parameters": count_parameters(trainee.forward.model)[0],
        "check_result": trainee.check,
    }


def build(row: Row, hardware: Hardware, dtype: ComputeDType) -> Trainee:
    """The row as `tunesmith train` would have it in front of its first step, checked if the row says so."""
    config = configuration(row, "reference" if row.runner == "reference" else row.engine)
    limit_memory(config, hardware)
    torch.manual_seed(SEED)
    base = random_model(row, dtype, hardware.device, row.method == "qlora")
    model = add_adapter(base, config.adapter, row.model)
    model.train()
    forward = ModelForward(model, hardware.device, dtype)
    examples = documents(row, row.documents)
    reference = None
    if row.check:
        slow = configuration(row, "reference")
        slow.memory.mode = "min"  # activations recomputed, so that it fits beside whatever the row needs
        prepare(model, plan_run(slow, forward, hardware, examples).memory)
        reference = References.of(forward, lambda way: adapter_gradients(row, way))
    if hardware.type == "cuda":
        torch.cuda.empty_cache()  # the plan counts what is free

    plan = plan_run(config, forward, hardware, examples).memory
    forward.loss_rows = plan.loss_rows
    engine_notes: list[str] = []
    # The one place where the fused engine is switched on: if the plan says so.
    prepare(model, plan, torch_dtype(dtype), engine_notes.append)

    check, check_s = None, 0.0
    if reference is not None:
        began = time.perf_counter()
        check = reference.check(adapter_gradients(row, forward))
        check_s = time.perf_counter() - began
    optimizer = make_optimizer(model, config.optimizer, config.lr)
    scaler = torch.amp.GradScaler(hardware.type, enabled=dtype == "fp16")
    objective = SupervisedFineTuning()

    def note(event: Event) -> None:
        engine_notes.append(event["message"])

    optimizer.connect(engine_of(model))
    graphs = micro_batch_graphs(config, forward, objective, optimizer, scaler, note)
    return Trainee(config, forward, objective, optimizer, graphs, scaler, plan, examples, engine_notes, check, check_s)


def adapter_gradients(row: Row, forward: ModelForward) -> dict[str, torch.Tensor]:
    """Gradients of the adapter's tensors by name, with B drawn from N(0, 0.02²): at its zero, A has no gradient.

    On the row's documents, all cut to one length, so that they have about CHECK_TOKENS together.
    """
    tensors = {name: parameter for name, parameter in forward.model.named_parameters() if parameter.requires_grad}
    generator = torch.Generator(forward.device).manual_seed(SEED)
    longest = max(16, CHECK_TOKENS // len(row.documents))
    examples = documents(row, [min(length, longest) for length in row.documents])
    scaler = torch.amp.GradScaler(forward.device.split(":")[0], enabled=forward.dtype == "fp16")
    with torch.no_grad():
        for name, parameter in tensors.items():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02, generator=generator)
    accumulate_gradients(forward, SupervisedFineTuning(), [examples], row.packed, 0, scaler)
    gradients = {}
    with torch.no_grad():
        for name, parameter in tensors.items():
            if parameter.grad is None:
                raise RuntimeError(f"{name} has no gradient")
            gradients[name], parameter.grad = parameter.grad, None
            if "lora_B" in name:
                parameter.zero_()
    return gradients


# -- the peers' side --------------------------------------------------------------------------------------------------

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run_peer(row: Row, hardware: Hardware, dtype: ComputeDType) -> dict[str, Any]:
    """Measure the step that the peer's users write: the model's own loss under autocast, backward, clip, 8-bit AdamW."""
    config = configuration(row, "reference")
    began = time.perf_counter()
    limit_memory(config, hardware)
    torch.manual_seed(SEED)
    model = _unsloth_model(row, dtype) if row.runner == "unsloth" else _peft_model(row, hardware, dtype)
    load_s = time.perf_counter() - began
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _peer_optimizer(trainable, config)
    device = hardware.device
    scaler = torch.amp.GradScaler(hardware.type, enabled=dtype == "fp16")
    inputs = peer_inputs(row, device)

    def step() -> torch.Tensor:
        with torch.autocast(hardware.type, torch_dtype(dtype), enabled=dtype != "fp32"):
            loss: torch.Tensor = model(**inputs).loss
        scaler.scale(loss).backward()
        optimizer.step(scaler, config.optimizer.max_grad_norm)
        return loss.detach()

    result = measure(step, row, hardware)
    return result | {"load_s": load_s, "trainable_parameters": count_parameters(model)[0]}


def _peer_optimizer(trainable: list[torch.nn.Parameter], config: RunConfig) -> Optimizer:
    """8-bit AdamW over the adapter's tensors, as transformers' Trainer makes it."""
    import bitsandbytes

    return Optimizer(bitsandbytes.optim.AdamW8bit(trainable, lr=config.lr, weight_decay=config.optimizer.weight_decay))


def peer_inputs(row: Row, device: str) -> dict[str, torch.Tensor]:
    """The batch as the peers take it: rows with a mask, or packed documents with their positions."""
    examples = documents(row, row.documents)
    ids = [torch.from_numpy(example.input_ids).long() for example in examples]
    if not row.packed:
        input_ids = torch.stack(ids).to(device)
        return {"input_ids": input_ids, "labels": input_ids, "attention_mask": torch.ones_like(input_ids)}
    input_ids = torch.cat(ids)[None]
    labels = torch.cat([torch.cat((torch.tensor([IGNORE_INDEX]), part[1:])) for part in ids])[None]
    positions = torch.cat([torch.arange(len(part)) for part in ids])[None]
    inputs = {"input_ids": input_ids, "labels": labels, "position_ids": positions}
    if row.runner == "unsloth":  # as its own trainer's packing does
        inputs["packed_seq_lengths"] = torch.tensor(row.documents, dtype=torch.int32)
    return {name: value.to(device) for name, value in inputs.items()}


def _peft_model(row: Row, hardware: Hardware, dtype: ComputeDType) -> Any:
    """transformers + PEFT as its documentation says, with Liger's kernels if the row names them."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = random_model(row, dtype, hardware.device, row.method == "qlora")
    if row.runner == "liger":
        importlib.import_module("liger_kernel.transformers.monkey_patch")._apply_liger_kernel_to_instance(model=model)
    model.config.use_cache = False
    checkpointing = row.checkpointing != "none"
    if row.method == "qlora":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    elif checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=row.rank,
        lora_alpha=2 * row.rank,
        target_modules=target_modules(model, "all-linear"),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _unsloth_model(row: Row, dtype: ComputeDType) -> Any:
    """Unsloth at its default, without checkpointing, or un-checkpointing the layers that fit."""
    loader = importlib.import_module("unsloth").FastLanguageModel
    model, _ = loader.from_pretrained(
        str(row.checkpoint),
        max_seq_length=row.tokens if row.packed else max(row.documents),
        dtype=torch_dtype(dtype),
        load_in_4bit=row.method == "qlora",
        local_files_only=True,
    )
    return loader.get_peft_model(
        model,
        r=row.rank,
        lora_alpha=2 * row.rank,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing=False if row.checkpointing == "none" else "unsloth",
        checkpoint_skip_layers="auto" if row.checkpointing == "auto" else 0,
        random_state=SEED,
    )


def write_checkpoint(row: Row, device: str, dtype: ComputeDType) -> None:
    """Write the random model as safetensors with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = row.checkpoint
    random_model(row, dtype, device, quantize=False).save_pretrained(folder, max_shard_size="4GB")
    pieces = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "done").touch()


# -- timing -----------------------------------------------------------------------------------------------------------


def measure(step: Step, row: Row, hardware: Hardware) -> dict[str, Any]:
    """Run warm-up and timed steps. Seconds are wall time with the device idle before and after; memory is the peak of
    all steps, without loading (on the CPU: of the process).
    """
    is_cuda = hardware.type == "cuda"
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(row.warmup + row.steps):
        if is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        losses.append(step())
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    timed = seconds[row.warmup :]
    median = float(np.median(timed))
    return {
        "tokens_per_second": row.tokens / median,
        "step_ms": 1e3 * median,
        "spread": max(timed) / min(timed),
        "peak_gb": memory_in_use_gb(hardware.device),
        "reserved_gb": torch.cuda.max_memory_reserved() / GB if is_cuda else None,
        "first_step_s": seconds[0],
        "losses": [float(loss) for loss in losses],
    }


def versions(row: Row) -> dict[str, str]:
    """Versions of what took part."""
    found = {}
    for name in ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth"):
        if name.startswith(("liger", "unsloth")) and not name.startswith(row.runner):
            continue
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def main() -> None:
    """Run the row given as JSON, or write the checkpoint that it loads."""
    row = Row.from_json(sys.argv[1])
    hardware = probe(row.device)
    dtype = compute_dtype(row.dtype, hardware)
    if sys.argv[2:] == ["--write-checkpoint"]:
        write_checkpoint(row, hardware.device, dtype)
        result: dict[str, Any] = {}
    else:
        result = (run_ours if row.is_ours else run_peer)(row, hardware, dtype)
        result |= {"hardware": hardware.describe(), "compute_dtype": dtype, "versions": versions(row)}
    print(RESULT_MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
