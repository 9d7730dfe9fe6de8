"""The model card (README.md with a YAML header) of a run, written from what its folder records.

Nothing here is evaluated or trusted: file names, metric names, settings and the like are data. Only the template that lies
beside this module is rendered; whatever comes from the run is a value in it, put into a Markdown code span that it cannot
leave (`code`), and the header is written by a YAML library. Paths of the machine are reduced to a file's name.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2
import yaml

from tunesmith.config import RunConfig
from tunesmith.errors import RunError
from tunesmith.export.package import Kind
from tunesmith.export.private import is_absolute, leaf, name_of_adapter
from tunesmith.figures import as_difference, as_measured

LONGEST = 200
"""Characters of one value that a card shows."""

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
"""ORG/NAME, as the hub has them; neither a path nor anything that Markdown, YAML or Python reads as more than a name."""

UNSHOWN = ("evaluation.", "training.tracker", "data.cache", "data.num_proc", "model.name", "model.device", "data.path")
"""Settings that a card leaves out: those of evaluations stand in their results, the others say nothing of the model."""

KEPT = {
    "retain": "general knowledge (share of general questions that are right)",
    "refusal_unsafe": "unsafe requests that are refused",
    "refusal_safe": "harmless requests that are refused (lower is better)",
    "memorized": "training answers that come out word for word (lower is better)",
}
"""The metrics that say what training did beside its task (docs/general-ability.md), and what each measures."""


@dataclass(frozen=True, slots=True)
class CardRequest:
    """What a card needs beside the run: where it goes, of which artifact it is, and what only the user can say."""

    repo: str
    kind: Kind
    files: Sequence[str]
    base_model: str | None  # the base's hub id; None where it has none that is known
    license: str | None = None
    revision: str | None = None
    bytes: int = 0  # of all files
    quantized: Mapping[str, Any] = field(
        default_factory=dict
    )  # of a quantized model: its method, and what was measured
    gguf_type: str | None = None  # of a GGUF file, as llama.cpp and Ollama name it: Q4_K_M


def write_card(
    request: CardRequest,
    config: RunConfig,
    metadata: Mapping[str, Any],
    metrics: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    """The card's text, from what the run folder's files hold. Raises RunError where they lack what it says."""
    try:
        body = _body(request, config, metadata, metrics, evaluations)
    except (jinja2.UndefinedError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"the model card cannot be written ({type(error).__name__}: {error}): metadata.json, metrics.json or a file in "
            "evaluations/ is damaged or lacks what a card says"
        ) from error
    return f"---\n{header(request, metadata)}---\n\n{body}"


def _body(
    request: CardRequest,
    config: RunConfig,
    metadata: Mapping[str, Any],
    metrics: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    return (
        _environment()
        .get_template("card.md.jinja")
        .render(
            request=request,
            title=request.repo.partition("/")[2],
            base=request.base_model or leaf(metadata["model"]["name"]),
            metadata=metadata,
            data=_data_rows(metadata["data"]),
            settings=changed_settings(config),
            metrics=metrics,
            evaluations=[_evaluation(result) for result in evaluations],
            kept=_kept(evaluations),
            unmeasured=[name for name in KEPT if not any(name in result["metrics"] for result in evaluations)],
            parent=name_of_adapter(str(metadata["parent"])) if metadata.get("parent") else None,
            size=f"{request.bytes / 2**20:,.1f} MB" if request.bytes else None,
        )
    )


RELATIONS: dict[Kind, str] = {
    "adapter": "adapter",
    "merged": "finetune",
    "quantized": "quantized",
    "gguf": "quantized",
    "gguf-lora": "adapter",
}
"""The hub's `base_model_relation`: adapter, finetune, quantized or merge (of several models)."""

LIBRARIES: dict[Kind, str] = {
    "adapter": "peft",
    "merged": "transformers",
    "quantized": "transformers",
    "gguf": "gguf",
    "gguf-lora": "gguf",
}


def header(request: CardRequest, metadata: Mapping[str, Any]) -> str:
    """The YAML that the hub reads (https://huggingface.co/docs/hub/model-cards).

    A file of a fine-tuned model in few bits is `quantized` in the tree of its base: what it is a quantization of has no repository
    that is known here.
    """
    values: dict[str, Any] = {}
    if request.base_model:
        values["base_model"] = request.base_model
        values["base_model_relation"] = RELATIONS[request.kind]
    values["library_name"] = LIBRARIES[request.kind]
    if request.license:
        values["license"] = plain(request.license)
    values["pipeline_tag"] = "text-generation"
    tags = ["tunesmith", plain(metadata["method"]), plain(metadata["objective"])]
    tags += ["gguf"] if request.kind.startswith("gguf") else []
    tags += [plain(request.quantized["method"])] if request.kind == "quantized" else []
    values["tags"] = list(dict.fromkeys(tags))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


