"""Adapters that are added, replaced and removed while requests run, and what is said of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import GREEDY, QUESTION, LiveServer, error_of, eventually
from serving_models import make_adapter, one_by_one

from tiny import make_tiny_model
from tunesmith.types import Message
from tunesmith.workflows.load import load


def test_adapters_are_added_replaced_and_removed(
    live: LiveServer, tiny_model: Path, adapters: dict[str, Path], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    def ask() -> str:
        text: str = live.client().completions.create(model="new-1", prompt="abc", **GREEDY).choices[0].text
        return text

    third = make_adapter(tiny_model, tmp_path / "third", seed=9, r=3)
    ids = [tiny_tokenizer("abc")["input_ids"]]
    before = live.engine.bank.bytes
    for path, status in ((third, 201), (adapters["hr"], 200)):
        response = live.post("/v1/adapters", json={"name": "new-1", "path": str(path)})
        assert (response.status_code, response.json()["replaced"]) == (status, status == 200)
        assert response.json()["swap_seconds"] < 1
        assert [ask()] == one_by_one(tiny_model, path, tiny_tokenizer, ids, 24)
    assert httpx.get(live.url + "/v1/adapters").json()["adapters"][-1] == {"name": "new-1", "path": str(adapters["hr"])}
    assert httpx.delete(live.url + "/v1/adapters/new-1").json() == {"name": "new-1", "deleted": True}
    assert httpx.delete(live.url + "/v1/adapters/new-1").status_code == 404
    with pytest.raises(openai.NotFoundError):
        ask()
    eventually(lambda: live.engine.bank.bytes == before)


def test_an_adapter_whose_base_nobody_knows_is_named_so(
    live: LiveServer, adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(adapters["cs"], tmp_path / "foreign"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    added = live.post("/v1/adapters", json={"name": "foreign", "path": str(adapter)})
    assert added.status_code == 201
    (said,) = added.json()["notes"]
    assert said.startswith(f"{adapter}: it was trained on /gone/base, which is not on this machine")
    other = make_tiny_model(tmp_path / "other", seed=9)
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(other)}))
    refused = live.post("/v1/adapters", json={"name": "foreign", "path": str(adapter)})
    assert refused.status_code == 400
    assert f"are not those of {other}" in error_of(refused)["message"]
    httpx.delete(live.url + "/v1/adapters/foreign")


def test_requests_that_run_end_on_the_adapter_that_they_began_with(
    live: LiveServer, tiny_model: Path, adapters: dict[str, Path], tiny_tokenizer: Any
) -> None:
    live.post("/v1/adapters", json={"name": "moving", "path": str(adapters["cs"])})
    prompt = "The quick brown fox"
    ids = [tiny_tokenizer(prompt)["input_ids"]]
    (expected,) = one_by_one(tiny_model, adapters["cs"], tiny_tokenizer, ids, 900)
    stream = iter(
        live.client().completions.create(model="moving", prompt=prompt, temperature=0, max_tokens=900, stream=True)
    )
    text = next(stream).choices[0].text
    numbers = live.engine.bank.numbers
    assert live.post("/v1/adapters", json={"name": "moving", "path": str(adapters["hr"])}).status_code == 200
    assert live.engine.running == 1
    assert len(live.engine.bank.numbers) == len(numbers) + 1
    assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
    eventually(lambda: len(live.engine.bank.numbers) == len(numbers))
    httpx.delete(live.url + "/v1/adapters/moving")


def test_an_adapter_is_talked_to_in_the_template_that_it_was_trained_with(
    live: LiveServer, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["cs"], tmp_path / "own"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    )
    assert live.post("/v1/adapters", json={"name": "own", "path": str(folder)}).status_code == 201
    usage = (
        live.client()
        .chat.completions.create(model="own", messages=[{"role": "user", "content": "hello"}], **GREEDY)
        .usage
    )
    assert usage.prompt_tokens == len("[user]hello") + 1
    httpx.delete(live.url + "/v1/adapters/own")


def test_a_run_is_served_with_its_own_template_and_equals_chat(tiny_run_folder: Path) -> None:
    loaded = load(tiny_run_folder)
    base = loaded.source.path
    with LiveServer(base, {"bins": tiny_run_folder}) as live:
        answer = live.client().chat.completions.create(model="bins", messages=QUESTION, **GREEDY)
    ids = loaded.chat.encode_prompt([Message("user", QUESTION[0]["content"])])
    expected = one_by_one(base, tiny_run_folder, loaded.tokenizer, [ids], 24)
    assert [answer.choices[0].message.content] == expected
