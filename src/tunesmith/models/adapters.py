"""LoRA adapters through PEFT: which modules they go on, adding, loading and saving them.

Everything that PEFT does is PEFT's: the layers, the file format, the key names. This module chooses target modules,
keeps trainable weights in fp32 whatever the base is stored in, and refuses what would be silently ignored.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import AdapterConfig
from tunesmith.errors import ModelError
from tunesmith.models import loftq
from tunesmith.models.families import PRESETS, TAKEN_FOR_EXPERTS, taken_for_experts
from tunesmith.types import GB

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

QUERY_VALUE = {"q_proj", "v_proj", "query", "value"}
FUSED_QKV = {"qkv_proj", "query_key_value", "c_attn", "Wqkv"}


EXPERTS = "experts"
"""What `adapter.target_modules` calls all experts of a mixture; no preset means them."""

ROUTERS = {"gate", "router"}
"""Names of the linear layer that chooses experts, in families where it is one. It is never adapted."""


def target_modules(model: PreTrainedModel, setting: str | list[str]) -> list[str]:
    """The module-name endings that `adapter.target_modules` means for this model, e.g. ['down_proj', 'q_proj', ...].

    Presets are read off the model's own linear layers, so they fit any architecture: `all-linear` is every linear layer
    but the head, the routers of experts and those that PEFT cannot adapt (`left_out`), `attention` and `mlp` its two parts, `qv` the
    query and value projections (the fused one where query, key and value are one matrix). A list may hold presets too, and names of experts' parameters, which are
    `expert_parameters`' part. Raises ModelError if a preset or a name matches nothing.
    """
    linear = dict(_linear_layers(model))
    names = {path.rsplit(".", 1)[-1] for path in linear}
    if isinstance(setting, list):
        own = [name for name in setting if name not in PRESETS and not _experts_by_name(model, name)]
        unknown = [name for name in own if not any(_ends_in(path, name) for path in linear)]
        if unknown or not setting:
            raise ModelError(
                f"adapter.target_modules: {', '.join(unknown) or 'the empty list'} matches no linear layer of this "
                f"model; it has {', '.join(sorted(names))}{_and_experts(model)}"
            )
        presets = [target_modules(model, name) for name in setting if name in PRESETS]
        return sorted({*own, *(name for each in presets for name in each)})
    attention = {path.rsplit(".", 1)[-1] for path in linear if "attn" in path or "attention" in path}
    chosen = {
        "all-linear": names.difference(TAKEN_FOR_EXPERTS.get(model.config.model_type, ())) or names,
        "attention": attention,
        "mlp": names - attention,
        "qv": (names & QUERY_VALUE) or (names & FUSED_QKV),
    }.get(setting)
    if chosen is None:
        raise ModelError(
            f"adapter.target_modules is {setting!r}: expected one of {', '.join(PRESETS)}, or a list of module names"
        )
    if not chosen:
        raise ModelError(
            f"adapter.target_modules: {setting} matches no linear layer of this model; "
            f"it has {', '.join(sorted(names)) or 'none (its layers are of another type)'}{_and_experts(model)}"
        )
    return sorted(chosen)


def left_out(model_type: str, setting: str | list[str]) -> str | None:
    """What to say where `all-linear` means fewer linear layers than there are."""
    taken = TAKEN_FOR_EXPERTS.get(model_type)
    if taken is None or (setting != "all-linear" and "all-linear" not in setting):
        return None
    return (
        f"adapter.target_modules all-linear leaves {', '.join(sorted(taken))} of {model_type} out: PEFT takes these names for its "
        "experts' parameters; the linear layers of attention have adapters"
    )


def expert_parameters(model: PreTrainedModel, setting: str | list[str], layers: Sequence[int] | None) -> list[str]:
    """The paths of experts' parameters that `adapter.target_modules` names, for PEFT's `target_parameters`.

    In transformers 5 all experts of a layer are one parameter (E, out, in), no linear layers: PEFT gives each expert an A and a B
    of its own. A preset means none of them. PEFT keeps no `layers_to_transform` here, so that the paths do.
    """
    if isinstance(setting, str):
        return []
    found = {path for name in setting if name not in PRESETS for path in _experts_by_name(model, name)}
    numbers = {path: re.search(r"\.layers\.(\d+)\.", path) for path in found}
    return sorted(p for p, number in numbers.items() if layers is None or (number and int(number[1]) in layers))


def expert_paths(model: torch.nn.Module) -> list[str]:
    """Paths of all parameters that hold the matrices of several experts."""
    return [name for name, p in model.named_parameters() if p.ndim == 3 and f".{EXPERTS}." in name]


def _experts_by_name(model: PreTrainedModel, name: str) -> list[str]:
    """Experts' parameters that a name means: all by `experts`, else those it is the ending of, if no linear layer has it too."""
    paths = expert_paths(model)
    if name == EXPERTS or name.endswith(f".{EXPERTS}"):
        return [path for path in paths if _ends_in(path.rpartition(".")[0], name)]
    if any(_ends_in(path, name) for path, _ in _linear_layers(model)):
        return []
    return [path for path in paths if _ends_in(path, name)]


