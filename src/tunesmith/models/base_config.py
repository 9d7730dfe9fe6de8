"""What of a base's config.json changes its computation: the same weights under another rope_theta or rms_norm_eps are another model.

Values are recorded as the file has them, and compared as the transformers that is here reads both: files that were saved again by another
version, with renamed keys (rope_theta became rope_parameters) or more defaults, are the same base.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tunesmith.errors import shown
from tunesmith.models.load import ModelSource

NOT_COMPUTED = frozenset({
    "architectures", "auto_map", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "dtype", "torch_dtype", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "id2label", "label2id",
    "problem_type", "return_dict", "output_hidden_states", "output_attentions", "_attn_implementation", "attn_implementation", "vision_config",
    "audio_config", "gradient_checkpointing", "chunk_size_feed_forward", "pretraining_tp", "task_specific_params", "finetuning_task",
    "tokenizer_class", "is_decoder", "is_encoder_decoder", "add_cross_attention", "output_router_logits", "router_aux_loss_coef",
})  # fmt: skip
"""Names, versions, types (a run says its own), which tokens end what, how training begins, and towers that are not loaded."""


def computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json that decide what its model computes, for a record; of a nested text model its own."""
    return {
        key: computed(value) if key == "text_config" and isinstance(value, dict) else value
        for key, value in sorted(config.items())
        if key not in NOT_COMPUTED and "dropout" not in key and "pdrop" not in key
    }


def config_differences(recorded: Mapping[str, Any] | None, source: ModelSource) -> list[str]:
    """Which values of `source`'s config.json are other than recorded, as `rms_norm_eps 0.1 (recorded: 1e-06)`; none where nothing was recorded.

    Keys that were not recorded have their default on that side.
    """
    if not recorded:
        return []
    before, now = dict(recorded), computed(source.config)
    if before == now:
        return []
    one, other = _read(before), _read(now)
    if one is None or other is None:  # code of its own: as the files have them
        return _compare(before, {key: value for key, value in now.items() if key in before})
    return _compare(one, other)


def _read(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Values as transformers reads them, with its defaults; None where it does not."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[str(values.get("model_type"))].from_dict(copy.deepcopy(dict(values)))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StrictDataclassError):
        return None
    return computed(config.to_dict())


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> list[str]:
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _compare(old, new, f"{place}{key}.")
        elif old != new:
            found.append(f"{place}{key} {shown(new)} (recorded: {shown(old)})")
    return found
