"""Pages that are made from the code are up to date, and relative links in the docs lead somewhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_generated_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, content in generate.pages().items():
        assert path.read_text(encoding="utf-8") == content, f"{path.name} is out of date: run `make docs`"


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_no_placeholder_is_left() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.findall(r"QUICKSTART_OUTPUT|QUARTER_HOUR|TODO|FIXME|TBD", page.read_text(encoding="utf-8")), page


def test_every_module_says_what_lives_there() -> None:
    for module in sorted((ROOT / "src").rglob("*.py")):
        assert module.read_text(encoding="utf-8").lstrip().startswith('"""'), f"{module} has no docstring"