def _and_experts(model: PreTrainedModel) -> str:
    names = sorted({path.rpartition(".")[2] for path in expert_paths(model)})
    return f", and {EXPERTS} ({', '.join(names)}), which no preset means: name them in a list" if names else ""


def unquantized_experts(model: PreTrainedModel) -> str | None:
    """What to say of experts under a quantized base: bitsandbytes quantizes linear layers, and they are none."""
    found = dict(model.named_parameters())
    experts = [found[path] for path in expert_paths(model)]
    if not experts or not getattr(model, "is_quantized", False):
        return None
    size = sum(p.numel() * p.element_size() for p in experts) / GB
    bits = 8 * experts[0].element_size()
    return (
        f"the experts are not quantized: they stay in {bits} bits and take {size:.2f} GB, which the memory plan counts; "
        "method: qlora quantizes the other linear layers alone"
    )


def _ends_in(path: str, name: str) -> bool:
    """Whether `adapter.target_modules` means the module at `path` by `name`."""
    return path == name or path.endswith(f".{name}")


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Linear layers (plain, 4-bit and 8-bit ones derive from nn.Linear) inside the decoder's layers, but no router."""
    import torch

    head = model.get_output_embeddings()
    has_experts = any(f".{EXPERTS}." in path or path.endswith(f".{EXPERTS}") for path, _ in model.named_modules())
    for path, module in model.named_modules():
        is_router = has_experts and not ROUTERS.isdisjoint(path.split("."))
        if isinstance(module, torch.nn.Linear) and module is not head and not is_router:
            yield path, module


def modules_to_save(model: PreTrainedModel, names: Sequence[str], targets: Sequence[str]) -> list[str]:
    """What `adapter.modules_to_save` means for this model, in names that mean the same to PEFT.

    A name is the ending of a module's path that begins at a dot; PEFT takes any ending (`norm` is `input_layernorm` to it), and
    gets whole paths where that differs. Raises ModelError for a name that matches no module with weights of its own, for one
    that `targets`, the names of the adapter's, mean too, and for a module that is quantized.
    """
    paths = dict(model.named_modules(remove_duplicate=False))
    with_weights = {path: module for path, module in paths.items() if module._parameters and not module._modules}
    meant: list[str] = []
    for name in names:
        found = [path for path in with_weights if _ends_in(path, name)]
        if not found:
            raise ModelError(
                f"adapter.modules_to_save: {name} matches no module of this model that has weights itself; it has "
                f"{', '.join(sorted({path.rpartition('.')[2] for path in with_weights}))}"
            )
        both = [path for path in found if any(_ends_in(path, target) for target in targets)]
        if both:
            raise ModelError(
                f"adapter.modules_to_save: {name} is among adapter.target_modules too ({both[0]}); it can train in full or through "
                f"the adapter: take it out of one of the two (here target_modules means {', '.join(targets)})"
            )
        stored = [p.dtype for path in found for p in with_weights[path].parameters() if not p.is_floating_point()]
        if stored:
            raise ModelError(
                f"adapter.modules_to_save: {name} is quantized ({stored[0]}), and cannot train in full; take it out, or set "
                "method: lora"
            )
        alike = {path for path in paths if path.endswith(name)}
        meant += [name] if alike == set(found) else found
    return list(dict.fromkeys(meant))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the model's head and input embeddings are one matrix."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add `adapter.new_tokens` to the tokenizer, in place; returns their ids. Raises ModelError for one that it has.

    They are no special tokens: a text that holds one is encoded with it, and decoding keeps it (docs/decisions/007).
    """
    from tokenizers import AddedToken

    for number, token in enumerate(tokens):
        known = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(known) == 1 and known[0] != tokenizer.unk_token_id:
            raise ModelError(
                f"adapter.new_tokens: {token!r} is a token of this model already (id {known[0]}); remove it"
            )
        if token in tokens[:number]:
            raise ModelError(f"adapter.new_tokens: {token!r} is named twice; remove one of them")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    return [int(number) for number in tokenizer.convert_tokens_to_ids(list(tokens))]


def make_room(model: PreTrainedModel, rows: int) -> None:
    """Give embeddings and head at least `rows` rows, in place. Many models have more than their tokenizer has tokens."""
    if rows > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=False)


def begin_tokens(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Make room for new tokens, and set their rows to the mean of those before them (Hewitt 2021): every other row's
    logits move by at most ln(1 + new/old) nats, whatever the new rows would have drawn at random.
    """
    import torch

    if not ids:
        return
    make_room(model, max(ids) + 1)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            with torch.no_grad():
                weight: Any = module.weight
                mean = weight[: min(ids)].mean(0, dtype=torch.float32)
                weight[list(ids)] = mean.to(weight.dtype)


