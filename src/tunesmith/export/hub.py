"""Upload a finished adapter, model or GGUF file to the hub, and compare what the hub then lists with what was sent.

What goes up is a list of names that are known to be needed (`WEIGHTS`, `TEXTS`), taken from one folder, symbolic links refused:
no optimizer state, no pickle, no journal can be among them. Texts are read into memory, rid of this machine's paths and searched
for the token before anything is sent.

The token is huggingface_hub's own (HF_TOKEN, else `hf auth login`). A server may echo it in an error, a header or a warning; so
what a server says is never shown: errors are made from the status alone, outside of the handler (nothing is chained to them), and
the loggers of the HTTP libraries are silent meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tunesmith.errors import MachineError, ModelError, TunesmithError, UserError, VerificationError
from tunesmith.export.card import HUB_ID, Kind, is_absolute, leaf
from tunesmith.files import sha256_file
from tunesmith.models.hub import why_unreachable
from tunesmith.types import Progress, no_progress

T = TypeVar("T")

WEIGHTS: dict[Kind, re.Pattern[str]] = {
    "adapter": re.compile(r"adapter_model\.safetensors"),
    "merged": re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors"),
    "gguf": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf"),
}

TEXTS = frozenset(
    (
        "adapter_config.json",
        "tunesmith.json",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
    )
)
"""Files beside the weights that go up; the card is README.md."""

WITH_PATHS = frozenset(
    ("adapter_config.json", "tunesmith.json", "config.json", "generation_config.json", "tokenizer_config.json")
)
"""Texts in which libraries note where a model was read from."""

CARD = "README.md"

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each new try of a question that huggingface_hub asks once (it retries uploads by itself)."""

TIMEOUT = 30.0

AGAIN = (429, 500, 502, 503, 504)

MEANT = {
    400: "what was sent was refused as malformed; check --license, --revision and the name",
    401: "the token is not valid; make a new one (write access) at the hub and set HF_TOKEN, or run `hf auth login`",
    402: "the account has no space or plan for it",
    403: "the token may not do this; it needs write access to that repository or organization",
    404: "there is no such repository or revision, or the token cannot see it",
    409: "it conflicts with what is there; try again",
    413: "a file is larger than the hub takes",
    429: "too many requests; try again later",
}


@dataclass(frozen=True, slots=True)
class Upload:
    """One file as it goes up: from the disk, or (texts) as the bytes that were made of it."""

    name: str
    source: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, source: Path | bytes) -> Upload:
        """With its size and hash as they are now."""
        if isinstance(source, bytes):
            return cls(name, source, len(source), hashlib.sha256(source).hexdigest())
        return cls(name, source, source.stat().st_size, sha256_file(source))

    def git_hash(self) -> str:
        """SHA-1 of git's blob, by which the hub lists files that are not in LFS."""
        content = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class Package:
    """What goes up, and which files of the folder do not."""

    kind: Kind
    files: list[Upload]
    left_out: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The files' names, weights first."""
        return [file.name for file in self.files]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What the hub has now. `also_there` are files that were there before and stay."""

    url: str
    private: bool
    commit: str
    also_there: list[str]


# -- what goes up -----------------------------------------------------------------------------------------------------


def package_folder(folder: Path, kind: Kind, base: str) -> Package:
    """The files of an adapter or a model. `base` replaces the folder that the base was read from, in what notes it.

    Raises ModelError for a folder that is incomplete, is a symbolic link or holds one, VerificationError for weights that
    cannot be read whole.
    """
    refuse_links(folder)
    taken: list[Path] = []
    left: list[Path] = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        refuse_links(path)
        if path.is_dir():
            continue
        (taken if WEIGHTS[kind].fullmatch(name) or name in TEXTS else left).append(path)
    _refuse_incomplete(folder, kind, {path.name for path in taken})
    weights = [path for path in taken if path.name not in TEXTS]
    for path in weights:
        _check_safetensors(path)
    files = [Upload.of(path.name, path) for path in weights]
    files += [Upload.of(path.name, _text(path, base)) for path in taken if path.name in TEXTS]
    return Package(kind, files, [str(path.relative_to(folder)) for path in left])


def package_gguf(file: Path, secrets: Sequence[str]) -> Package:
    """One GGUF file. `secrets` are paths that must not stand in its header. Raises ModelError, VerificationError."""
    refuse_links(file)
    if not WEIGHTS["gguf"].fullmatch(file.name):
        raise ModelError(f"{file.name!r}: letters, digits, '.', '_' and '-' may stand in a GGUF file's name; rename it")
    if not file.is_file():
        raise ModelError(f"{file}: there is no such file; `tunesmith export RUN --to gguf:q4_k_m` writes one")
    with file.open("rb") as stream:
        head = stream.read(2**16)
    if head[:4] != b"GGUF":
        raise VerificationError(f"{file}: not a GGUF file (it begins with {head[:4]!r}); export it again")
    if any(secret.encode() in head for secret in secrets):
        raise VerificationError(f"{file}: its metadata hold a path of this machine; export it again")
    return Package("gguf", [Upload.of(file.name, file)])


def refuse_links(path: Path) -> None:
    """Raise ModelError for a symbolic link, or anything else that is neither file nor folder."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ModelError(
            f"{path}: is a symbolic link or a special file, which may lead outside of the folder; nothing was uploaded; "
            "put the file itself there, or remove it"
        )


