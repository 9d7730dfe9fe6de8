"""Find a base model and load it through transformers: a folder of safetensors, a hub id, or a GGUF file.

Only safetensors are read, never pickled weights; code that comes with a model runs only when the user says so. A GGUF
file is dequantized once and kept as bf16 safetensors in the user's cache folder, named by the file's content hash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.config import ModelConfig, QuantizationConfig
from tunesmith.errors import MachineError, ModelError, RunError, shown
from tunesmith.files import atomic_folder, cache_folder, sha256_file, sha256_text, write_json
from tunesmith.hardware import ComputeDType, Hardware, torch_dtype
from tunesmith.models import attention
from tunesmith.models.catalogue import NO_LIMIT
from tunesmith.models.hub import why_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
DUPLICATES = ["*/*.safetensors", "consolidated*.safetensors"]
"""Weights that transformers does not read: the maker's own format (original/, consolidated), or for other programs."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

TEXT_TOWERS = {"gemma3": {r"^(model\.language_model|language_model\.model)\.": "model."}}
"""Multimodal `model_type`s of which the text tower alone is loaded, as the text model that it is: pictures are no training data here,
and adapters on the vision tower would never move. For each the names of its tensors, as its makers and transformers write them, to
those of the text model."""

PACKAGES = {
    "compressed-tensors": "pip install 'tunesmith[gptq]'",
    "bitsandbytes": "pip install 'tunesmith[quantization]'",
}
"""By a stored model's `quant_method`: what installs the package that reads it."""

CONVERSION = 2
"""Of GGUF files: part of the converted folder's name, so raise it when what is written changes."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model that was found: its name as the user wrote it, and the local folder that holds it.

    `revision` is the hub commit. `weights_local` is False while only the small files of a hub model are here.
    """

    name: str
    path: Path
    revision: str | None = None
    weights_local: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return _json_object(self.path / "config.json")

    @property
    def context_length(self) -> int | None:
        """The longest sequence in tokens that the model was made for, as its config.json says (a multimodal one's too).

        None where it says nothing, 0, or NO_LIMIT and more. Raises ModelError for what is no whole number.
        """
        config, key = self.config, "max_position_embeddings"
        text = config.get("text_config")
        limit = config.get(key) or (text.get(key) if isinstance(text, dict) else None)
        if not limit:
            return None
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            path = self.path / "config.json"
            raise ModelError(f"{path}: {key} is {limit!r}: expected a whole number without quotes, or null")
        return limit if limit < NO_LIMIT else None


def find_model(config: ModelConfig) -> ModelSource:
    """Resolve `model.name` and check what can be checked before loading. Raises ModelError.

    For a hub id only the small files are fetched; `fetch_weights` gets the rest.
    """
    name = config.name
    if not name:
        raise ModelError("no model given; pass --model with a model folder, a .gguf file or a hub id (org/model)")
    path = Path(name).expanduser()
    if config.revision and path.exists():
        raise ModelError(
            f"model.revision is {config.revision!r}, but {name} is on this disk, not on the hub; remove it"
        )
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, _converted_gguf(path))
    if path.is_dir():
        source = ModelSource(name, path)
        _check_folder(source, config.trust_remote_code)
        return source
    if path.is_file():
        raise ModelError(
            f"{name}: expected a model folder or a .gguf file, found a file of type {path.suffix or 'unknown'}"
        )
    if name.startswith(("/", "./", "../", "~")) or path.suffix == ".gguf" or not HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such model folder or .gguf file (a hub id looks like org/model)")
    folder = _snapshot(config, SMALL_FILES)
    source = ModelSource(name, folder, revision=folder.name, weights_local=False)
    _check_config(source, config.trust_remote_code)
    return source


def fetch_weights(source: ModelSource, config: ModelConfig) -> ModelSource:
    """The same source with its weights on this disk. Raises ModelError."""
    if source.weights_local:
        return source
    complete = ModelSource(source.name, _snapshot(config, [*SMALL_FILES, "*.safetensors"]), source.revision)
    _check_folder(complete, config.trust_remote_code)
    return complete