def _new_token_rows(model: PreTrainedModel, ids: Sequence[int], saved: Sequence[str]) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: the rows of new tokens in embeddings and head, but those that train in full."""
    if not ids:
        return None
    embeddings, head, tied = model.get_input_embeddings(), model.get_output_embeddings(), is_tied(model)
    places = [path for path, module in model.named_modules(remove_duplicate=False) if module in (embeddings, head)]
    in_full = [path for path in places if any(_ends_in(path, name) for name in saved)]
    if tied and in_full:
        return None
    found = {path: list(ids) for path in places if path not in in_full}
    if getattr(head, "bias", None) is not None and any(model.get_submodule(path) is head for path in found):
        raise ModelError(
            "adapter.new_tokens: this model's head has a bias, which PEFT leaves out where some rows train; name the head and the "
            "embeddings in adapter.modules_to_save to train them in full"
        )
    return found or None  # where the two are one matrix, PEFT trains one set of rows for both


def add_adapter(
    model: PreTrainedModel,
    config: AdapterConfig,
    base_name: str,
    new_ids: Sequence[int] = (),
    weights: Path | None = None,
) -> PeftModel:
    """Put a fresh LoRA adapter on `model`, drawn from torch's global generator, or the one at `adapter.init_from`.

    `new_ids` are the ids of `adapter.new_tokens` (`add_tokens`), `weights` is the folder of the base's files, which LoftQ reads. Only the adapter is trainable afterwards, in fp32, with the
    modules that it trains in full. Raises ModelError.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if config.init_from:
        saved_config = find_adapter(Path(config.init_from)) / "adapter_config.json"
        how = _json_object(saved_config).get("init_lora_weights")
        if isinstance(how, str) and how.startswith(("pissa", "olora", "loftq")):
            raise ModelError(
                f"adapter.init_from {config.init_from}: an adapter that {how} began, as a checkpoint has it, counts over weights "
                "that it changed; take the finished run's own adapter, which was converted"
            )
        adapted = load_adapter(model, Path(config.init_from), trainable=True)
    else:
        begin_tokens(model, new_ids)
        targets = target_modules(model, config.target_modules)
        layers = _known_layers(model, config.layers_to_transform)
        experts = expert_parameters(model, config.target_modules, layers)
        _refuse_with_experts(config, experts)
        saved = modules_to_save(model, config.modules_to_save, targets)
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            target_parameters=experts or None,
            modules_to_save=saved or None,
            trainable_token_indices=_new_token_rows(model, new_ids, saved),
            ensure_weight_tying=_saves_tied(model, saved),
            use_rslora=config.rslora,
            init_lora_weights=config.init_lora_weights
            if config.init_lora_weights.startswith(("pissa", "olora"))
            else True,
            use_dora=config.dora,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            layers_to_transform=layers,
            task_type="CAUSAL_LM",
        )
        wanted = _wanted(model, lora)
        try:
            with warnings.catch_warnings():  # of patterns that match experts, which it looks for among modules
                warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
                adapted = get_peft_model(model, lora)
        except ValueError as error:
            said = " ".join(str(error).split())
            raise ModelError(
                f"adapter.target_modules {config.target_modules}: PEFT cannot put this adapter on the model: {said}"
            ) from error
        _refuse_redirected(adapted, wanted, config)
        _refuse_unmatched(adapted, config)
        _refuse_ranks_above(adapted, config)
        if iterations := loftq.iterations_of(config.init_lora_weights):
            assert weights is not None  # who quantizes knows where they are
            loftq.begin(adapted, weights, iterations)
            adapted.peft_config["default"].init_lora_weights = "loftq"  # in checkpoints: PEFT refuses it without more
        if config.init_lora_weights != "default":
            adapted.beginning = {
                name: value.cpu().clone() for name, value in get_peft_model_state_dict(adapted).items()
            }
        adapted.peft_config["default"].base_model_name_or_path = base_name
    keep_trainable_in_fp32(adapted)
    return adapted


