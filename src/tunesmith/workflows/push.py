"""Push what a run made to the hub: its adapter, a model folder, or a GGUF file, with a card written from the run's files.

The card states what was measured of the run's weights, so nothing goes up that was made of others: merged models and GGUF files say in
themselves which adapter is in them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, ModelError, RunError, UserError, VerificationError
from tunesmith.export.card import HUB_ID, CardRequest, write_card
from tunesmith.export.card_records import Evaluation, Metadata, Metrics, QuantizedHow, check_record
from tunesmith.export.gguf import gguf_adapter_hash, gguf_seal, trained_hash
from tunesmith.export.hub import CARD, check_names, push_package
from tunesmith.export.package import (
    TEXTS,
    WEIGHTS,
    Package,
    gguf_kind,
    kind_of_folder,
    package_folder,
    package_gguf,
    quantization_of,
    refuse_links,
)
from tunesmith.export.private import leaf
from tunesmith.files import sha256_file, sha256_text
from tunesmith.models.load import ModelSource
from tunesmith.registry.records import MERGED, RECORD, merged_from, read_json
from tunesmith.registry.unchanged import config_changes
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.workflows.evaluate import tuned_hash
from tunesmith.workflows.lineage import tokenizer_hash
from tunesmith.workflows.load import TEMPLATE_NAME

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
"""The hub's identifiers of licenses: apache-2.0, mit, llama3.2, other."""

GGUF_TYPE = re.compile(r"[-._](I?Q\d\w*|BF16|F16|F32)\.gguf", re.IGNORECASE)
"""The type at the end of a file's name, by which the hub lets llama.cpp and Ollama pick one."""


@dataclass(frozen=True, slots=True)
class _Made:
    """What is pushed: its files, the hash of what the run trained, and what is measured of a quantized model."""

    package: Package
    weights: str
    quantized: Mapping[str, Any]


