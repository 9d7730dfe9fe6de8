"""What must not leave this machine with a model: its paths, the user's name in them, and keys.

`without_paths` mends what libraries note in JSON files. `refuse_private` then reads every byte of text that would go up, and stops
the push for what is left: a key, or a path into a home folder. What it finds is named by kind and file, never shown.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from tunesmith.errors import UserError

BASE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
"""Where PEFT and transformers note the model that they started from."""

VOCABULARY = frozenset(
    (
        "content",
        "chat_template",
        "additional_special_tokens",
        "extra_special_tokens",
        "model_input_names",
        "target_modules",
        *(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")),
    )
)
"""Keys under which texts are tokens, templates or names of modules, which may look like a path and are none."""

TOKENS_OF_HUB = re.compile(r"\bhf_[A-Za-z0-9]{30,}")

KEYS = {
    "a key of OpenAI or Anthropic": re.compile(r"\bsk-[A-Za-z0-9_-]{24,}"),
    "a token of GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{60})"),
    "a key of AWS": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}

SECRET_NAMES = re.compile(r"(^|_)(API_?KEY|ACCESS_KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIALS)(_|$)", re.IGNORECASE)
"""Names of environment variables that hold keys: HF_TOKEN, WANDB_API_KEY, OPENAI_API_KEY, AWS_SECRET_ACCESS_KEY, ..."""

SHORTEST_KEY = 12
"""Characters. A shorter value of such a variable (TOKEN=none) stands in ordinary text too."""

HOMES = re.compile(r"(?<![\w.-])(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)[\w.@-]+[\\/]+[\w.@-]")
"""A path into somebody's home folder, on Linux, macOS or Windows."""


def leaf(path: str) -> str:
    """The last part of a path or address, without an address's query, which may hold a key."""
    bare = path.split("?")[0].split("#")[0] if "://" in path else path
    return PureWindowsPath(PurePosixPath(bare.rstrip("/\\")).name).name or "(unnamed)"


def is_absolute(text: str) -> bool:
    """Whether it looks like a file's path on some machine: POSIX, Windows, an address of a file, or in a home folder.

    On POSIX it takes two parts: a slash and one word (`/think`) is as likely a token.
    """
    return bool(re.match(r"/[^/\s]+/|~[\w.-]*[\\/]|file:|\\\\\w|[A-Za-z]:[\\/]", text))


def without_paths(value: Any, base: str, key: str = "") -> Any:
    """`value`, of a JSON file, with `base` for the model that it notes, and every other path reduced to its last part."""
    if isinstance(value, Mapping):
        inside = key == "base"  # of tunesmith.json
        return {
            name: without_paths(item, base, BASE_KEYS[0] if inside and name == "name" else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [without_paths(item, base, key) for item in value]
    if not isinstance(value, str) or key in VOCABULARY:
        return value
    if key in BASE_KEYS:
        return base if value else value
    if key == "parent":  # of tunesmith.json: from the adapter's folder, or absolute
        return name_of_adapter(value)
    return leaf(value) if is_absolute(value) else value


def name_of_adapter(path: str) -> str:
    """An adapter by its run: of RUN/adapter the run's name."""
    name = leaf(path)
    parent = leaf(path.rstrip("/\\")[: -len(name)]) if name == "adapter" else ""
    return name if parent in ("", ".", "..", "(unnamed)") else parent


def refuse_private(files: Iterable[tuple[str, bytes]], token: str | None, paths: Sequence[str] = ()) -> None:
    """Raise UserError where a file of `(name, content)` holds the hub's token, another key, or a path of this machine.

    `paths` are further ones that must not stand in them: the run's folder, the base's.
    """
    secrets = {"the hub's token": token} if token else {}
    secrets |= {
        f"the value of ${name}": value
        for name, value in os.environ.items()
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST_KEY
    }
    places = _places(paths)
    for name, content in files:
        text = content.decode("utf-8", "replace")
        if found := _secret(text, secrets):
            raise UserError(
                f"{name}: {found} stands in it; nothing was uploaded; take it out of the run's files and revoke it"
            )
        if places.search(text) or HOMES.search(text):
            raise UserError(
                f"{name}: a path of this machine stands in it (a home folder, the run's or the base's); nothing was uploaded; take it "
                "out of the file"
            )


def _secret(text: str, secrets: Mapping[str, str]) -> str | None:
    for what, value in secrets.items():
        if value in text:
            return what
    if TOKENS_OF_HUB.search(text):
        return "a token of the hub"
    return next((what for what, pattern in KEYS.items() if pattern.search(text)), None)


def _places(paths: Sequence[str]) -> re.Pattern[str]:
    """Any of `paths`, or something inside of the home folder of who runs this.

    A home folder alone is no find: /root is a token of many vocabularies.
    """
    homes = {str(Path.home()), os.environ.get("HOME", ""), os.environ.get("USERPROFILE", "")}
    with contextlib.suppress(OSError, KeyError):  # a user id without a name, as in containers
        homes.add(f"/home/{getpass.getuser()}")
    inside = [re.escape(home.rstrip("/\\")) + r"[\\/]+[\w.@-]" for home in sorted(homes) if len(home) > 1]
    whole = [re.escape(path) for path in paths if path.count("/") + path.count("\\") > 1]
    return re.compile("|".join(rf"(?<![\w.-]){one}" for one in (*inside, *whole)) or r"(?!)")
