"""The same service by vLLM, as its command line: for more requests than this engine is made for.

Options as in `vllm serve --help` (docs.vllm.ai, "LoRA adapters" and "vllm serve").
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ConfigError, ModelError
from tunesmith.models.adapters import find_adapter
from tunesmith.serving.addresses import is_loopback

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""

DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


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
    adapters: Mapping[str, str],
    templates: Mapping[str, Path],
    host: str,
    port: int,
    dtype: str = "auto",
    max_batch: int = 256,
    api_key_env: str | None = None,
) -> VllmCommand:
    """The command that serves `model` under `name` with `adapters` (name: folder). `templates` are those adapters' chat templates.

    vLLM has one chat template for all models of a server: raises ConfigError where the adapters' differ.
    """
    found = {adapter: find_adapter(Path(path)).resolve() for adapter, path in adapters.items()}
    texts = {adapter: path.read_text(encoding="utf-8") for adapter, path in templates.items()}
    if len(set(texts.values())) > 1:
        raise ConfigError(
            f"the chat templates of {' and '.join(texts)} differ, and vLLM has one for all models of a server; start one vLLM for each, "
            "or serve them with tunesmith's own engine"
        )
    arguments = ["vllm", "serve", model, "--served-model-name", name, "--host", host, "--port", str(port)]
    arguments += ["--dtype", DTYPES[dtype], "--max-num-seqs", str(max_batch)]
    if found:
        arguments += ["--enable-lora", "--max-loras", str(len(found))]
        arguments += ["--max-lora-rank", str(_rank_for(found))]
        arguments += ["--lora-modules", *(f"{adapter}={folder}" for adapter, folder in found.items())]
    if templates:
        arguments += ["--chat-template", str(next(iter(templates.values())).resolve())]
    # Whoever may load adapters names any folder: vLLM's own warning is against this where others reach the server.
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if found and is_loopback(host) else {}
    if api_key_env:
        environment["VLLM_API_KEY"] = f"${api_key_env}"
    return VllmCommand(tuple(arguments), environment)


def _rank_for(folders: Mapping[str, Path]) -> int:
    """The smallest rank that vLLM allows and that holds every adapter."""
    most = 0
    for folder in folders.values():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        most = max([most, config["r"], *(config.get("rank_pattern") or {}).values()])
    fitting = [rank for rank in RANKS if rank >= most]
    if not fitting:
        raise ModelError(f"an adapter has rank {most}, and vLLM holds at most {RANKS[-1]}; merge it and serve it alone")
    return fitting[0]
