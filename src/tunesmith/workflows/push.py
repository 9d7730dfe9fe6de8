"""Push what a run made to the hub: its adapter, its merged model, or a GGUF file, with a card written from the run's files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError, RunError, UserError, VerificationError
from tunesmith.export.card import HUB_ID, CardRequest, Kind, leaf, write_card
from tunesmith.export.hub import CARD, Package, check_names, package_folder, package_gguf, push_package, refuse_links
from tunesmith.runs import RunFolder
from tunesmith.types import Progress, no_progress
from tunesmith.version import __version__
from tunesmith.workflows.evaluate import tuned_hash

LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
"""The hub's identifiers of licenses: apache-2.0, mit, llama3.2, other."""


def push(
    run: str | Path,
    repo: str,
    *,
    what: str = "adapter",
    public: bool = False,
    revision: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Upload RUN/adapter, RUN/merged (of a full fine-tuning RUN/model), or the GGUF file that `what` names, to the hub.

    `base_model` is the base's hub id where the run knows it as a folder. Returns `{repo, url, what, private, revision, commit,
    base_model, files[{path, size, sha256}], left_out, also_there}`. Raises UserError (2), VerificationError (1), MachineError (3).
    """
    check_names(repo, revision)
    _check_words(license, base_model)
    folder = RunFolder.open(run)
    config, metadata, metrics = folder.config, folder.metadata, folder.metrics
    if not metrics:
        raise RunError(f"{run}: the run is not finished (no metrics.json); `tunesmith resume {run}` finishes it")
    hub_id = _base_id(metadata, base_model)
    package = _package(folder, what, config.method == "full", hub_id or leaf(str(metadata["model"]["name"])), metadata)
    evaluations = _evaluations(folder)
    request = CardRequest(repo, package.kind, package.names, hub_id, license, revision)
    card = write_card(request, config, metadata, metrics, evaluations)
    pushed = push_package(
        package,
        card,
        repo,
        public=public,
        revision=revision,
        message=f"Upload {package.kind} with tunesmith {__version__}",
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


def _package(run: RunFolder, what: str, full: bool, base: str, metadata: Mapping[str, Any]) -> Package:
    kind: Kind
    if what.endswith(".gguf"):
        return package_gguf(Path(what), [str(run.path.absolute()), str(metadata["model"]["path"])])
    if what == "adapter" and full:
        raise UserError(
            f"{run.path}: a full fine-tuning has no adapter; --what merged pushes its model, {run.model_path}"
        )
    if what == "adapter":
        folder, kind, made_by = run.adapter_path, "adapter", f"tunesmith resume {run.path}"
    elif what == "merged" and full:
        folder, kind, made_by = run.model_path, "merged", f"tunesmith resume {run.path}"
    elif what == "merged":
        folder, kind, made_by = run.path / "merged", "merged", f"tunesmith merge {run.path}"
    else:
        raise UserError(f"--what {what!r}: expected adapter, merged, or the path of a .gguf file")
    refuse_links(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: missing; `{made_by}` makes it")
    return package_folder(folder, kind, base)


def _evaluations(run: RunFolder) -> list[dict[str, Any]]:
    """The results in evaluations/. Raises VerificationError for one of other weights than the run has now."""
    paths = sorted(path for path in (run.path / "evaluations").glob("*.json") if not path.name.startswith("."))
    results = [run.read_json(f"evaluations/{path.name}") for path in paths]
    weights = str(tuned_hash(run))
    for path, result in zip(paths, results, strict=True):
        try:
            tuned = result["model"]["tuned"]
            json.dumps([result[key] for key in ("task", "n", "metrics")])
        except (KeyError, TypeError):
            raise RunError(f"{path}: not an evaluation; evaluate again, or remove it") from None
        if tuned != weights:
            raise VerificationError(
                f"{path}: was measured on other weights than the run has now (recorded {str(tuned)[:12]}, found "
                f"{weights[:12]}): one of them has changed since. Evaluate again, or remove it; nothing was uploaded"
            )
    return results
