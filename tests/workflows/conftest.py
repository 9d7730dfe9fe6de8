"""Trained tiny runs that the tests of this folder share. Copy one before writing into it (trained.copy_run)."""

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