def push(
    run: str | Path,
    repo: str,
    *,
    what: str = "adapter",
    public: bool = False,
    revision: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    replace: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Upload RUN/adapter, RUN/merged (of a full fine-tuning RUN/model), or the model folder or GGUF file that `what` names.

    `base_model` is the base's hub id where the run knows it as a folder. `replace` deletes other weights in the repository, in the same
    commit. Returns `{repo, url, what, private, revision, commit, base_model, files[{path, size, sha256}], card, left_out, deleted,
    also_there}`. Raises UserError (2), VerificationError (1: what would go up is not of this run's weights), MachineError (3).
    """
    check_names(repo, revision)
    _check_words(license, base_model)
    folder = RunFolder.open(run)
    config, metadata, metrics = folder.config, folder.metadata, folder.metrics
    if not metrics:
        raise RunError(f"{run}: the run is not finished (no metrics.json); `tunesmith resume {run}` finishes it")
    damaged = "the run folder is damaged; copy it again, or train again"
    check_record(Metadata, folder.path / "metadata.json", metadata, damaged)
    check_record(Metrics, folder.path / "metrics.json", metrics, damaged)
    hub_id = _base_id(metadata, base_model)
    made = _made(folder, what, config.method == "full", hub_id or leaf(metadata["model"]["name"]), metadata)
    package = made.package
    evaluations = _evaluations(folder)
    request = CardRequest(
        repo,
        package.kind,
        package.names,
        hub_id,
        license,
        revision,
        package.bytes,
        made.quantized,
        _gguf_type(package.names[0]),
    )
    card = write_card(request, config, metadata, metrics, evaluations)
    paths = [str(folder.path.absolute()), metadata["model"].get("path") or metadata["model"]["name"]]
    pushed = push_package(
        package,
        card,
        repo,
        weights=made.weights,
        public=public,
        revision=revision,
        replace=replace,
        private=[path for path in paths if Path(path).is_absolute()],
        progress=progress,
    )
    return {
        "repo": repo,
        "url": pushed.url,
        "what": package.kind,
        "private": pushed.private,
        "revision": revision or "main",
        "commit": pushed.commit,
        "base_model": hub_id,
        "files": [{"path": file.name, "size": file.size, "sha256": file.sha256} for file in package.files],
        "card": CARD,
        "left_out": package.left_out,
        "deleted": pushed.deleted,
        "also_there": pushed.also_there,
    }


def _check_words(license: str | None, base_model: str | None) -> None:
    problems = []
    if license is not None and not LICENSE.fullmatch(license):
        problems.append(
            f"--license {license!r}: expected an identifier of the hub, such as apache-2.0, mit, llama3.2, other"
        )
    if base_model is not None and not HUB_ID.fullmatch(base_model):
        problems.append(f"--base-model {base_model!r}: expected the base's hub id, ORG/NAME")
    if problems:
        raise ConfigError(problems)


def _base_id(metadata: Mapping[str, Any], given: str | None) -> str | None:
    """The base's hub id: of the run, or as given where the run knows a folder or a file only."""
    name = str(metadata["model"]["name"])
    known = name if HUB_ID.fullmatch(name) and not name.endswith(".gguf") and not Path(name).exists() else None
    if known and given and given != known:
        raise UserError(f"--base-model {given}: the run was trained on {known}; leave --base-model out")
    return known or given


def _gguf_type(name: str) -> str | None:
    found = GGUF_TYPE.search(name)
    return found[1].upper() if found else None


def _made(run: RunFolder, what: str, full: bool, base: str, metadata: Mapping[str, Any]) -> _Made:
    """What `what` names, of the run's present weights. Raises VerificationError for what was made of others."""
    if what == "adapter" and full:
        raise UserError(
            f"{run.path}: a full fine-tuning has no adapter; --what merged pushes its model, {run.model_path}"
        )
    trained = run.model_path if full else run.adapter_path
    refuse_links(trained)
    if not trained.is_dir():
        raise RunError(f"{trained}: missing; `tunesmith resume {run.path}` makes it")
    if what == "adapter":
        package = package_folder(trained, "adapter", base)
        weights = trained_hash(trained)
        record = read_json(trained / RECORD) or {}
        recorded = record.get("adapter_sha256")
        if recorded not in (None, weights):
            raise VerificationError(
                f"{trained}: its weights are not those that training wrote (recorded {str(recorded)[:12]}, found {weights[:12]}); "
                "nothing was uploaded"
            )
        if changed := config_changes(trained, record, run.config):
            raise VerificationError(
                f"{trained / 'adapter_config.json'}: is not what training wrote: {', '.join(changed)}; nothing was uploaded"
            )
        _refuse_other_text(trained, record, str(metadata["chat_template"]["hash"]))
        return _Made(package, weights, {})
    if what == "merged" and full:
        return _Made(package_folder(trained, kind_of_folder(trained), base), trained_hash(trained), {})
    path = run.path / "merged" if what == "merged" else Path(what)
    refuse_links(path)
    if what.endswith(".gguf"):
        return _gguf(run, path, trained_hash(trained))
    if what == "merged" and not path.is_dir():
        raise RunError(f"{path}: missing; `tunesmith merge {run.path}` makes it")
    if not path.is_dir():
        raise UserError(
            f"--what {what!r}: expected adapter, merged, or the path of a model's folder or of a .gguf file"
        )
    kind = kind_of_folder(path)
    weights = trained_hash(trained)
    _refuse_foreign(run, path, weights, str(metadata["model"]["weight_hash"]))
    quantized = _quantized(path) if kind == "quantized" else {}
    package = package_folder(path, kind, base)
    _refuse_changed(run, path, package)
    return _Made(package, weights, quantized)


def _refuse_other_text(adapter: Path, record: Mapping[str, Any], template_hash: str) -> None:
    """Raise VerificationError unless the template beside an adapter, and its tokenizer, are those that training wrote there."""
    path = adapter / TEMPLATE_NAME
    found = sha256_text([path.read_bytes().decode("utf-8", "replace")]) if path.is_file() else "none"
    if found != template_hash:
        raise VerificationError(
            f"{path}: is not the chat template that the run was trained with (recorded {template_hash[:12]}, found {found[:12]}); nothing was "
            "uploaded; restore it"
        )
    if "adapter_tokenizer" not in record:
        return
    known, nothing = record["adapter_tokenizer"], sha256_text([])
    recorded = str(known.get("hash")) if isinstance(known, dict) else nothing
    found = tokenizer_hash(ModelSource("", adapter))
    if found != recorded:
        then, now = ("none" if one == nothing else one[:12] for one in (recorded, found))
        raise VerificationError(
            f"{adapter}: the tokenizer in it is not the one that training wrote (recorded {then}, found {now}); nothing was "
            "uploaded; restore it"
        )


def _refuse_changed(run: RunFolder, folder: Path, package: Package) -> None:
    """Raise VerificationError unless what goes up of a model's folder are the files that were written and verified, as its record has them."""
    recorded = (read_json(folder / RECORD) or {}).get("files")
    again = _again(run, folder)
    if not isinstance(recorded, dict) or not recorded:
        raise VerificationError(
            f"{folder}: its {RECORD} has no hashes of the files that were verified, as an earlier version wrote it, so that damage would not be "
            f"seen; nothing was uploaded; {again}"
        )
    files = [file for file in package.files if file.name != RECORD]
    found = {
        file.name: file.sha256 if isinstance(file.source, Path) else sha256_file(folder / file.name) for file in files
    }
    taken = {name: value for name, value in recorded.items() if name in TEXTS or WEIGHTS[package.kind].fullmatch(name)}
    for name in sorted(found.keys() | taken.keys(), key=lambda name: (name in TEXTS, name)):
        if found.get(name) == taken.get(name):
            continue
        what = "is not the file that was" if name in TEXTS else "its weights are damaged, not those that were"
        there = f"recorded {str(taken.get(name, 'none'))[:12]}, found {found.get(name, 'none')[:12]}"
        raise VerificationError(f"{folder / name}: {what} verified ({there}); nothing was uploaded; {again}")


def _again(run: RunFolder, folder: Path) -> str:
    """How a folder that was made of a run is made anew. Only one that says that it was made so may be removed for it."""
    record = read_json(folder / RECORD) or {}
    how = record.get("quantized")
    if isinstance(how, dict) and how.get("method") in ("gptq", "awq"):
        return f"remove it, and export again: `tunesmith export {run.path} --to {how['method']} --out {folder}`"
    if record.get("kind") == MERGED:
        return f"remove it, and merge again: `tunesmith merge {run.path} --out {folder}`"
    return f"merge again into a folder that is not there yet: `tunesmith merge {run.path} --out FOLDER`"


def _gguf(run: RunFolder, path: Path, weights: str) -> _Made:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; `tunesmith export {run.path} --to gguf:q4_k_m` writes one")
    with path.open("rb") as stream:  # the package's reader says less of what is no GGUF at all
        head = stream.read(4)
    if head != b"GGUF":
        raise VerificationError(f"{path}: not a GGUF file (it begins with {head!r}); export it again")
    again = f"`tunesmith export {run.path} --to gguf:q8_0` (or the type that you want) writes one"
    found = gguf_adapter_hash(path)
    if found is None:
        raise VerificationError(
            f"{path}: does not say which adapter it was made of, so that the card could state numbers of another model; nothing was "
            f"uploaded; {again}"
        )
    if found != weights:
        raise VerificationError(
            f"{path}: was made of other weights than the run has now (it holds {found[:12]}, the run has {weights[:12]}); nothing was "
            f"uploaded; {again}"
        )
    sealed = gguf_seal(path)
    if sealed is None:
        raise VerificationError(
            f"{path}: does not hold the hash of what was verified, as an earlier version wrote it, so that damage would not be seen; nothing was "
            f"uploaded; {again}"
        )
    if sealed[0] != sealed[1]:
        raise VerificationError(
            f"{path}: its weights or metadata are damaged, not those that were verified (recorded {sealed[0][:12]}, found {sealed[1][:12]}); "
            f"nothing was uploaded; {again}"
        )
    return _Made(package_gguf(path, gguf_kind(path)), weights, {})


def _refuse_foreign(run: RunFolder, folder: Path, weights: str, base_hash: str) -> None:
    """Raise VerificationError unless the model in `folder` was made of the run's present weights, and of nothing else."""
    again = _again(run, folder)
    source = (read_json(folder / RECORD) or {}).get("source")
    if isinstance(source, dict) and source.get("weight_hash") == weights:
        return  # a full fine-tuning's own model, quantized
    merged = merged_from(folder)
    if merged is None:
        raise VerificationError(
            f"{folder}: does not say which adapter it was made of (no {RECORD} of a merge), so that the card could state numbers of "
            f"another model; nothing was uploaded; {again}"
        )
    if weights not in merged.adapters:
        raise VerificationError(
            f"{folder}: was made of other weights than the run has now (it holds {merged.adapters[0][:12]}, the run has "
            f"{weights[:12]}); nothing was uploaded; {again}"
        )
    if len(merged.adapters) > 1:
        raise VerificationError(
            f"{folder}: was made of {len(merged.adapters)} adapters, and the card would state what was measured of one; nothing was "
            f"uploaded; {again}"
        )
    if merged.base_hash != base_hash:
        raise VerificationError(
            f"{folder}: was merged into another base than the run was trained on (SHA-256 {merged.base_hash[:12]}, the run's "
            f"{base_hash[:12]}); nothing was uploaded; {again}"
        )


def _quantized(folder: Path) -> dict[str, Any]:
    """The method, and what the folder's record says of how near it is to the model before."""
    record = read_json(folder / RECORD) or {}
    made = record.get("quantized") or {}
    check_record(QuantizedHow, folder / RECORD, made, "export it again")
    known = {key: value for key, value in made.get("verified", {}).items() if value is not None}
    return {"method": quantization_of(folder), **known}


def _evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """The results in evaluations/. Raises VerificationError for one of other weights than the run has now."""
    paths = sorted(path for path in (run.path / "evaluations").glob("*.json") if not path.name.startswith("."))
    results = [run.read_json(f"evaluations/{path.name}") for path in paths]
    weights = str(tuned_hash(run))
    for path, result in zip(paths, results, strict=True):
        check_record(Evaluation, path, result, "evaluate again, or remove it")
        tuned = result["model"]["tuned"]
        if tuned != weights:
            raise VerificationError(
                f"{path}: was measured on other weights than the run has now (recorded {str(tuned)[:12]}, found "
                f"{weights[:12]}): one of them has changed since. Evaluate again, or remove it; nothing was uploaded"
            )
    return results