def _saves_tied(model: PreTrainedModel, saved: Sequence[str]) -> bool:
    """Whether a head that is the embeddings trains in full: PEFT then keeps it so, as full fine-tuning does."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module in ends]
    return is_tied(model) and any(_ends_in(path, name) for path in paths for name in saved)


def trains_beside_lora(model: torch.nn.Module) -> bool:
    """Whether whole modules, or rows of new tokens, train beside the adapter's matrices."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write an adapter in PEFT's format, to be loaded on the base as it was.

    One whose beginning was taken out of the base's weights (`adapter.init_lora_weights`) is written as its difference from that
    beginning, B·A - B₀·A₀: a plain adapter of twice the rank.
    """
    beginning = getattr(adapted, "beginning", None)
    if (
        beginning is None
    ):  # what is trained of the embeddings is saved in any case: PEFT would ask the hub for their size
        adapted.save_pretrained(folder, save_embedding_layers=False)
        return
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as place:
        save_file(beginning, Path(place) / "adapter_model.safetensors")
        plain = copy.deepcopy(adapted.peft_config["default"])
        plain.init_lora_weights = True  # so that PEFT takes the values as they are
        plain.save_pretrained(place)
        adapted.save_pretrained(folder, save_embedding_layers=False, path_initial_model_for_weight_conversion=place)


def _known_layers(model: PreTrainedModel, layers: list[int] | None) -> list[int] | None:
    """`adapter.layers_to_transform`, once each. Raises ModelError for a layer that the model does not have."""
    if layers is None:
        return None
    count = model.config.get_text_config().num_hidden_layers
    if max(layers) >= count:
        raise ModelError(
            f"adapter.layers_to_transform: {max(layers)} is no layer of this model, which has 0 to {count - 1}"
        )
    return sorted(set(layers))


def _wanted(model: PreTrainedModel, lora: LoraConfig) -> set[str]:
    """The linear layers that a configuration means."""
    names, layers = set(lora.target_modules or ()), lora.layers_to_transform
    found = {path for path, _ in _linear_layers(model) if any(_ends_in(path, name) for name in names)}
    if layers is None:
        return found
    numbers = {path: re.search(r"\.layers\.(\d+)\.", path) for path in found}
    return {path for path, number in numbers.items() if number and int(number[1]) in layers}


def _refuse_with_experts(config: AdapterConfig, experts: Sequence[str]) -> None:
    """Raise ModelError for settings that PEFT's wrapper of experts' parameters cannot do: it adds s·B·A to the weights themselves,
    so that the adapter has no input of its own to drop from.
    """
    begun = config.init_lora_weights
    for asked, setting, remedy in (
        (config.dropout > 0, f"adapter.dropout {config.dropout}", "set adapter.dropout: 0"),
        (config.dora, "adapter.dora", "set adapter.dora: false"),
        (begun != "default", f"adapter.init_lora_weights {begun}", "set adapter.init_lora_weights: default"),
    ):
        if asked and experts:
            raise ModelError(
                f"{setting}: PEFT cannot do it on experts, whose parameters are no linear layers ({experts[0]}); {remedy}, or take "
                f"the experts out of adapter.target_modules"
            )


def _refuse_redirected(adapted: PeftModel, wanted: set[str], config: AdapterConfig) -> None:
    """Raise ModelError where PEFT took names of linear layers for parameters of experts, and left those layers as they are."""
    from peft.tuners.lora import LoraLayer

    have = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    if missing := wanted - have:
        raise ModelError(taken_for_experts(config.target_modules, missing))


def _refuse_unmatched(adapted: PeftModel, config: AdapterConfig) -> None:
    """Raise ModelError for patterns that no adapted module matches: PEFT would ignore them."""
    from peft.tuners.lora import LoraLayer

    names = [
        f"{name.replace('.base_layer', '')}.{module.parameter_name}" if hasattr(module, "parameter_name") else name
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    ]
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                endings = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise ModelError(
                    f"adapter.{setting}: {pattern!r} matches no module that has an adapter; those are {endings}"
                )


def _refuse_ranks_above(adapted: PeftModel, config: AdapterConfig) -> None:
    """Raise ModelError where PiSSA or OLoRA would find fewer directions than the rank: PEFT makes the adapter as small without
    a word, and cannot convert it when the run is finished.
    """
    from peft.tuners.lora import LoraLayer

    if not config.init_lora_weights.startswith(("pissa", "olora")):
        return
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and module.r["default"] > (
            most := min(module.in_features, module.out_features)
        ):
            raise ModelError(
                f"adapter.r: {name} has {most} singular values, and adapter.init_lora_weights {config.init_lora_weights} takes "
                f"{module.r['default']} of them; lower adapter.r, or set adapter.rank_pattern: {{{name.rpartition('.')[2]}: {most}}}"
            )


def load_adapter(model: PreTrainedModel, path: Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter (a PEFT folder, or a run that has one) on `model`. Raises ModelError."""
    from peft import PeftModel
    from safetensors import SafetensorError

    folder = find_adapter(path)
    try:
        make_room(model, _rows_of(folder, model))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
            # Once more, for its report: `from_pretrained` returns none.
            report = adapted.load_adapter(str(folder), "default", is_trainable=trainable)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        re.error,
        RuntimeError,
        SafetensorError,
    ) as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 300 else f"{text[:297]}..."
        if isinstance(error, (TypeError, AttributeError, re.error, RecursionError)):  # of what PEFT does not check
            raise ModelError(
                f"{folder / 'adapter_config.json'}: PEFT makes no adapter of it ({text}); it is not as PEFT saves one, or is damaged"
            ) from error
        raise ModelError(f"{folder}: this adapter cannot be loaded on the model: {text}") from error
    for keys, what in (
        (report.missing_keys, "tensors of the adapter are missing from its file and would be random"),
        (report.unexpected_keys, "tensors in the adapter's file have no place in this model"),
    ):
        if keys:
            raise ModelError(f"{folder}: {len(keys)} {what} ({keys[0]}); it was made for another base, or is damaged")
    keep_trainable_in_fp32(adapted)
    return adapted


