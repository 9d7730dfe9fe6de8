"""RunConfig: everything a run is told, typed, with the field's recommended starting values as defaults.

YAML in and out, `section.key=value` overrides, unknown keys refused with the nearest known name, and every problem
reported at once. Imports no torch.

Where the defaults come from: rank 16, alpha 32, dropout 0 on all linear layers and a rate ten times full
fine-tuning's follow "LoRA Without Regret" (Schulman et al., 2025) and the QLoRA paper (Dettmers et al., 2023,
arXiv 2305.14314: all linear layers, lr 2e-4, max_grad_norm 0.3); cosine decay with 5% warm-up and three epochs are
what the field's guides agree on.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunesmith.contradictions import CAUSES, contradictions
from tunesmith.errors import ConfigError
from tunesmith.yaml_files import Loader, read_yaml, string_keys

Method = Literal["lora", "qlora", "full"]
ObjectiveName = Literal["sft", "cpt", "dpo", "orpo", "simpo", "kto"]
TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
DType = Literal["auto", "bf16", "fp16", "fp32"]
TaskName = Literal["label", "choice", "json", "number", "regex", "text", "perplexity"]

FormatName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt",
    "qa",
    "classification",
    "multiple_choice",
    "text",
    "preference",
    "kto",
]

PLAIN_MICRO_BATCH = 4
"""Examples in a micro-batch where no card is known to choose for."""

DEFAULT_LR: dict[ObjectiveName, dict[Method, float]] = {
    "sft": {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5},
    "cpt": {"lora": 2e-5, "qlora": 2e-5, "full": 2e-5},
    "dpo": {"lora": 5e-6, "qlora": 5e-6, "full": 5e-7},
    "orpo": {"lora": 8e-5, "qlora": 8e-5, "full": 8e-6},
    "simpo": {"lora": 6e-6, "qlora": 6e-6, "full": 6e-7},
    "kto": {"lora": 5e-6, "qlora": 5e-6, "full": 5e-7},
}
"""Peak rates. Preference objectives: what their papers used for full fine-tuning, and ten times that for adapters."""

PAIR_OBJECTIVES: tuple[ObjectiveName, ...] = ("dpo", "orpo", "simpo", "kto")
"""Objectives that compare two sequences: of a row's chosen and rejected answer (kto: of two prompts with one answer)."""