def load_tokenizer(source: ModelSource, config: ModelConfig) -> PreTrainedTokenizerFast:
    """The model's tokenizer. Raises ModelError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except ImportError as error:
        raise MachineError(
            f"{source.name}: its tokenizer needs a package that is not here: {_first_line(error)}"
        ) from error
    except Exception as error:
        known = isinstance(error, (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError))
        if not known and type(error) is not Exception:  # the tokenizers library raises plain Exception
            raise
        if damaged := _damaged_tokenizer(source.path):
            raise ModelError(damaged) from error
        lost = "" if (source.path / "tokenizer.json").is_file() else " (there is no tokenizer.json)"
        raise ModelError(f"{source.name}: its tokenizer cannot be loaded{lost}: {_first_line(error)}") from error


TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")


def _damaged_tokenizer(folder: Path) -> str | None:
    """Which of a tokenizer's files is damaged, and how, as far as each shows it by itself."""
    for path in (folder / name for name in TOKENIZER_FILES):
        if not path.is_file():
            continue
        try:
            _json_object(path)
        except (ValueError, OSError) as error:
            return f"{path}: the tokenizer cannot be loaded: not valid JSON: {_first_line(error)}"
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            Tokenizer.from_file(str(path))
        except Exception as error:
            if type(error) is not Exception:  # it raises no other kind for a file's content
                raise
            return f"{path}: the tokenizer cannot be loaded: {_first_line(error)}"
    return None


def load_model(
    source: ModelSource,
    config: ModelConfig,
    hardware: Hardware,
    dtype: ComputeDType,
    quantization: QuantizationConfig | None = None,
) -> PreTrainedModel:
    """The causal language model on its device, in `dtype`, or quantized by bitsandbytes with `dtype` as compute type.

    Its own attention is the one asked for, or `eager` where the model soft-caps attention scores (see `_attention`). Raises
    ModelError when the folder is not a whole model, MachineError when it does not fit or a package is missing.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    try:
        own = AutoConfig.from_pretrained(source.path, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except ImportError as error:  # of the model's own code
        raise _package_missing(source, error) from error
    options: dict[str, Any] = {}
    quiet: AbstractContextManager[None] = nullcontext()
    if own.model_type in TEXT_TOWERS:
        options |= {"config": own.get_text_config(), "key_mapping": TEXT_TOWERS[own.model_type]}
        quiet = _quiet_transformers()  # it lists every tensor of the vision tower as unexpected
    dequantized = _is_mxfp4(source)
    if dequantized:
        options["quantization_config"] = Mxfp4Config(dequantize=True)
    if quantization is not None:
        refuse_quantizing_again(source)
        options["quantization_config"] = _bitsandbytes_config(quantization, dtype)
    try:
        with quiet:
            model, report = AutoModelForCausalLM.from_pretrained(
                source.path,
                dtype=torch_dtype(dtype),
                device_map={"": hardware.device},
                attn_implementation=attention.implementation(_attention(own, config), hardware, dtype),
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, where the message can say which
                **options,
            )
    except torch.OutOfMemoryError as error:
        raise MachineError(
            f"{source.name} in {dtype} does not fit in the {hardware.memory_gb:.1f} GB of {hardware.name}; "
            "use method: qlora, or a smaller model"
        ) from error
    except ImportError as error:
        raise _package_missing(source, error) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{source.name} cannot be loaded: {_first_line(error)}") from error
    if report["mismatched_keys"]:
        tensor, found, expected = min(report["mismatched_keys"])
        raise ModelError(
            f"{source.name}: {len(report['mismatched_keys'])} weights do not have the shape that its config.json says "
            f"({tensor}: {tuple(found)} in the file, {tuple(expected)} expected)"
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{source.name}: {len(missing)} weights are missing from its files and would be random "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); the model is not complete"
        )
    if quantization is not None:
        _keep_unpacked(model)
    if dequantized:
        for parameter in model.parameters():  # transformers reads them as bf16, whatever it was asked for
            parameter.data = parameter.data.to(torch_dtype(dtype))
    if dequantized or own.model_type in TEXT_TOWERS:
        model._weight_conversions = []  # save under the text model's own names: these cannot be turned back
    return model


def _package_missing(source: ModelSource, error: ImportError) -> MachineError:
    stored = source.config.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if install := PACKAGES.get(str(method)):
        return MachineError(
            f"{source.name}: its weights are stored by {method}; install what reads them with: {install}"
        )
    return MachineError(f"{source.name} cannot be loaded without a package that is not installed: {_first_line(error)}")


def _attention(own: Any, config: ModelConfig) -> str:
    """transformers' attention implementation for a model of this config: `model.attention`, unless that would compute something
    else or is not there.

    Its sdpa ignores `attn_logit_softcapping` without a word (Gemma 2: c · tanh(scores / c), arXiv 2408.00118), and models whose
    scores have a sink beside them (gpt-oss) have none.
    """
    from transformers import AutoModelForCausalLM

    if getattr(own.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "eager"
    classes = AutoModelForCausalLM._model_mapping
    known = classes.get(type(own), None)
    return config.attention if getattr(known, "_supports_sdpa", True) else "eager"


def _is_mxfp4(source: ModelSource) -> bool:
    """Whether weights are stored in MXFP4 (gpt-oss), which transformers would keep where it has kernels; they have no backward."""
    stored = source.config.get("quantization_config")
    return isinstance(stored, dict) and stored.get("quant_method") == "mxfp4"


def refuse_quantizing_again(source: ModelSource) -> None:
    """Raise ModelError for `method: qlora` of weights that are stored quantized in a way that bitsandbytes cannot start from."""
    if _is_mxfp4(source):
        raise ModelError(
            f"{source.name}: its weights are stored in MXFP4, which bitsandbytes cannot quantize again, and its experts would stay in "
            "16 bits anyway; set method: lora, which reads them as 16-bit weights"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No warnings from transformers' logger for the length of the block."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def pad_token(tokenizer: Any) -> int:
    """The id that fills padding: the tokenizer's, else its end token (padding is masked, so either is exact)."""
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id)