def _rows_of(folder: Path, model: PreTrainedModel) -> int:
    """Rows of the embeddings that a saved adapter was trained over, as far as it shows; 0 where it shows nothing.

    They show in the indices of new tokens, and in embeddings or a head that it holds whole.
    """
    from safetensors import safe_open

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    trained = config.get("trainable_token_indices") if isinstance(config, dict) else None
    by_place = trained if isinstance(trained, dict) else {"": trained or []}
    rows = [max(indices) + 1 for indices in by_place.values() if indices]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [path for path, module in model.named_modules(remove_duplicate=False) if module in ends]
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  # it is no dictionary
            if any(_ends_in(key, f"{name}.weight") for name in names):
                rows.append(file.get_slice(key).get_shape()[0])
    return max(rows, default=0)


def find_adapter(path: Path) -> Path:
    """The PEFT folder at `path`: itself, or its `adapter/` if it is a run. Raises ModelError."""
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise ModelError(f"{folder}: no adapter_model.safetensors (pickled adapters are not read)")
            return folder
    raise ModelError(f"{path}: not an adapter (no adapter_config.json there)")


def base_of_adapter(path: Path) -> str:
    """The base model's name as the adapter's config records it. Raises ModelError."""
    config = find_adapter(path) / "adapter_config.json"
    name = _json_object(config).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{config}: names no base model; pass it with --model")
    return str(name)


def _json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where that is no object. Raises ModelError for one that is no JSON."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def keep_trainable_in_fp32(model: torch.nn.Module) -> None:
    """Make every trainable parameter fp32: Adam's updates vanish in bf16, and fp16 gradients cannot be unscaled."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters. Four-bit weights are counted unpacked: two to a stored byte."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            count = state.shape.numel()
        total += count
        if parameter.requires_grad:
            trainable += count
    return trainable, total


def weights_gb(model: torch.nn.Module) -> float:
    """Memory of all parameters and buffers as stored, in GB, with the scales of quantized ones."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        while state is not None:  # with double quantization the scales have scales
            tensors.append(state.absmax)
            state = state.state2
        if (scales := getattr(parameter, "SCB", None)) is not None:  # of int8 rows
            tensors.append(scales)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GB
