"""Upload a finished adapter, model or GGUF file to the hub in one commit, and compare what the hub then lists with what was sent.

The token is huggingface_hub's own (HF_TOKEN, else `hf auth login`); how it is kept out of errors and logs: `export/hub_client.py`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

from tunesmith.errors import MachineError, UserError, VerificationError
from tunesmith.export.card import HUB_ID
from tunesmith.export.hub_client import ask, connected, token_of_hub
from tunesmith.export.package import WEIGHTS, Kind, Package, Upload
from tunesmith.models.hub import why_unreachable
from tunesmith.types import Progress, no_progress
from tunesmith.version import __version__

CARD = "README.md"

TITLE = re.compile(r"Upload ([a-z-]+) ([0-9a-f]{12}) with tunesmith \S+")
"""Of the commits that `push` makes: the kind, and the beginning of the hash of the weights that the run trained."""

LOADED = re.compile(
    r"(adapter_model|(pytorch_)?model(-\d{5}-of-\d{5})?)\.(safetensors|bin)(\.index\.json)?|tf_model\.h5|adapter_config\.json"
)
"""Names by which transformers and PEFT find weights in a repository; with adapter_config.json it is taken for an adapter."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What the hub has now. `deleted` are weights of an earlier push that this one took away, `also_there` files that stay."""

    url: str
    private: bool
    commit: str
    deleted: list[str]
    also_there: list[str]


def title(kind: Kind, weights: str) -> str:
    """The commit's title, by which a later push knows what was put there by tunesmith, and of which weights."""
    return f"Upload {kind} {weights[:12]} with tunesmith {__version__}"


def push_package(
    package: Package,
    card: str,
    repo: str,
    *,
    weights: str,
    public: bool = False,
    revision: str | None = None,
    replace: bool = False,
    private: Sequence[str] = (),
    progress: Progress = no_progress,
) -> Pushed:
    """Upload `package` with its card to the model repository `repo`, made private unless `public`, on the branch `revision`.

    `weights` is the hash of what the run trained. Weights of an earlier push that a loader could take for these go in the same commit;
    others that are there are refused, or with `replace` go too. `private` are paths of this machine that no file may hold.

    Raises UserError for a repository, token or name that cannot be used, MachineError where the hub cannot be reached,
    VerificationError where the hub lists other files than were sent.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_names(repo, revision)
    files = [*package.files, Upload.of(CARD, card.encode())]
    with connected(), ExitStack() as opened:
        token = token_of_hub()
        package.refuse_private(card, token, private)
        if why_unreachable() is not None:
            raise MachineError(f"{repo}: the hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE")
        api = HfApi(token=token)
        _make_repository(api, repo, public)
        if revision is not None:
            ask(repo, "making the branch", lambda: api.create_branch(repo, branch=revision, exist_ok=True))

        def stale() -> tuple[str, list[str]]:
            """The branch's last commit, and what of it must go. Raises UserError for what must not go unasked."""
            head = str(api.model_info(repo, revision=revision).sha)
            tree = api.list_repo_tree(repo, recursive=True, expand=True, revision=head)
            return head, _stale(repo, list(tree), {file.name for file in files}, package.kind, weights, replace)

        _, deleted = ask(repo, "listing the files", stale)
        additions = [CommitOperationAdd(file.name, opened.enter_context(_opened(file))) for file in files]
        stage = f"uploading {len(files)} files, {sum(file.size for file in files) / 2**20:.1f} MB"
        # One after another: given several files the library starts threads, and an interruption would wait for all of them.
        for number, addition in enumerate(additions):
            progress(stage, number, len(files))
            ask(repo, "the upload", _upload(api, repo, addition, revision), tries_itself=True)

        def commit() -> str:
            # Listed again each time: a commit whose answer was lost may have been made, and a file is not deleted twice.
            head, gone = stale()
            operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in gone)]
            made = api.create_commit(
                repo, operations, commit_message=title(package.kind, weights), revision=revision, parent_commit=head
            )
            return str(made.oid)

        made = ask(repo, "the commit", commit)
        listed = ask(repo, "listing the files", lambda: list(api.list_repo_tree(repo, recursive=True, revision=made)))
        progress(stage, len(files), len(files))
    others = _compare(repo, files, deleted, listed)
    return Pushed(f"{api.endpoint}/{repo}", not public, made, deleted, others)


def _upload(api: Any, repo: str, addition: Any, revision: str | None) -> Callable[[], None]:
    return lambda: api.preupload_lfs_files(repo, [addition], revision=revision, free_memory=False)


