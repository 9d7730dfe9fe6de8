"""The same service by vLLM, as its command line: for more requests than this engine is made for.

Options, and what of adapters it takes, are those of vLLM 0.33.0: `vllm/entrypoints/common/cli_args.py`, `vllm/engine/arg_utils.py`,
`vllm/config/lora.py`, `vllm/lora/peft_helper.py`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, ModelError
from tunesmith.serving.addresses import is_loopback

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (1 too, which 8 holds)."""

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Texts that `init_lora_weights` may be; others began with weights that they took out of the base."""


@dataclass(frozen=True, slots=True)
class VllmCommand:
    """Arguments, and what goes into the environment: a key on the command line would show in every list of processes."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """As one types it. A key stands there as the variable that it comes from."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


def vllm_command(
    model: str,
    name: str,
    adapters: Mapping[str, Path],
    template: Path | None,
    host: str,
    port: int,
    dtype: str = "auto",
    max_batch: int = 256,
    api_key_env: str | None = None,
) -> VllmCommand:
    """The command that serves `model` under `name` with `adapters` (name: PEFT folder), all in the chat template of a file.

    Raises ModelError for adapters that vLLM would refuse when it is asked for them, and ConfigError for an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: expected {', '.join(DTYPES)}")
    arguments = ["vllm", "serve", model, "--served-model-name", name, "--host", host, "--port", str(port)]
    # Else a model's generation_config.json gives temperature, top_p and penalties to requests that name none.
    arguments += ["--generation-config", "vllm", "--dtype", DTYPES[dtype], "--max-num-seqs", str(max_batch)]
    if adapters:
        arguments += ["--enable-lora", "--max-loras", str(len(adapters))]
        arguments += ["--max-lora-rank", str(_rank_for(adapters))]
        arguments += ["--lora-modules", *(_module(adapter, folder) for adapter, folder in adapters.items())]
    if template is not None:
        arguments += ["--chat-template", str(template)]
    environment = {}
    if adapters and api_key_env and is_loopback(host):
        # Whoever may load adapters names any folder: vLLM warns against it where others reach the server, and it looks at no Host,
        # so that without a key any page in a browser here could be one of them.
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
    if api_key_env:
        environment["VLLM_API_KEY"] = f"${api_key_env}"
    return VllmCommand(tuple(arguments), environment)


def refuse_base(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a base, by its config.json, that this vLLM cannot load."""
    stored = config.get("quantization_config")
    if isinstance(stored, dict) and stored.get("quant_method") == "bitsandbytes":
        raise ModelError(
            f"{name}: its weights are stored by bitsandbytes, which vLLM 0.33 no longer has; serve it with tunesmith's own engine, or "
            "the 16-bit model with vLLM"
        )


def _module(name: str, folder: Path) -> str:
    """NAME=PATH; vLLM takes what has a comma for JSON."""
    plain = f"{name}={folder}"
    return json.dumps({"name": name, "path": str(folder)}) if "," in plain else plain


def _rank_for(folders: Mapping[str, Path]) -> int:
    """The smallest rank that vLLM allows and that holds every adapter: of each the largest of `r` and the ranks in its pattern."""
    most = 0
    for name, folder in folders.items():
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in STARTS:
            raise ModelError(f"{path}: init_lora_weights is {start!r}, with which vLLM refuses {name}; merge it")
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        if not all(type(rank) is int and rank > 0 for rank in ranks):
            raise ModelError(f"{path}: r and the values of rank_pattern must be whole numbers from 1")
        if max(ranks) > RANKS[-1]:
            raise ModelError(
                f"{path}: rank {max(ranks)}, and vLLM holds at most {RANKS[-1]}; merge it and serve it alone"
            )
        most = max([most, *ranks])
    return next(rank for rank in RANKS if rank >= most)