# -- what comes from the run, made harmless ---------------------------------------------------------------------------


def plain(value: Any) -> str:
    """One line of visible characters, at most `LONGEST`: no line breaks, no control, formatting or private characters.

    Among those are the marks that turn the direction of text around, which show a name as another.
    """
    text = "".join(
        " " if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else character
        for character in str(value)
    )
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def code(value: Any) -> str:
    """`value` as a Markdown code span, inside of a table or not: nothing in it is markup, HTML, a link or a table's edge.

    The fence is longer than any run of backticks in it (CommonMark 6.1). A bar would end a table's cell, and escaping it shows
    differently inside and outside of one, so that another bar, U+2223, stands for it.
    """
    text = plain(value).replace("|", "\u2223") or "(empty)"
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def without_folders(value: Any, key: str = "") -> Any:
    """`value` with every path in it reduced to its name: absolute ones, and whatever stands under a key that ends in `path`."""
    if isinstance(value, str):
        path = key.endswith("path") or key == "init_from" or "://" in value or is_absolute(value)
        return leaf(value) if path and value else value
    if isinstance(value, Mapping):
        return {name: without_folders(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(item, key) for item in value]
    return value


def changed_settings(config: RunConfig) -> list[tuple[str, str, str]]:
    """(key, value, default) of every setting that differs from its default, paths reduced to names."""
    given, defaults = _flat(config.model_dump(mode="json")), _flat(RunConfig().model_dump(mode="json"))
    return [
        (key, str(without_folders(value, key)), str(defaults.get(key)))
        for key, value in given.items()
        if value != defaults.get(key) and not key.startswith(UNSHOWN)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and bool(value)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _data_rows(data: Mapping[str, Any]) -> list[tuple[str, str, Any, Any]]:
    """(role, name, rows, SHA-256) of each file or set that the run read."""
    paths = [file["path"] for file in data.get("files", ())]
    if len(paths) < 2:
        paths = data["path"] if isinstance(data["path"], list) else [data["path"]]
    names = ", ".join(leaf(str(path)) for path in paths)  # the hash is over those of all
    rows = [("training", names, data.get("train_rows"), data.get("sha256"))]
    for key, role, count in (("eval", "held out", data.get("eval_rows")), ("general", "general text", None)):
        if data.get(f"{key}_path"):
            rows.append((role, leaf(str(data[f"{key}_path"])), count, data.get(f"{key}_sha256")))
    return rows


# -- evaluations ------------------------------------------------------------------------------------------------------


def _evaluation(result: Mapping[str, Any]) -> dict[str, Any]:
    baseline, comparison = result.get("baseline") or {}, result.get("comparison") or {}
    return {
        "task": result["task"],
        "n": result["n"],
        "data": leaf(str(result["data"])) if result.get("data") else None,
        "sha256": result.get("data_sha256"),
        "forced": result["model"].get("forced", False),
        "gate": result.get("gate"),
        "baseline": bool(baseline),
        "rows": [
            (name, shown(baseline.get(name)), shown(metric), difference(comparison.get(name), metric))
            for name, metric in result["metrics"].items()
        ],
    }


def _kept(evaluations: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """(what, base, tuned, difference) of what was measured beside the task."""
    return [
        (what, shown((result.get("baseline") or {}).get(name)), shown(result["metrics"][name]), change)
        for result in evaluations
        for name, what in KEPT.items()
        if name in result["metrics"]
        for change in [difference((result.get("comparison") or {}).get(name), result["metrics"][name])]
    ]


def shown(metric: Mapping[str, Any] | None) -> str:
    """A metric with one standard error, where it was measured."""
    return "not measured" if metric is None or metric.get("value") is None else as_measured(metric)


def difference(found: Mapping[str, Any] | None, metric: Mapping[str, Any]) -> str:
    """`+12.5 points, p < 0.001: better`."""
    if found is None or found.get("difference") is None:
        return "not measured"
    said = as_difference(found, metric)
    return said if found.get("p") is None else f"{said}: {plain(found.get('verdict'))}"


def _environment() -> jinja2.Environment:
    def load(name: str) -> str:
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=False,  # it is Markdown: `code` takes the place of HTML's escapes
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code
    environment.filters["whole"] = lambda value: f"{int(value):,}"
    return environment