def weight_hash(source: ModelSource, reread: bool = False) -> str:
    """SHA-256 over the hashes of all weight files, by name. Hub files carry theirs; others are hashed once and remembered.

    With `reread` every byte is read, whatever a name or the memory says: a file that was changed in place, with its time put back, shows only so.
    """
    return sha256_text(f"{file.name} {file_hash(file, reread)}" for file in _weight_files(source.path))


def file_hash(file: Path, reread: bool = False) -> str:
    """SHA-256 of a large file: as the hub's cache names it, as remembered by path, size and time, or read (always, with `reread`)."""
    blob = file.resolve().name
    if not reread and file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob  # the hub's cache names a large file by its SHA-256
    stat = file.stat()
    key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    memory = cache_folder() / "hashes.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if reread or key not in known:
        now = sha256_file(file)
        if known.get(key) == now:
            return now
        known[key] = now
        with suppress(OSError, RunError, MachineError):  # a cache that cannot be written costs time, not the run
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, known)
    return str(known[key])


def _weight_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if not file.match(DUPLICATES[1]))


def _check_folder(source: ModelSource, trust_remote_code: bool) -> None:
    _check_config(source, trust_remote_code)
    folder = source.path
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files: Any = _json_object(index).get("weight_map")
        except (ValueError, OSError) as error:
            raise ModelError(f"{index}: not an index of weight files: {_first_line(error)}") from error
        if not isinstance(files, dict):
            raise ModelError(f"{index}: not an index of weight files: weight_map is {shown(files)}: expected an object")
        for tensor, file in files.items():
            if not isinstance(file, str):
                raise ModelError(
                    f"{index}: not an index of weight files: {tensor} is in {shown(file)}: expected a file's name"
                )
        shards = set(files.values())
        _refuse_missing(source.name, [shard for shard in sorted(shards) if not (folder / shard).is_file()])
    elif not _weight_files(folder):
        pickles = [file.name for pattern in PICKLES for file in folder.glob(pattern)]
        if pickles:
            raise ModelError(
                f"{source.name}: its weights are pickled ({pickles[0]}), which can run code when loaded; "
                "only safetensors are read: convert them first"
            )
        raise ModelError(f"{source.name}: no weights in this folder; expected *.safetensors beside config.json")


def _refuse_missing(name: str, missing: list[str]) -> None:
    if missing:
        raise ModelError(f"{name}: the weight files {', '.join(missing[:3])} are missing (of those its index names)")


FIELDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("model_type", (str, type(None)), "a family's name"),
    ("dtype", (str, dict, type(None)), 'a type\'s name, e.g. "bfloat16"'),
    ("torch_dtype", (str, dict, type(None)), 'a type\'s name, e.g. "bfloat16"'),
    ("quantization_config", (dict, type(None)), "an object"),
    ("text_config", (dict, type(None)), "an object"),
    ("auto_map", (dict, type(None)), "an object"),
)
"""Of config.json: what we, or transformers before it checks any, take to be of these types, and what to say otherwise."""


