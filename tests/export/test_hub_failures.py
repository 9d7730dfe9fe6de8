"""How a push meets a hub that fails, and that no error shows the token."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import traceback
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.utils import _http as http_of_hub

from hub_runs import NAME, record_texts, shard
from stub_hub import DROP, STALL, STALL_INSIDE, TOKEN, StubHub
from tunesmith.errors import MachineError, UserError, VerificationError
from tunesmith.export import hub_client
from tunesmith.workflows.push import push

# -- a hub that fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/", "/preupload/", "/lfs/", "/objects/batch", "/tree/"])
def test_a_busy_hub_is_asked_again(run: Path, hub: StubHub, place: str) -> None:
    left = [503, 429]
    hub.fail = lambda method, path: left.pop() if place in path and left else None
    push(run, NAME)
    assert left == []
    assert len(hub.files(NAME)) == 5


def test_a_commit_whose_answer_was_lost_is_not_made_twice(run: Path, hub: StubHub) -> None:
    left = [500]
    hub.after = lambda method, path: left.pop() if "/commit/" in path and left else None
    push(run, NAME)
    assert len(hub.files(NAME)) == 5
    left = [500]
    hub.after = lambda method, path: left.pop() if "/repos/create" in path and left else None
    push(run, "me/second")
    assert len(hub.files("me/second")) == 5


def test_an_interrupted_upload_goes_on_where_it_was(run: Path, hub: StubHub) -> None:
    merged = shard(run)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(merged.glob("*.safetensors"))]
    hub.fail = lambda method, path: DROP if path == f"/lfs/{hashes[1]}" else None
    with pytest.raises(
        MachineError, match=r"me/bins: the upload .*push again: what was uploaded is not uploaded again"
    ):
        push(run, NAME, what="merged")
    assert list(hub.stored) == [hashes[0]]
    assert hub.files(NAME) == {}
    hub.fail = lambda method, path: None
    hub.requests.clear()
    push(run, NAME, what="merged")
    assert [path for method, path in hub.requests if method == "PUT"] == [f"/lfs/{hashes[1]}"]
    assert json.loads(hub.files(NAME)["config.json"])["_name_or_path"] == "base-32"
    assert sorted(hub.files(NAME)) == [
        "README.md",
        "config.json",
        *sorted(path.name for path in merged.glob("*.safetensors")),
        "model.safetensors.index.json",
        "tunesmith.json",
    ]


PLACES = [
    "/api/models/me/bins",
    "/repos/create",
    "/validate-yaml",
    "/preupload/",
    "/objects/batch",
    "/lfs/",
    "/lfs-verify",
    "/commit/",
    "/tree/",
]


@pytest.mark.parametrize("how", [STALL, STALL_INSIDE])
@pytest.mark.parametrize("place", PLACES)
def test_a_hub_that_stops_answering_is_left_after_three_times(
    run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch, place: str, how: int
) -> None:
    if (place, how) == ("/lfs/", STALL_INSIDE):
        pytest.skip("an upload's answer has no body that is read")
    monkeypatch.setattr(hub_client, "SILENCE", 0.5)
    before = http_of_hub._GLOBAL_CLIENT_FACTORY
    hub.fail = lambda method, path: how if place in path else None
    begun = time.monotonic()
    with pytest.raises(MachineError, match=r"^me/bins: .* failed: the hub did not answer 3 times in a row; ") as caught:
        push(run, NAME)
    assert time.monotonic() - begun < 60  # the library's tries times ours would be 30 x 0.5 s and more for one question
    assert sum(place in path for _, path in hub.requests) == 3
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert http_of_hub._GLOBAL_CLIENT_FACTORY is before
    assert huggingface_hub.get_session().timeout == httpx.Timeout(None)


def test_files_go_up_by_plain_lfs_where_the_faster_transfer_is_installed(
    run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf_xet has no limit of time: it would wait for this hub without end."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.fail = lambda method, path: STALL if "xet" in path else None
    push(run, NAME)
    assert hub.count("PUT", "/lfs/") == 1
    assert hub.count("GET", "xet") == 0


def test_the_clients_own_factory_is_used_and_comes_back(run: Path, hub: StubHub) -> None:
    made: list[httpx.Client] = []

    def factory() -> httpx.Client:
        made.append(http_of_hub.default_client_factory())
        made[-1].headers["X-Of-The-Caller"] = "1"
        return made[-1]

    huggingface_hub.set_client_factory(factory)
    try:
        push(run, NAME)
        assert http_of_hub._GLOBAL_CLIENT_FACTORY is factory
    finally:
        huggingface_hub.set_client_factory(http_of_hub.default_client_factory)
    assert len(made) == 1
    assert made[0].is_closed
    assert hub.count("POST", "/commit/") == 1


def test_how_long_a_busy_hub_is_waited_for(run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    left = [429]
    hub.headers = {"Retry-After": "7"}
    hub.fail = lambda method, path: left.pop() if "/repos/create" in path and left else None
    push(run, NAME)
    assert waited == [7.0]
    for place in ("/repos/create", "/preupload/", "/commit/"):
        waited.clear()
        hub.headers = {"Retry-After": "3600"}
        hub.fail = lambda method, path, place=place: 429 if place in path else None  # type: ignore[misc]
        with pytest.raises(MachineError, match=r"failed: the hub answered 429, and asks to try again in 3600 seconds"):
            push(run, f"me/other{PLACES.index(place)}")
        assert waited == []
    hub.headers = {"RateLimit": '"api";r=0;t=1234'}
    with pytest.raises(MachineError, match=r"asks to try again in 1234 seconds"):
        push(run, "me/third")


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("adapter_model.safetensors", "size", 5, r"adapter_model.safetensors has 5 bytes, sent were \d+"),
        ("adapter_model.safetensors", "lfs", "00" * 32, r"adapter_model.safetensors has SHA-256 0{64}, sent was"),
        ("README.md", "oid", "11" * 20, r"README.md has git hash 1{40}, sent was"),
        ("tunesmith.json", None, None, r"tunesmith.json is missing"),
    ],
)
def test_a_listing_that_differs_is_found(
    run: Path, hub: StubHub, name: str, key: str | None, value: Any, message: str
) -> None:
    def spoil(path: str, entry: dict[str, Any]) -> dict[str, Any] | None:
        if path != name:
            return entry
        if key is None:
            return None
        return {**entry, key: {**entry["lfs"], "oid": value} if key == "lfs" else value}

    hub.spoil = spoil
    with pytest.raises(VerificationError, match=rf"me/bins: the hub does not list what was sent: {message}"):
        push(run, NAME)


# -- the token --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "place"),
    [
        *((status, place) for status in (401, 403, 500) for place in PLACES if place != "/validate-yaml"),
        (400, "/validate-yaml"),
        (404, "/commit/"),
    ],
)
def test_no_error_shows_the_token(
    run: Path,
    hub: StubHub,
    status: int,
    place: str,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.fail = lambda method, path: status if place in path else None
    for name in ("", "huggingface_hub", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    with pytest.raises(
        MachineError if status == 500 else UserError, match=rf"^me/bins: .*the hub answered {status}: "
    ) as caught:
        push(run, NAME)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert TOKEN not in caplog.text
    assert TOKEN not in "".join(capsys.readouterr())


def test_no_token_and_a_token_in_the_run_are_refused(
    run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    template = run / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text() + f"{{# {TOKEN} #}}")
    record_texts(run)
    with pytest.raises(
        UserError, match=r"chat_template.jinja: the hub's token stands in it; nothing was uploaded"
    ) as caught:
        push(run, NAME)
    assert TOKEN not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"no token for the hub; set HF_TOKEN, or run `hf auth login`"):
        push(run, NAME)
    assert hub.requests == []


def test_loggers_are_as_they_were_afterwards(run: Path, hub: StubHub) -> None:
    logging.getLogger("httpx").setLevel(logging.INFO)
    push(run, NAME)
    assert logging.getLogger("httpx").level == logging.INFO


def test_a_hub_that_does_not_answer(run: Path, hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match=r"me/bins: the hub cannot be reached; check the network"):
        push(run, NAME)