def _refuse_incomplete(folder: Path, kind: Kind, names: set[str]) -> None:
    needed = {"adapter_config.json", "adapter_model.safetensors"} if kind == "adapter" else {"config.json"}
    if kind == "merged":
        index = folder / "model.safetensors.index.json"
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
        needed |= set(shards) or {"model.safetensors"}
    if missing := sorted(needed - names):
        raise ModelError(f"{folder}: incomplete: {', '.join(missing)} missing; nothing was uploaded; make it again")


def _check_safetensors(path: Path) -> None:
    """The header is well-formed and the tensors fill the file to its end: the library checks both when it opens one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = len(file.keys())
    except SafetensorError as error:
        raise VerificationError(f"{path}: damaged ({error}); nothing was uploaded") from error
    if not tensors:
        raise VerificationError(f"{path}: holds no tensors; nothing was uploaded")


def _text(path: Path, base: str) -> bytes:
    """A text file's bytes; without this machine's paths where it is one that libraries write them into."""
    content = path.read_bytes()
    if path.name not in WITH_PATHS:
        return content
    try:
        value = json.loads(content)
    except ValueError as error:
        raise VerificationError(f"{path}: not JSON ({error}); nothing was uploaded") from error
    cleaned = _without_paths(value, base)
    return content if cleaned == value else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(value: Any, base: str, key: str = "") -> Any:
    if isinstance(value, Mapping):
        inside = key == "base"  # of tunesmith.json
        return {
            name: _without_paths(item, base, "base_name" if inside and name == "name" else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(item, base, key) for item in value]
    if isinstance(value, str) and key in ("base_name", "base_model_name_or_path", "_name_or_path", "name_or_path"):
        return base if value else value
    if isinstance(value, str) and key != "content" and is_absolute(value) and _exists(value):  # content: a token's text
        return leaf(value)
    return value


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, of a user that there is not, or with a null: no path
        return False


# -- the hub ----------------------------------------------------------------------------------------------------------


def push_package(
    package: Package,
    card: str,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str,
    progress: Progress = no_progress,
) -> Pushed:
    """Upload `package` with its card to the model repository `repo`, made private unless `public`, on the branch `revision`.

    Raises UserError for a repository, token or name that cannot be used, MachineError where the hub cannot be reached,
    VerificationError where the hub lists other files than were sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_names(repo, revision)
    files = [*package.files, Upload.of(CARD, card.encode())]
    with _silent_libraries():
        token = _token()
        _refuse_token(files, token)
        if why_unreachable() is not None:
            raise MachineError(f"{repo}: the hub cannot be reached; check the network, HF_ENDPOINT and HF_HUB_OFFLINE")
        api = HfApi(token=token)
        _make_repository(api, repo, public)
        if revision is not None:
            _ask(repo, "making the branch", lambda: api.create_branch(repo, branch=revision, exist_ok=True))
        additions = [
            CommitOperationAdd(file.name, file.source if isinstance(file.source, bytes) else str(file.source))
            for file in files
        ]
        stage = f"uploading {len(files)} files, {sum(file.size for file in files) / 2**20:.1f} MB"
        progress(stage, 0, 1)
        _ask(
            repo,
            "the upload",
            lambda: api.preupload_lfs_files(repo, additions, revision=revision, free_memory=False),
            tries_itself=True,
        )
        commit = _ask(
            repo,
            "the commit",
            lambda: api.create_commit(repo, additions, commit_message=message, revision=revision),
        )
        listed = _ask(
            repo,
            "listing the files",
            lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit.oid)),
        )
        progress(stage, 1, 1)
    others = _compare(repo, files, listed)
    return Pushed(f"{api.endpoint}/{repo}", not public, commit.oid, others)


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


