"""Write what is made from code and results: docs/configuration.md, docs/commands.md, the JSON schema, the README's table of
speeds, and the whole of that table.

    make docs

tests/test_docs.py fails when one of them is out of date.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from tunesmith.config import RunConfig, json_schema

DOCS = Path(__file__).parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = ROOT / "src" / "tunesmith" / "run.schema.json"
COMMANDS = (
    "quickstart",
    "data",
    "data check",
    "data stats",
    "data preview",
    "data split",
    "train",
    "resume",
    "eval",
    "compare",
    "sweep",
    "chat",
    "serve",
    "merge",
    "adapters",
    "adapters list",
    "adapters show",
    "adapters verify",
    "export",
    "push",
    "report",
    "doctor",
    "advise",
    "plan",
    "bench",
)


def configuration() -> str:
    """Every key with its type, default and meaning."""
    lines = [
        "# Configuration",
        "",
        "Every key of `run.yaml`, made from the code by `make docs`. Any of them can be set on the command line with",
        "`--set section.key=value`. For completion and checks in an editor, point it at the JSON schema that ships in the",
        "package (`run.schema.json`), for instance with this first line in the YAML file:",
        "",
        "```yaml",
        "# yaml-language-server: $schema=PATH/TO/tunesmith/run.schema.json",
        "```",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in _rows(RunConfig)]
    return "\n".join(lines) + "\n"


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    defaults: Any = model()
    for name, info in model.model_fields.items():
        value = getattr(defaults, name)
        if isinstance(value, BaseModel):
            yield from _rows(type(value), f"{prefix}{name}.")
            continue
        shown = (
            "none"
            if value is None
            else "true"
            if value is True
            else "false"
            if value is False
            else str(value) or "none"
        )
        allowed = _choices(info.annotation)
        meaning = (info.description or "").replace("|", "\\|")
        if allowed and not all(f"`{choice}`" in meaning for choice in allowed):
            meaning += f" One of {', '.join(f'`{choice}`' for choice in allowed)}."
        yield f"{prefix}{name}", shown, meaning


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return []


def commands() -> str:
    """Every command's --help."""
    parts = ["# Commands", "", "Made from the code by `make docs`.", ""]
    for name in ("", *COMMANDS):
        title = f"tunesmith {name}".strip()
        parts += [f"## `{title}`", "", "```text", help_of(name), "```", ""]
    return "\n".join(parts)


def help_of(name: str) -> str:
    """The help text of one command, 80 columns wide."""
    arguments = [sys.executable, "-m", "tunesmith", *name.split(), "--help"]
    environment = os.environ | {"COLUMNS": "80", "TERMINAL_WIDTH": "80"}
    text = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    return text.replace("python -m tunesmith", "tunesmith").rstrip()


def speed_table() -> dict[Path, str]:
    """The README with the table of its Speed section, and the page with all rows, from the committed measurement."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import engine

    rows = engine.read([str(RESULTS / "engine_h100.json")])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, begin, rest = readme.partition("<!-- speed: made by `make docs` -->\n")
    _, end, after = rest.partition("<!-- end of speed -->")
    page = ["# The fused engine on one H100", "", *_versions(rows), "", engine.COLUMNS, "", engine.markdown(rows), ""]
    return {
        ROOT / "README.md": f"{before}{begin}{engine.summary(rows)}\n{end}{after}",
        RESULTS / "engine_h100.md": "\n".join(page),
    }


def planner_page() -> dict[Path, str]:
    """docs/planner.md with its tables of predictions, from the committed measurements."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import caps
    import planner

    path = DOCS / "planner.md"
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition("<!-- planner: made by `make docs` -->\n")
    _, end, after = rest.partition("<!-- end of planner -->")
    tables = ""
    for name in ("", "_second", "_blind", "_bf16_weights"):
        result = json.loads((RESULTS / f"planner{name}_h100.json").read_text(encoding="utf-8"))
        tables += f"{planner.summary(result)}\n\n{planner.table(result['rows'])}\n\n"
    result = json.loads((RESULTS / "caps_fourth_h100.json").read_text(encoding="utf-8"))
    tables += f"## Under a cap\n\n{caps.summary(result)}\n\n{caps.table(result['rows'])}\n\n"
    return {path: f"{before}{begin}\n{tables}{end}{after}"}


def _versions(rows: dict[str, dict[str, Any]]) -> list[str]:
    row = next(iter(rows.values()))
    found = {name: version for row in rows.values() for name, version in row["versions"].items()}
    return [f"{row['hardware']['name']}; {', '.join(f'{name} {version}' for name, version in found.items())}."]


def pages() -> dict[Path, str]:
    """What each generated file should hold."""
    return {
        DOCS / "configuration.md": configuration(),
        DOCS / "commands.md": commands(),
        SCHEMA: json_schema(),
        **speed_table(),
        **planner_page(),
    }


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")
        print(path)