def _opened(file: Upload) -> BinaryIO:
    """What huggingface_hub reads the file from. An open file goes up by plain LFS, whose requests are ours to end.

    Given a path the library would use hf_xet where that is installed, which waits without end for a hub that does not answer (1.8.0: it
    still did after 590 s).
    """
    return io.BytesIO(file.source) if isinstance(file.source, bytes) else file.source.open("rb")


def check_names(repo: str, revision: str | None) -> None:
    """Raise UserError unless `repo` is ORG/NAME and `revision` the name of a branch."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        valid = HUB_ID.fullmatch(repo) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(
            f"--repo {repo!r}: expected ORG/NAME (letters, digits, '.', '_', '-'), for instance me/my-adapter"
        )
    if revision is not None and (not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", revision) or ".." in revision):
        raise UserError(f"--revision {revision!r}: expected a branch's name of letters, digits, '.', '_' and '-'")


def _stale(repo: str, tree: Sequence[Any], sent: set[str], kind: Kind, weights: str, replace: bool) -> list[str]:
    """The files of the branch that a loader could take for what is pushed, and that tunesmith may delete.

    Those are the weights, indexes and adapter configs that the push does not contain. tunesmith's own of the same kind may go: the last
    commit that touched them says so (`TITLE`). GGUF files are loaded by name, and several types of one model stand side by side; but
    those of other weights must go, because llama.cpp and Ollama take Q4_K_M where no type is named. Raises UserError for others.
    """
    mine, others = [], []
    for entry in tree:
        name = str(entry.path)
        commit = getattr(entry, "last_commit", None)
        if (
            not hasattr(entry, "blob_id")
            or name in sent
            or not (LOADED.fullmatch(name) or WEIGHTS["gguf"].fullmatch(name))
        ):
            continue
        found = TITLE.fullmatch(commit.title) if commit else None
        if name.endswith(".gguf") and kind.startswith("gguf"):
            if found and found[2] != weights[:12]:
                mine.append(name)
        elif found and found[1] == kind:
            mine.append(name)
        else:
            others.append(name)
    if others and not replace:
        raise UserError(
            f"{repo}: {', '.join(sorted(others))}: other weights, which loaders could take instead of these; nothing was uploaded. Choose "
            "another --repo or --revision, remove them, or pass --replace, which deletes them in the same commit"
        )
    return sorted([*mine, *others])


def _make_repository(api: Any, repo: str, public: bool) -> None:
    found = _visibility(api, repo)
    if found is None:
        ask(repo, "making the repository", lambda: api.create_repo(repo, private=not public), allowed=(409,))
        found = _visibility(api, repo)
        if found is None:
            raise UserError(f"{repo}: the name is taken, but the token cannot see it; choose another --repo")
        if found == public:
            raise VerificationError(
                f"{repo}: was to be made {'public' if public else 'private'}, and the hub made it "
                f"{'private' if public else 'public'} (a rule of the organization?); nothing was uploaded"
            )
    elif not found and not public:
        raise UserError(
            f"{repo}: exists and is public: anyone could read what is pushed there. Pass --public to write to it, or choose "
            "another --repo; tunesmith does not make a public repository private"
        )
    elif found and public:
        raise UserError(
            f"{repo}: exists and is private, and --public does not change that; leave --public out, or make it public in its "
            "settings on the hub"
        )


def _visibility(api: Any, repo: str) -> bool | None:
    """Whether the repository is private; None where there is none."""
    info = ask(repo, "looking at the repository", lambda: api.model_info(repo), allowed=(404,))
    return None if info is None else bool(info.private)


def _compare(repo: str, files: Sequence[Upload], deleted: Sequence[str], listed: Sequence[Any]) -> list[str]:
    """The names of other files in the listing. Raises VerificationError where one that was sent is missing or differs.

    The hub lists the SHA-256 of files in LFS, and git's hash, which is over the content too, of others.
    """
    there = {entry.path: entry for entry in listed if hasattr(entry, "blob_id")}
    problems = [f"{name} is still there" for name in deleted if name in there]
    for file in files:
        entry = there.pop(file.name, None)
        if entry is None:
            problems.append(f"{file.name} is missing")
        elif entry.size != file.size:
            problems.append(f"{file.name} has {entry.size} bytes, sent were {file.size}")
        elif entry.lfs is not None and entry.lfs.sha256 != file.sha256:
            problems.append(f"{file.name} has SHA-256 {entry.lfs.sha256}, sent was {file.sha256}")
        elif entry.lfs is None and entry.blob_id != file.git_hash():
            problems.append(f"{file.name} has git hash {entry.blob_id}, sent was {file.git_hash()}")
    if problems:
        raise VerificationError(
            f"{repo}: the hub does not list what was sent: {'; '.join(problems)}. Push again; if it stays so, remove the "
            "repository's .gitignore, or report it"
        )
    return sorted(name for name in there if name != ".gitattributes")
