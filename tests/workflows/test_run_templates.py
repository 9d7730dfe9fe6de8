"""A run keeps its chat template: what it was trained with is what evaluation, chat, merge and resume use."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny import CHATML, make_tiny_model, make_tokenizer, write_jsonl
from tunesmith.config import RunConfig, load_config
from tunesmith.errors import RunError
from tunesmith.runs import RunFolder
from tunesmith.types import Message
from tunesmith.workflows.load import load
from tunesmith.workflows.train import restart, start

ASK = [Message("user", "What is this?")]
SWITCHED = CHATML.replace(
    "assistant\n' }}{% endif %}",
    "assistant\n' }}{% if not enable_thinking | default(true) %}<think></think>{% endif %}{% endif %}",
).replace("message.role + '\n' +", "message.role + '\n' + ('<think></think>' if message.role == 'assistant' else '') +")


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n}?", "completion": f"number {n}"} for n in range(count)]


@pytest.fixture
def configure(tmp_path: Path) -> Any:
    def make(template: str = "auto", own: str = CHATML, **values: Any) -> RunConfig:
        model = make_tiny_model(tmp_path / "model", tokenizer=make_tokenizer(chat_template=own))
        data = write_jsonl(tmp_path / "rows.jsonl", rows(8))
        settings: dict[str, Any] = {
            "model.name": str(model),
            "model.dtype": "fp32",
            "model.device": "cpu",
            "data.path": str(data),
            "data.chat_template": template,
            "training.epochs": 1,
            "training.batch_size": 4,
        }
        return load_config(None, [], settings | {key.replace("__", "."): value for key, value in values.items()})

    return make


def test_a_template_file_may_change_or_go_after_training(configure: Any, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    text = CHATML.replace("<|im_end|>", "!<|im_end|>")
    template.write_text(text)
    run = tmp_path / "run"
    start(configure(str(template)), run).train()
    for change in (lambda: template.write_text(CHATML), template.unlink):
        change()
        chat = load(run).chat
        assert chat.render(ASK) == "<|im_start|>user\nWhat is this?!<|im_end|>\n"
        assert chat.hash == RunFolder.open(run).metadata["chat_template"]["hash"]
    (run / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(RunError, match=r"this is not the chat template that the run was trained with; restore it"):
        load(run)


def test_an_adapter_folder_has_the_template_it_was_trained_with(configure: Any, tmp_path: Path) -> None:
    start(configure("alpaca"), tmp_path / "run").train()
    adapter = Path(shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "elsewhere"))
    assert load(adapter).chat.render(ASK, True) == "### Instruction:\nWhat is this?\n\n### Response:\n"


def test_switched_off_thoughts_go_with_run_adapter_and_model(configure: Any, tmp_path: Path) -> None:
    start(configure(own=SWITCHED), tmp_path / "run").train()
    start(configure(own=SWITCHED, method="full"), tmp_path / "full").train()
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "elsewhere")
    for target in ("run", "elsewhere", "full", "full/model"):
        prompt = load(tmp_path / target).chat.render(ASK, True)
        assert prompt.endswith("<|im_start|>assistant\n<think></think>"), target


def test_a_template_that_prints_the_date_resumes_on_another_day(
    configure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import datetime

    from tunesmith.data import chat as chats

    class Clock(datetime):
        today_is = 1

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2020, 5, cls.today_is)

    monkeypatch.setattr(chats, "datetime", Clock)
    dated = "{{ strftime_now('%d %B') }}\n" + CHATML
    config = configure(own=dated)
    run = tmp_path / "run"
    session = start(config, run)
    Clock.today_is = 2
    again = restart(run)
    for one, other in zip(session.data.train, again.data.train, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
    again.train()
    assert load(run).chat.render(ASK).startswith("01 May\n")
    assert load(config.model.name).chat.render(ASK).startswith("02 May\n")


def test_an_evaluation_row_that_the_template_refuses_is_left_out_everywhere(configure: Any, tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    held = [*rows(3), {"system": "Be brief.", "prompt": "What is 9?", "completion": "number 9"}]
    path = write_jsonl(tmp_path / "held.jsonl", held)
    config = configure(
        own=refusing, data__eval_path=str(path), data__skip_bad_rows=True, evaluation__generate=True,
        evaluation__max_new_tokens=2,
    )  # fmt: skip
    session = start(config, tmp_path / "run")
    assert [row.line for row in session.data.eval_rows] == [1, 2, 3]
    assert any(note.startswith(f"{path}:4: the chat template refuses") for note in session.data.notes)
    session.train()
    evaluations = [event["metrics"] for event in session.run.events() if event["event"] == "eval"]
    assert [{"eval_loss", "exact_match", "rougeL"} <= metrics.keys() for metrics in evaluations] == [True]