DEFAULT_BETA: dict[ObjectiveName, float] = {"dpo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}

_ONE_PACKED_EPOCH: dict[str, dict[str, Any]] = {
    "data": {"packing": True},
    "optimizer": {"warmup_ratio": 0.1},
    "training": {"epochs": 1},
}

OBJECTIVE_DEFAULTS: dict[ObjectiveName, dict[str, dict[str, Any]]] = {
    "sft": {},
    **dict.fromkeys(("cpt", *PAIR_OBJECTIVES), _ONE_PACKED_EPOCH),
}
"""Defaults, by section and key, that an objective has for itself."""


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors, never ignored."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """Which model, and in which precision it runs."""

    name: str = ""
    """A model folder (safetensors), a .gguf file, or a hub id such as `org/model`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dtype: DType = "auto"
    """Compute type, and storage type of frozen weights. `auto`: bf16 where the hardware has it, else fp16 (GPU) or fp32 (CPU). Trainable weights are fp32, but for `optimizer.weights_dtype: bf16`."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    engine: Literal["auto", "reference", "fused"] = "auto"
    """`reference` runs the model's own modules, `fused` our decoder layers; `auto` is `fused` on an NVIDIA GPU for the families that it knows."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of the reference engine. `sdpa` means `eager` for models that soft-cap attention scores (Gemma 2), which transformers' `sdpa` would leave out, and for those that have no `sdpa` (gpt-oss)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: a model that needs it is refused."""


class SourceConfig(Section):
    """A file (or hub data set) of examples, and how its rows are read."""

    path: str = ""
    """A file (JSON Lines, JSON, CSV, TSV, Parquet, Arrow or plain text, also gzipped), a folder of them, or a hub id such as `org/dataset`."""
    split: str | None = None
    """Which split of a hub data set or a folder. Default: `train`, or the only one."""
    subset: str | None = None
    """Which configuration of a hub data set."""
    streaming: bool = False
    """Read a hub data set over the network as far as `max_rows`, instead of downloading all of it."""
    format: FormatName = "auto"
    """What the rows hold. `auto` recognises it by the keys and says what it found."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which of your columns holds what, e.g. `{instruction: question, output: reply}`; the names that LLaMA-Factory and Axolotl use are understood too."""
    roles: dict[str, str] = Field(default_factory=dict)
    """What your role names mean, e.g. `{customer: user, agent: assistant}`."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What one example of a plain text file is: the whole file, a paragraph (blank lines between), or a line."""


class MixConfig(SourceConfig):
    """One of several sources."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its share of the examples, relative to the other weights."""


class DataConfig(SourceConfig):
    """Which examples, and how they become tokens."""

    mix: list[MixConfig] = Field(default_factory=list)
    """Several sources instead of `path`, e.g. `[{path: task.jsonl, weight: 0.8}, {path: general.jsonl, weight: 0.2}]`. No row of a file is taken twice: the source that runs out first sets the size."""
    eval_path: str | None = None
    """Held-out examples for evaluation during training, read as the training data is."""
    eval_split: str | None = None
    """Which split of `eval_path`, if that is a hub data set or a folder."""
    general_path: str | None = None
    """Other held-out text, or chats, of what the base model could do before: `general_loss` and `general_perplexity` at each evaluation say what is forgotten."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training rows to hold out when there is no `eval_path`."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only this many training rows, drawn with the run's seed (streamed data: the first ones)."""
    skip_bad_rows: bool = False
    """Leave out rows with errors, and say which, instead of stopping."""
    max_seq_length: Annotated[int, Field(ge=8)] | Literal["auto"] = 2048
    """Longest example in tokens. `auto`: the data's 95th percentile x 1.2, rounded up to a multiple of 64, never above the model's limit."""
    overlong: Literal["auto", "error", "truncate", "drop", "split"] = "auto"
    """What to do with an example that is longer than `max_seq_length`. `split` makes several of it; `auto` splits plain text and refuses conversations."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens the loss covers: the assistant's turns with their end-of-turn token, only the last of them, or every token. Plain text is always covered whole; a message's own `train` or `weight` comes first."""
    chat_template: str = "auto"
    """`auto` (the tokenizer's own, else `alpaca`), a named one (`alpaca`, `vicuna`, `chatml`, `llama2`), `none` (prompt and answer joined as they are), or a .jinja file."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, e.g. `{enable_thinking: false}`; the same in training, evaluation and chat."""
    packing: bool | Literal["auto"] = "auto"
    """Lay the examples of a micro-batch end to end without padding, isolated from each other; the gradient is the same. `auto`: where that is predicted to be faster, which it is with the fused engine where lengths differ (the reference engine's attention covers the whole packed row); the run's config.yaml says what it was."""
    cache: bool = True
    """Keep the tokens on disk, so that the same data, template and tokenizer are not tokenized again."""
    num_proc: Annotated[int, Field(ge=1)] | None = None
    """Processes that tokenize. Default: as many as the machine has cores and the data keeps busy."""

    @property
    def packed(self) -> bool:
        """Whether rows are packed; not, as long as `auto` was not decided."""
        return self.packing is True

    def held_out(self, path: str) -> SourceConfig:
        """Held-out data at `path`: its rows are read as the training rows are; which split or sample is its own."""
        return SourceConfig(
            path=path,
            split=self.eval_split if path == self.eval_path else None,
            subset=self.subset if path == self.path else None,
            format=self.format,
            columns=self.columns,
            roles=self.roles,
            sample_by=self.sample_by if Path(path).suffix == Path(self.path).suffix else "document",
        )


class AdapterConfig(Section):
    """The LoRA adapter (not used by `method: full`)."""

    r: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is alpha / r · B A (alpha / √r with `rslora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear`, `attention`, `mlp`, `qv`, or a list of module names and of these. `experts` in a list means a mixture's experts, which no preset does: `[attention, experts]`."""
    rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    init_lora_weights: Annotated[str, Field(pattern=r"^(default|olora|(pissa|loftq)(_niter_[1-9][0-9]*)?)$")] = (
        "default"
    )
    """How A and B begin. `default`: A at random, B at zero. `pissa` (Meng et al. 2024, arXiv:2404.02948): the largest singular values of the weights, exactly or, faster, by `pissa_niter_16` iterations; `olora` (Büyükakyüz 2024, arXiv:2406.01775): from their QR decomposition. Both take their part out of the frozen weights, which must not be quantized. `loftq` (Li et al. 2023, arXiv:2310.08659): the largest singular values of what 4-bit quantization lost (`method: qlora`); `loftq_niter_5` quantizes what is left anew, and so on five times. The finished run's adapter is written as a plain one of twice the rank, for the base as it was."""
    dora: bool = False
    """DoRA (Liu et al. 2024, arXiv:2402.09353): the magnitude of each output's weights trains apart from their direction. Runs in the reference engine."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = Field(default_factory=dict)
    """Ranks of some modules instead of `r`, by a module name's ending or a regular expression, e.g. `{down_proj: 32}`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Values of `alpha` of some modules, written as in `rank_pattern`."""
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Decoder layers, from 0, that get an adapter. Default: all."""
    modules_to_save: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Modules that train in full beside the adapter and are saved with it, by a name's ending, e.g. `[lm_head, embed_tokens]`: in fp32, at the same rate, with weight decay where they are matrices. Where the model ties its head to its embeddings, naming one trains both, tied as they are."""
    new_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Tokens to add to the vocabulary, e.g. `["<|tool|>"]`. Their rows of the embeddings and of the head begin as the mean of all others and train; other rows stay frozen. The tokenizer is saved with the adapter."""
    init_from: str | None = None
    """Continue training this adapter (a PEFT folder or a run) instead of a fresh one. Its own rank and targets apply."""


class QuantizationConfig(Section):
    """How the frozen base is quantized (only with `method: qlora`)."""

    scheme: Literal["nf4", "fp4", "int8"] = "nf4"
    """bitsandbytes' 4-bit NormalFloat, 4-bit float, or 8-bit."""
    double_quant: bool = True
    """Quantize the block scales too (0.37 bit a weight less)."""


class ObjectiveConfig(Section):
    """What is minimised."""

    name: ObjectiveName = "sft"
    """`sft`: cross-entropy on the supervised tokens (of chats, or of plain text). `cpt`: continued pre-training, cross-entropy on every token of plain text; where they are not set it takes one epoch, a rate of 2e-5, a warm-up of 0.1 and packed rows. `dpo`, `orpo`, `simpo`: preferences, of rows with a chosen and a rejected answer; `kto`: of answers that are labelled desirable or not (or of such pairs, which are two rows each). These four take one epoch, a warm-up of 0.1 and rates of their own."""
    beta: Annotated[float, Field(gt=0)] | None = None
    """dpo, kto: how dear it is to leave the reference, the model as it stands when training begins; orpo: the weight of the odds ratio (the paper's lambda); simpo: the scale of the mean log-probabilities. Default: 0.1, for simpo 2."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """dpo: `sigmoid` (Rafailov et al. 2023, arXiv:2305.18290), `hinge` (Zhao et al. 2023, arXiv:2305.10425), `ipo` (Azar et al. 2023, arXiv:2310.12036, with log-probabilities a token)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo with `sigmoid`, simpo: the share of pairs that are taken to be the wrong way round (cDPO, Mitchell 2023)."""
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """dpo: adds this times the cross-entropy of the chosen answers' tokens, which keeps their probability from falling (Pang et al. 2024, arXiv:2404.19733)."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """simpo: the margin that the chosen answer is to have (Meng et al. 2024, arXiv:2405.14734)."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """kto: the weight of desirable rows (Ethayarajh et al. 2024, arXiv:2402.01306: weight times number of either kind should be within 1 to 4/3)."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """kto: the weight of undesirable rows."""


class OptimizerConfig(Section):
    """The optimizer, its rate and its schedule."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw"
    """AdamW, in PyTorch or with bitsandbytes' 8-bit or paged states."""
    weights_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights and gradients of full fine-tuning. `bf16` takes half the memory (with `adamw_8bit` 6 bytes a parameter instead of 10): updates are computed in fp32 and rounded stochastically (Zamirai et al. 2020, arXiv:2010.06192). The gradients of micro-batches are added up in bf16 too, which costs 0.2% of their norm for 2 of them, 0.5% for 16, 1% for 64, 4% for 256: prefer few, large ones."""
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate. Default: 2e-4 for lora and qlora, 2e-5 for full and for continued pre-training; full fine-tuning (adapters ten times that) on preferences: dpo and kto 5e-7, orpo 8e-6, simpo 6e-7."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the rate of the adapter's B matrices as a multiple of `lr`, which stays A's. The paper's choice is 16, with `lr` lower than usual."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay; never applied to norms and biases."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's moment decays."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Adam's epsilon."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps over which the rate rises from zero."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    """Clip the global gradient norm to this."""
    skip_spikes: bool = True
    """Take no step whose gradient norm is more than ten times the median of the last 64 steps', and ten times `max_grad_norm`. A step whose loss or gradient is not finite is never taken."""


class EarlyStoppingConfig(Section):
    """Stop when a metric no longer gets better (off unless `metric` is set)."""

    metric: str | None = None
    """Name of any evaluation metric, e.g. `eval_loss` or `accuracy`."""
    mode: Literal["min", "max"] | None = None
    """Whether smaller or larger is better. Default: `min` for names that end in `loss`, `perplexity`, `kl` or `/rejected`, else `max`."""
    patience: Annotated[int, Field(ge=1)] = 3
    """Evaluations without improvement before stopping."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change that counts as an improvement."""


class TrainingConfig(Section):
    """The loop."""

    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the data."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Effective batch: examples in one optimizer step. Packing and micro-batches never change it."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Examples in one forward and backward pass; gradients are accumulated over batch_size / micro_batch_size of them. `auto`: what takes the least time within the memory there is (a token budget where rows are packed, `micro_batch_tokens`); the run's config.yaml says what it was."""
    micro_batch_tokens: Annotated[int, Field(ge=8)] | None = None
    """Token budget of a micro-batch: examples are packed into it best-fit, however many they are (needs `data.packing`; replaces `micro_batch_size`)."""
    batch_tokens: Annotated[int, Field(ge=8)] | None = None
    """Effective batch in tokens instead of examples: each step takes batch_tokens / micro_batch_tokens micro-batches, packed over the whole epoch, so that hardly a slot is empty. Replaces `batch_size`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 3407
    """Seeds initialisation, data order, dropout and noise."""
    neftune_alpha: Annotated[float, Field(ge=0)] = 0.0
    """NEFTune (Jain et al. 2023, arXiv:2310.05914): uniform noise on the input embeddings in training, in [-1, 1] · alpha / √(tokens of the example · hidden size). The paper takes 5 to 15; 0: none. Micro-batches are then no CUDA graphs."""
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between lines in events.jsonl."""
    trackers: list[TrackerName] | Literal["auto"] = "auto"
    """Tools that are shown the run's numbers: `tensorboard` (in the run folder), `wandb`, `trackio`, `mlflow`. `auto`: TensorBoard, where it is installed; `[]`: none. events.jsonl has everything in any case."""
    tracker_project: Annotated[str, Field(min_length=1)] = "tunesmith"
    """The project (MLflow: experiment) that trackers file the run under, by the name of its folder."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations. Default: once an epoch, if there is evaluation data."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints. Default: once an epoch."""
    cuda_graphs: bool = True
    """Replay a micro-batch as a CUDA graph where launching its kernels takes longer than running them (fused engine, GPU). A shape is captured when it first comes: where the plan finds that this saves no time, the run's config.yaml says false."""
    save_total_limit: Annotated[int, Field(ge=1)] | None = 2
    """How many checkpoints to keep (the best one is kept besides)."""
    early_stopping: EarlyStoppingConfig = Field(default_factory=EarlyStoppingConfig)

    @property
    def micro_batch(self) -> int:
        """Examples in a micro-batch: as set, or as long as nothing was planned 4, and never more than `batch_size`."""
        size = PLAIN_MICRO_BATCH if self.micro_batch_size == "auto" else self.micro_batch_size
        return min(size, self.batch_size)


class MemoryConfig(Section):
    """How much memory training may take, and what is given up for it."""

    mode: Literal["auto", "min", "fast"] = "auto"
    """`auto`: the least time within the memory there is: activations are kept as far as they fit, else computed again; `min`: the least memory; `fast`: keep all activations, or refuse to start."""
    limit_gb: Annotated[float, Field(gt=0)] | None = None
    """Cap in GB (2^30 bytes). On CUDA it is enforced. Default: what is free when the run starts, other processes' use counted."""
    calibrate: bool = True
    """Run one forward and backward on the largest micro-batch before training, and plan again if it takes more or less memory than predicted (GPU)."""


class JudgeConfig(Section):
    """A language model that judges answers (docs/judge.md). Off unless `url` is set."""

    url: str | None = None
    """An OpenAI-compatible endpoint (`https://api.openai.com/v1`), or `local:PATH` for a model or run on this machine."""
    model: str = ""
    """The name of the model that the endpoint knows."""
    mode: Literal["pairwise", "score"] = "pairwise"
    """`pairwise`: which of two answers is better, tuned or base, asked in both orders; `score`: 1 to 10 for each."""
    rubric: str = "general"
    """What good answers are: a shipped rubric's name, or a Markdown file."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """The environment variable that holds the key; null for a server that needs none."""
    temperature: float | None = 0.0
    """Not sent where it is null (some models refuse it)."""
    max_completion_tokens: int | None = 4096
    """Longest reply; not sent where it is null."""
    timeout: float = 60.0
    """Seconds without a byte until a request is repeated."""
    max_retries: int = 6
    """Repetitions of a request after a rate limit, a server's error, a timeout or a lost connection."""
    workers: int = 8
    """Requests at once."""
    price_per_million: tuple[float, float] | None = None
    """The price of a million prompt and completion tokens, to be told the cost."""
    max_requests: int | None = None
    """Refuse to ask more than this."""
    max_unjudged: float = 0.1
    """Share of the rows that may stay without a readable verdict."""


class EvaluationConfig(Section):
    """Generated answers during and after training, and what `tunesmith eval` measures."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest generated answer."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Prompts generated at once. `auto`: 16 on the CPU, on a GPU as many as half of its free memory holds, at most 1,024."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Generate answers to this many rows at most: a fixed sample, the same at every evaluation. `eval_loss` uses every row."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Log so many generated answers at each evaluation during training, always to the same held-out questions (of preferences: to prompts)."""
    generate: bool = False
    """Also generate and score answers at each evaluation during training (the loss is always computed)."""
    task: Literal["auto", "label", "choice", "json", "number", "regex", "text", "perplexity"] = "auto"
    """What kind of task the questions are, which decides the metrics (docs/evaluation.md). `auto`: what the data's shape says."""
    pattern: str | None = None
    """Task `regex`: the regular expression that right answers contain."""
    json_schema: str | None = None
    """Task `json`: a file with the JSON Schema that answers are to obey."""
    metrics: list[str] = Field(default_factory=list)
    """Metrics of your own, `FILE.py:FUNCTION`, beside the task's."""
    retain_path: str | None = None
    """`--retain`: a file of questions with choices to ask instead of the shipped mix."""
    retain_drop: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """`--retain`: by how much general ability may fall, as a fraction of 1, before the gate fails."""
    tasks_path: str | None = None
    """`--tasks`: a folder of task files of lm-evaluation-harness, which needs no network. Default: the harness's own catalogue."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """`--tasks`: solved examples in each prompt. Default: each task's own."""
    tasks_chat_template: bool = False
    """`--tasks`: ask in turns of the model's chat template, where the harness asks in plain text by default."""
    judge: JudgeConfig = Field(default_factory=JudgeConfig)

    @field_validator("pattern")
    @classmethod
    def _is_regex(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return pattern


class RunConfig(Section):
    """Everything a run is told."""

    method: Method = "lora"
    """`lora`, `qlora` (LoRA over a quantized base) or `full`."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    @model_validator(mode="before")
    @classmethod
    def _objectives_defaults(cls, raw: Any) -> Any:
        """`raw` with what its objective has for defaults where nothing was set."""
        objective = raw.get("objective") if isinstance(raw, Mapping) else None
        name = objective.get("name") if isinstance(objective, Mapping) else None
        if not isinstance(name, str) or name not in OBJECTIVE_DEFAULTS:
            return raw
        found = dict(raw)
        for section, defaults in OBJECTIVE_DEFAULTS[name].items():
            given = found.get(section)
            if given is None or isinstance(given, Mapping):
                found[section] = {**defaults, **(given or {})}
        return found

    @property
    def usual_lr(self) -> float:
        """The peak learning rate that the objective and the method have by default."""
        return DEFAULT_LR[self.objective.name][self.method]

    @property
    def lr(self) -> float:
        """The peak learning rate: the one set, or the default."""
        return self.usual_lr if self.optimizer.lr is None else self.optimizer.lr

    @property
    def beta(self) -> float:
        """`objective.beta`: the one set, or the objective's default (of one that has none: 0)."""
        return DEFAULT_BETA.get(self.objective.name, 0.0) if self.objective.beta is None else self.objective.beta

    @property
    def pairs(self) -> bool:
        """Whether the objective compares two sequences."""
        return self.objective.name in PAIR_OBJECTIVES

    @property
    def needs_bf16(self) -> bool:
        """Whether only a device with bf16 will do."""
        return self.model.dtype == "bf16" or self.optimizer.weights_dtype == "bf16"

    def resolved(self) -> RunConfig:
        """A copy in which every default that depends on another setting is written out."""
        copy = self.model_copy(deep=True)
        copy.optimizer.lr = self.lr
        if self.pairs:
            copy.objective.beta = self.beta
        early = copy.training.early_stopping
        if early.metric and early.mode is None:
            early.mode = "min" if early.metric.endswith(("loss", "perplexity", "kl", "/rejected")) else "max"
        return copy

    def to_yaml(self) -> str:
        """The configuration as YAML that `load_config` reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# What the peers call some of our keys. Only used in the message about an unknown key.
NAMES_ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "per_device_train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size (examples in one optimizer step)",
    "lora_r": "adapter.r",
    "rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "max_length": "data.max_seq_length",
    "sequence_len": "data.max_seq_length",
    "cutoff_len": "data.max_seq_length",
    "load_in_4bit": "method: qlora",
    "lr_scheduler_type": "optimizer.schedule",
    "gradient_checkpointing": "memory.mode",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "dataset": "data.path",
}


def load_config(
    path: str | Path | None = None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Build a RunConfig from a YAML file, then `values` (dotted keys), then `section.key=value` overrides.

    Raises ConfigError with one line for every problem found in any of them.
    """
    raw: dict[str, Any] = {}
    lines: dict[tuple[str, ...], int] = {}
    problems: list[str] = []
    if path is not None:
        raw, lines = read_yaml(Path(path))
    origin = {key: f"{path}:{line}" for key, line in lines.items()}
    if path is not None:
        origin[()] = str(path)
    for dotted, value in (values or {}).items():
        _assign(raw, tuple(dotted.split(".")), value, problems, dotted)
        origin[tuple(dotted.split("."))] = ""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys):
            problems.append(f"--set {override}: expected section.key=value, e.g. --set adapter.r=8")
            continue
        try:
            value = string_keys(yaml.load(text, Loader)) if text.strip() else None
        except (yaml.YAMLError, RecursionError):
            value = text
        _assign(raw, keys, value, problems, f"--set {override}")
        origin[keys] = f"--set {override}"
    config, found = _validate(raw, origin)
    problems += found
    if problems:
        raise ConfigError(problems)
    assert config is not None
    return config


def config_from_dict(raw: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from nested dictionaries. Raises ConfigError with every problem."""
    config, problems = _validate(dict(raw), {})
    if config is None or problems:
        raise ConfigError(problems)
    return config


def json_schema() -> str:
    """The JSON schema of RunConfig, for editors: what `run.schema.json` beside this file holds."""
    schema = RunConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tunesmith run configuration"
    return json.dumps(schema, indent=2) + "\n"


def _validate(raw: dict[str, Any], origin: Mapping[tuple[str, ...], str]) -> tuple[RunConfig | None, list[str]]:
    """Validate; where keys are wrong, take them out and check the rest too, so that all problems come at once."""
    problems: list[str] = []
    wrong: set[str] = set()
    config: RunConfig | None = None
    while config is None:
        try:
            config = RunConfig.model_validate(raw)
        except ValidationError as error:
            before = json.dumps(raw, default=str)
            words = {  # what a union takes beside numbers or booleans
                _known_path(tuple(map(str, item["loc"]))): item["ctx"]["expected"]
                for item in error.errors()
                if item["type"] == "literal_error"
            }
            for item in error.errors():
                loc = tuple(part for part in map(str, item["loc"]) if not part.startswith(("function", "constrained")))
                path = ".".join(_prune(raw, loc))
                if path not in wrong:  # a union reports each of its branches: one line is enough
                    problems.append(_describe(item, loc, origin, words.get(_known_path(loc))))
                wrong.add(path)
            if json.dumps(raw, default=str) == before:
                return None, problems
    for key, message in contradictions(config).items():
        if any(cause in wrong and key.startswith(CAUSES[cause]) for cause in CAUSES):
            continue  # the cause was taken out: what it leaves unused is not known
        if not any(f"{key}.".startswith(f"{bad}.") for bad in wrong):
            problems.append(_place(tuple(key.split(".")), origin) + message)
    return (config if not problems else None), problems


def _describe(item: Any, loc: tuple[str, ...], origin: Mapping[tuple[str, ...], str], word: str | None = None) -> str:
    """One line for one pydantic error: where, what was found, what is allowed (or `word`, the literal of its union)."""
    known = _known_path(loc)
    prefix = _place(loc, origin)
    if item["type"] == "extra_forbidden":
        dotted = repr(".".join(loc))[1:-1]  # control characters escaped: a problem is one line
        hint = _nearest(loc)
        return f"{prefix}unknown key `{dotted}`" + (f"; did you mean `{hint}`?" if hint else "")
    dotted = ".".join(known) or ".".join(loc)
    found = item.get("input")
    shown = json.dumps(found, default=str, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = item["msg"][0].lower() + item["msg"][1:]
    if item["type"] == "model_type":
        message = "expected a section of `key: value` lines"
    elif word and item["type"] != "literal_error":
        message = f"{message.partition(', ')[0]} or {word}"
    return f"{prefix}`{dotted}` is {shown}: {message}"


def _place(loc: tuple[str, ...], origin: Mapping[tuple[str, ...], str]) -> str:
    """`file:line: ` or `--set ...: ` of the key, else of one below it, else of the nearest section above it."""
    near = [loc, *(key for key in origin if key[: len(loc)] == loc), *(loc[:n] for n in range(len(loc) - 1, -1, -1))]
    place = next((origin[key] for key in near if key in origin), "")
    return f"{place}: " if place else ""


def _nearest(loc: tuple[str, ...]) -> str | None:
    """The known key that an unknown one most likely stands for."""
    leaf = loc[-1]
    if leaf in NAMES_ELSEWHERE:
        return NAMES_ELSEWHERE[leaf]
    paths = {path: path.rsplit(".", 1)[-1] for path in _all_keys(RunConfig)}
    section = ".".join(loc[:-1])
    same_section = [path for path in paths if path.rpartition(".")[0] == section]
    for candidates in (same_section, list(paths)):
        leaves = {paths[path]: path for path in reversed(candidates)}
        match = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
        if match:
            return leaves[match[0]]
    return None


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _all_keys(info.annotation, f"{prefix}{name}.")


def _known_path(loc: tuple[str, ...]) -> tuple[str, ...]:
    """`loc` up to the configuration key: without pydantic's union branches and list positions."""
    model: type[BaseModel] | None = RunConfig
    kept: list[str] = []
    for part in loc:
        if model is None or part not in model.model_fields:
            break
        kept.append(part)
        annotation = model.model_fields[part].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return tuple(kept)


def _prune(raw: dict[str, Any], loc: tuple[str, ...]) -> tuple[str, ...]:
    """Remove the value at `loc` (or at the nearest configuration key above it) from `raw`; returns what was removed."""
    path = _known_path(loc)
    if len(path) < len(loc) and isinstance(_get(raw, path), dict) and loc[len(path)] in _get(raw, path):
        path = (*path, loc[len(path)])
    parent = _get(raw, path[:-1])
    if path and isinstance(parent, dict):
        parent.pop(path[-1], None)
    return path


def _get(raw: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        raw = raw.get(part) if isinstance(raw, dict) else None
    return raw


def _assign(raw: dict[str, Any], keys: tuple[str, ...], value: Any, problems: list[str], shown: str) -> None:
    target = raw
    for key in keys[:-1]:
        child = target.setdefault(key, {})
        if child is None:
            child = target[key] = {}
        if not isinstance(child, dict):
            problems.append(f"{shown}: `{key}` is a value, not a section")
            return
        target = child
    target[keys[-1]] = value
