"""Fixtures for the judge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from evaluation.judge_server import KEY, JudgeServer, prefer_longer


@pytest.fixture
def judge_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def longer(judge_key: None) -> Iterator[JudgeServer]:
    """A judge that prefers the longer answer."""
    with JudgeServer(prefer_longer) as server:
        yield server


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the client would have waited before each repetition."""
    seconds: list[float] = []
    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=seconds.append, time=time.time))
    return seconds