def _token() -> str:
    from huggingface_hub import get_token

    token = _ask("the token", "reading the token", get_token, tries_itself=True)
    if not token:
        raise UserError("there is no token for the hub; set HF_TOKEN, or run `hf auth login` (write access)")
    return token


def _refuse_token(files: Sequence[Upload], token: str) -> None:
    for file in files:
        if isinstance(file.source, bytes) and token.encode() in file.source:
            raise UserError(
                f"{file.name}: the hub's token stands in it; nothing was uploaded; take it out of the run's files "
                "and revoke it"
            )


def _make_repository(api: Any, repo: str, public: bool) -> None:
    found = _visibility(api, repo)
    if found is None:
        _ask(repo, "making the repository", lambda: api.create_repo(repo, private=not public), allowed=(409,))
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
    info = _ask(repo, "looking at the repository", lambda: api.model_info(repo, timeout=TIMEOUT), allowed=(404,))
    return None if info is None else bool(info.private)


def _compare(repo: str, files: Sequence[Upload], listed: Sequence[Any]) -> list[str]:
    """The names of other files in the listing. Raises VerificationError where one that was sent is missing or differs."""
    there = {entry.path: entry for entry in listed if hasattr(entry, "blob_id")}
    problems = []
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


def _ask(
    repo: str, what: str, call: Callable[[], T], *, allowed: Sequence[int] = (), tries_itself: bool = False
) -> T | Any:
    """What `call` returns; None for a status in `allowed`. Busy and broken servers are asked again after each of `WAITS`.

    What is raised holds nothing that the server said, and no exception that does.
    """
    import httpx

    waits = () if tries_itself else WAITS
    for wait in (*waits, None):
        problem: TunesmithError
        try:
            return call()
        # The hub's and httpx's errors; huggingface_hub's own for uploads (RuntimeError) and for answers that are not what
        # they should be (ValueError, KeyError, TypeError).
        except (httpx.HTTPError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            status, transport = _status(error), _is_transport(error)
            if status in allowed:
                return None
            again = (status in AGAIN or transport) and wait is not None
            problem = _explained(repo, what, error, status, transport)
        if not again:
            break
        time.sleep(wait or 0.0)
    raise problem


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error, or what caused it, came with."""
    found = (getattr(getattr(link, "response", None), "status_code", None) for link in _chain(error))
    return next((status for status in found if status is not None), None)


def _is_transport(error: BaseException) -> bool:
    import httpx

    return any(isinstance(link, httpx.TransportError) for link in _chain(error))


def _explained(repo: str, what: str, error: BaseException, status: int | None, transport: bool) -> TunesmithError:
    """Our error, made of the status or the error's type: text of the server is left out, it may hold the token."""
    if status is not None and (status >= 500 or status == 429):
        meant = MEANT.get(status, "the hub is out of order; try again later, what was uploaded is not uploaded again")
        return MachineError(f"{repo}: {what} failed: the hub answered {status}: {meant}")
    if status is not None:
        return UserError(f"{repo}: {what} failed: the hub answered {status}: {MEANT.get(status, 'it refused')}")
    if transport:
        return MachineError(
            f"{repo}: {what} was interrupted ({type(error).__name__}); push again: what was uploaded is not uploaded again"
        )
    return MachineError(
        f"{repo}: {what} failed ({type(error).__name__}); push again: what was uploaded is not uploaded again"
    )


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """No log line and no warning of the HTTP libraries: they quote addresses, headers and the server's text."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx", "httpcore", "hf_xet")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
