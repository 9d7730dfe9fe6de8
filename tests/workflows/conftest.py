"""What the tests of this folder share: trained tiny runs (trained.copy_run before writing into one), and an empty cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from trained import tiny_data, tiny_run


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory, "lora")


@pytest.fixture(scope="session")
def qlora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory, "qlora")


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory, "full")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that the runs were trained on."""
    return tiny_data(tmp_path_factory)


@pytest.fixture
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was measured on any card yet."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