def _check_config(source: ModelSource, trust_remote_code: bool) -> None:
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = source.path / "config.json"
    if not path.is_file():
        hint = "; it is a PEFT adapter: pass its base model" if (source.path / "adapter_config.json").is_file() else ""
        raise ModelError(f"{source.name}: not a model folder (it has no config.json){hint}")
    try:
        config = source.config
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: not valid JSON: {_first_line(error)}") from error
    for key, kinds, expected in FIELDS:
        if not isinstance(value := config.get(key), kinds):
            raise ModelError(f"{path}: {key} is {shown(value)}: expected {expected}")
    quantized = config.get("quantization_config") or {}
    if not isinstance(method := quantized.get("quant_method"), (str, type(None))):
        raise ModelError(f"{path}: quantization_config.quant_method is {shown(method)}: expected a method's name")
    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" not in config:
            raise ModelError(f"{source.name}: model_type {model_type!r} is unknown to transformers")
        if not trust_remote_code:
            raise ModelError(
                f"{source.name}: this model runs its own Python code; read it, then allow it with "
                "--set model.trust_remote_code=true"
            )
        return
    try:
        CONFIG_MAPPING[model_type].from_dict(config)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise ModelError(f"{path}: transformers refuses this configuration: {' '.join(str(error).split())}") from error


def _snapshot(config: ModelConfig, patterns: list[str]) -> Path:
    """The folder with a hub model's files: fetched, or where the hub cannot be reached those of its cache."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if config.trust_remote_code:
        patterns = [*patterns, "*.py"]
    try:
        return Path(
            snapshot_download(
                config.name,
                revision=config.revision,
                allow_patterns=patterns,
                ignore_patterns=DUPLICATES,
                local_files_only=why_unreachable() is not None,
            )
        )
    except (LocalEntryNotFoundError, httpx.TransportError) as error:
        raise ModelError(
            f"{config.name}: no such folder here, and the hub cannot be reached; check the name or the network"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(f"{config.name}: not found on the hub, or no access to it: {_first_line(error)}") from error


def _bitsandbytes_config(quantization: QuantizationConfig, dtype: ComputeDType) -> Any:
    import importlib.util
    import logging

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError("method qlora needs bitsandbytes; install it with: pip install 'tunesmith[quantization]'")
    # It warns on every CPU without the optional `kernels` package that its own, slower CPU code is used.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    if quantization.scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.scheme,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=torch_dtype(dtype),
    )


def _keep_unpacked(model: Any) -> None:
    """Keep 4-bit weights in the layout that has a backward.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks them for good at the first forward in eval mode, for a product
    without a backward: training after any evaluation would silently lose every gradient that flows through the base.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def misread_on_cpu(model: Any) -> str | None:
    """What to say of 4-bit weights that bitsandbytes dequantizes wrongly.

    Its CPU code (0.50) takes it that no block of scales holds values of two rows: a normal matrix of rows of 32 comes back with an
    error of 0.49 of its norm, where quantization costs 0.09.
    """
    wrong = {
        name.replace(".base_layer", "").rpartition(".")[2]: module.in_features
        for name, module in model.named_modules()
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None
        and module.weight.device.type == "cpu"
        and module.in_features % state.blocksize
    }
    if not wrong:
        return None
    name, width = min(wrong.items())
    return (
        f"4-bit weights of this model are wrong on a CPU: bitsandbytes reads rows that are no multiple of 64 wide from other scales "
        f"than it wrote ({name}: {width}); train it on a GPU, or set method: lora"
    )


def _converted_gguf(path: Path) -> Path:
    """The folder of safetensors made from a GGUF file, converting it on first use (about 25 s for 135M parameters).

    A finished folder is never replaced: another process may be reading it, and every conversion of one content is the same.
    """
    import importlib.util
    import struct

    folder = cache_folder() / "models" / f"{path.stem}-{sha256_file(path)[:16]}-{CONVERSION}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MachineError("a .gguf model needs the gguf package; install it with: pip install 'tunesmith[gguf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch_dtype("bf16")
        )
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        raise ModelError(f"{path}: transformers cannot read this GGUF file: {_first_line(error)}") from error
    tokenizer.clean_up_tokenization_spaces = False  # it would strip spaces before punctuation from BPE text
    # transformers 5.17 reads the wrong end token from a llama file (the first token's); the model's own ids are right.
    for name in ("bos", "eos", "pad"):
        number = getattr(model.config, f"{name}_token_id", None)
        if number is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(number))
    with atomic_folder(folder, keep=True) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds. Raises ValueError where that is no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
