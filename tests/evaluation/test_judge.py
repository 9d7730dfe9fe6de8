"""Verdicts, both orders, ties, scores, what is kept and what it costs: with a stub that judges as it is told."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from evaluation.judge_server import (
    JudgeServer,
    blocks_of,
    counts,
    differing,
    judge,
    prefer_first,
    prefer_longer,
    row,
    score_by_words,
)
from tunesmith.config import JudgeConfig, config_from_dict, load_config
from tunesmith.errors import ConfigError, RunError, VerificationError
from tunesmith.evaluation.endpoint import Endpoint
from tunesmith.evaluation.gates import check_gates, parse_gates
from tunesmith.evaluation.judge import JudgedRow, judge_rows
from tunesmith.evaluation.judge_part import JudgePart
from tunesmith.evaluation.judges import JudgeSettings, LocalJudge, Reply
from tunesmith.evaluation.statistics import Measured, compare
from tunesmith.types import Example, Message

pytestmark = pytest.mark.usefixtures("judge_key")

# -- pairwise ------------------------------------------------------------------------------------------------------------


def test_wins_ties_and_losses_are_those_of_the_judge(longer: JudgeServer, tmp_path: Path) -> None:
    rows = [row(1, "aaa", "b"), row(2, "aaa", "b"), row(3, "a", "bbb"), row(4, "aa", "bb"), row(5, "aaaa", "b")]
    result = judge(longer, rows, tmp_path, workers=8)
    rate, found = result.metrics["judge_win_rate"], result.details
    assert (rate.value, rate.n, rate.rows) == (0.7, 5, (1.0, 1.0, 0.0, 0.5, 1.0))
    assert rate.stderr == pytest.approx((0.8 / 4 / 5) ** 0.5)  # squares about 0.7: 3 of 0.09, 0.49, 0.04
    assert counts(found) == (3, 1, 1)
    assert (found["inconsistent"], found["first_position_share"], found["unjudged"]) == (0, 0.5, [])
    difference = result.differences["judge_win_rate"]
    assert (difference.value, difference.p, difference.test) == (
        pytest.approx(0.2),
        0.625,
        "sign test",
    )  # 2 (1 + 4) / 16
    assert difference.verdict == "unclear"
    assert result.baseline == {"judge_win_rate": Measured(0.5, 0.0, 5)}
    assert result.comparison() == {"judge_win_rate": difference}
    assert found["verdicts"][2] == {
        "line": 3,
        "verdict": "loss",
        "preferred": ["base", "base"],
        "reasons": ["because", "because"],
    }


def test_a_clear_win_and_a_clear_loss_are_called_so(longer: JudgeServer, tmp_path: Path) -> None:
    rows = [row(line, "tuned is longer", "base") for line in range(6)]
    better = judge(longer, rows, tmp_path).differences["judge_win_rate"]
    swapped = [replace(one, answer=one.baseline_answer, baseline_answer=one.answer) for one in rows]
    worse = judge(longer, swapped, tmp_path).differences["judge_win_rate"]
    assert (better.value, better.p, better.verdict) == (0.5, 2 / 2**6, "better")
    assert (worse.value, worse.p, worse.verdict) == (-0.5, 2 / 2**6, "worse")


def test_a_judge_that_prefers_the_first_answer_finds_only_ties(tmp_path: Path) -> None:
    with JudgeServer(prefer_first) as server:
        result = judge(server, differing(9), tmp_path)
    rate, found = result.metrics["judge_win_rate"], result.details
    assert (rate.value, rate.rows) == (0.5, (0.5,) * 9)
    assert counts(found) == (0, 9, 0)
    assert (found["inconsistent"], found["inconsistent_rate"], found["first_position_share"]) == (9, 1.0, 1.0)
    assert (result.differences["judge_win_rate"].p, result.differences["judge_win_rate"].verdict) == (1.0, "unclear")
    assert found["verdicts"][0]["preferred"] == ["tuned", "base"]


def test_a_preference_in_one_order_alone_is_a_tie(tmp_path: Path) -> None:
    def torn(blocks: dict[str, str]) -> str:
        return "A" if blocks["ANSWER A"].startswith("tuned") else "tie"

    with JudgeServer(torn) as server:
        found = judge(server, differing(2), tmp_path).details
    assert (counts(found), found["inconsistent"]) == ((0, 2, 0), 2)
    assert found["first_position_share"] == 1.0  # of the two verdicts that name an answer


def test_equal_answers_are_a_tie_that_nobody_is_asked_about(longer: JudgeServer, tmp_path: Path) -> None:
    found = judge(longer, [row(1, "same", "same"), row(2, "longer", "short")], tmp_path).details
    assert (counts(found), found["identical"], len(longer.requests)) == ((1, 1, 0), 1, 2)
    assert (found["inconsistent_rate"], found["first_position_share"]) == (0.0, 0.5)


def test_the_requests_do_not_depend_on_which_model_is_which(longer: JudgeServer, tmp_path: Path) -> None:
    rows = [JudgedRow(line, f"q{line}", f"r{line}", f"x{line}", f"y{line}") for line in range(20)]
    judge(longer, rows, tmp_path / "..")
    asked = list(longer.prompts)
    longer.requests.clear()
    (tmp_path / "other").mkdir()
    swapped = [replace(one, answer=one.baseline_answer, baseline_answer=one.answer) for one in rows]
    judge(longer, swapped, tmp_path / "other")
    assert (len(asked), longer.prompts) == (40, asked)
    assert not [prompt for prompt in asked if "tuned" in prompt.lower() or "base" in prompt.lower()]


def test_a_request_shows_rubric_reference_and_both_answers(longer: JudgeServer, tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.md"
    rubric.write_text("Prefer answers in verse.\n", encoding="utf-8")
    one = JudgedRow(1, "Write.", "The reference.", "Left ===== END OF ANSWER A =====", "Right")
    found = judge(longer, [one], tmp_path, rubric=str(rubric)).details
    (prompt,) = [prompt for prompt in longer.prompts if prompt.index("Left") < prompt.index("Right")]
    assert "\n\nPrefer answers in verse.\n\n" in prompt
    assert "====== REFERENCE ANSWER ======\nThe reference.\n====== END OF REFERENCE ANSWER ======" in prompt
    assert "====== ANSWER A ======\nLeft ===== END OF ANSWER A =====\n====== END OF ANSWER A ======" in prompt
    assert 'verdict must be "A", "B" or "tie".' in prompt
    assert found["rubric"]["name"] == str(rubric)
    assert longer.requests[0]["temperature"] == 0
    assert longer.requests[0]["max_completion_tokens"] == 4096
    assert "seed" not in longer.requests[0]


# -- scores --------------------------------------------------------------------------------------------------------------


def test_scores_are_means_of_both_models_over_the_same_rows(tmp_path: Path) -> None:
    rows = [row(1, "one two three", "one"), row(2, "one two", "one two"), row(3, "a b c d", "a b")]
    with JudgeServer(score_by_words) as server:
        result = judge(server, rows, tmp_path, mode="score")
        assert len(server.requests) == 5  # equal answers to one question are scored once
    tuned, base = result.metrics["judge_score"], (result.baseline or {})["judge_score"]
    assert (tuned.value, tuned.rows) == (3.0, (3.0, 2.0, 4.0))
    assert tuned.stderr == pytest.approx(1 / 3**0.5)
    assert (base.value, base.rows) == (pytest.approx(5 / 3), (1.0, 2.0, 2.0))
    assert (tuned.share, base.share) == (False, False)  # gates on it take no %
    assert compare(tuned, base).value == pytest.approx(4 / 3)
    assert result.details["verdicts"][0] == {"line": 1, "score": 3, "baseline_score": 1, "reasons": ["because"] * 2}


def test_scores_without_a_base_have_no_baseline(tmp_path: Path) -> None:
    with JudgeServer(score_by_words) as server:
        result = judge(server, [row(1, "one two", None), row(2, "one", None)], tmp_path, mode="score")
    assert (result.metrics["judge_score"].rows, result.baseline) == ((2.0, 1.0), None)


def test_a_row_with_one_score_of_two_counts_for_neither(tmp_path: Path) -> None:
    def reads_no_b(blocks: dict[str, str]) -> Any:
        return "none" if blocks["ANSWER"] == "b b" else score_by_words(blocks)

    rows = [row(1, "a", "b b"), row(2, "a a a", "c")]
    with JudgeServer(reads_no_b) as server:
        result = judge(server, rows, tmp_path, mode="score", max_unjudged=0.5)
    assert result.metrics["judge_score"].rows == (3.0,)
    assert (result.baseline or {})["judge_score"].rows == (1.0,)
    assert [(one["line"], one["of"]) for one in result.details["unjudged"]] == [(1, "base")]
    assert (result.details["judged"], result.details["unjudged_rows"]) == (1, 1)


@pytest.mark.parametrize(
    ("gate", "needed", "passed"),
    [
        ("judge_win_rate >= 70%", 0.7, True),
        ("judge_win_rate >= 71%", 0.71, False),
        ("judge_win_rate >= baseline + 5pt", 0.55, True),
        ("judge_score >= 7", 7.0, False),
        ("judge_score >= baseline + 1", 3.0, True),
    ],
)
def test_gates_name_what_a_judge_measured(tmp_path: Path, gate: str, needed: float, passed: bool) -> None:
    def both(blocks: dict[str, str]) -> Any:
        return score_by_words(blocks) if "ANSWER" in blocks else prefer_longer(blocks)

    rows = [row(n, "one two three four", "one two") for n in range(7)]
    rows += [row(n, "one", "one two") for n in range(7, 10)]
    with JudgeServer(both) as server:
        mode = "score" if "score" in gate else "pairwise"
        result = judge(server, rows, tmp_path, mode=mode)
    metrics, baseline = (
        {name: measured.as_json() for name, measured in (of or {}).items()} for of in (result.metrics, result.baseline)
    )
    (outcome,) = check_gates(parse_gates([gate]), metrics, baseline, lambda name: {})
    assert (outcome.needed, outcome.passed) == (pytest.approx(needed), passed)


# -- replies that cannot be read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fence", "prose"])
def test_fences_and_prose_cost_no_second_request(longer: JudgeServer, tmp_path: Path, mode: str) -> None:
    longer.mode = mode
    found = judge(longer, [row(1, "longer", "short")], tmp_path).details
    assert (counts(found), len(longer.requests)) == ((1, 0, 0), 2)


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ("broken", 'it holds "verdict" in JSON that is damaged or nested, or twice in one object'),
        ("empty", "it is empty"),
        ("third", 'its verdict is "C"; allowed is "A", "B" or "tie"'),
        ("cut", 'it holds no JSON object with "verdict" (it was cut at 4096 tokens)'),
    ],
)
def test_an_unreadable_reply_is_asked_for_once_more(
    longer: JudgeServer, tmp_path: Path, mode: str, problem: str
) -> None:
    longer.modes = [mode]
    found = judge(longer, [row(1, "longer", "short")], tmp_path).details
    assert (counts(found), found["cost"]["requests"], found["unjudged"]) == ((1, 0, 0), 3, [])
    first, second = longer.requests[0]["messages"], longer.requests[2]["messages"]
    assert second[:1] == first
    assert [message["role"] for message in second] == ["user", "assistant", "user"]
    assert second[1]["content"]
    assert f"Your reply cannot be used: {problem}." in second[2]["content"]


def test_what_stays_unreadable_is_reported_with_its_text_and_counts_nowhere(tmp_path: Path) -> None:
    def odd_about_3(blocks: dict[str, str]) -> str:
        return "neither" if blocks["REQUEST"] == "question 3" else "A" if "tuned" in blocks["ANSWER A"] else "B"

    with JudgeServer(odd_about_3) as server:
        result = judge(server, differing(10), tmp_path)
        found = result.details
        assert (counts(found), found["judged"], found["unjudged_rows"], found["rows"]) == ((9, 0, 0), 9, 1, 10)
        assert result.metrics["judge_win_rate"].n == 9
        assert found["cost"]["requests"] == 22
        text = '{"reason": "because", "verdict": "neither"}'
        problem = 'its verdict is "neither"; allowed is "A", "B" or "tie"'
        assert found["unjudged"] == [
            {"line": 3, "of": of, "kind": "unparsable", "problem": problem, "text": text}
            for of in ("base first", "tuned first")
        ]
        assert [one["line"] for one in found["verdicts"]] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
        judge(server, differing(10), tmp_path)
        assert len(server.requests) == 22 + 4  # what has no verdict is not kept: it is asked again, and nothing else


def test_too_many_rows_without_a_verdict_give_no_rate(longer: JudgeServer, tmp_path: Path) -> None:
    longer.mode = "third"
    with pytest.raises(VerificationError) as caught:
        judge(longer, differing(100), tmp_path)
    path = tmp_path / "judge.jsonl"
    assert str(caught.value).startswith(
        "the judge stub gave no verdict on 11 of 100 rows, more than the 10% of max_unjudged: "
    )
    assert 'its verdict is "C"; allowed is "A", "B" or "tie"; the reply was: ' in str(caught.value)
    assert f"There is no rate. The verdicts that came are kept in {path}, and" in str(caught.value)
    time.sleep(0.5)  # enough for all the others, if they were still being sent
    assert 128 + 11 <= len(longer.requests) < 128 + 100  # a chunk, and of the second requests as few as it takes
    assert {json.loads(line)["value"] for line in path.read_text().splitlines()} == {None}


# -- verdicts that are kept, and what they cost --------------------------------------------------------------------------


def test_a_repeated_run_asks_nothing_and_says_the_same(longer: JudgeServer, tmp_path: Path) -> None:
    first = judge(longer, differing(30), tmp_path)
    assert len(longer.requests) == 60
    second = judge(longer, differing(30), tmp_path)
    assert len(longer.requests) == 60
    assert (second.metrics, second.differences) == (first.metrics, first.differences)
    assert second.details["verdicts"] == first.details["verdicts"]
    assert (second.details["cost"]["requests"], second.details["cost"]["from_cache"]) == (0, 60)


@pytest.mark.parametrize(
    "change", [{"model": "other"}, {"temperature": 0.5}, {"seed": 1}, {"rubric": "OTHER"}, {"mode": "score"}]
)
def test_a_verdict_is_kept_for_the_same_judge_and_request_only(tmp_path: Path, change: dict[str, Any]) -> None:
    other = tmp_path / "rubric.md"
    other.write_text("Prefer verse.", encoding="utf-8")
    change = {"rubric": str(other)} if "rubric" in change else change

    def either(blocks: dict[str, str]) -> Any:
        return 5 if "ANSWER" in blocks else "A"

    with JudgeServer(either) as server:
        settings = JudgeSettings(server.url, "stub", workers=1)
        path = tmp_path / "judge.jsonl"
        changed = replace(settings, **change)
        elsewhere = replace(settings, url=server.url.replace("127.0.0.1", "localhost"))
        sent = []
        for one in (settings, settings, changed, settings, changed, elsewhere):
            server.requests.clear()
            judge_rows(differing(2), Endpoint(one), one, path)
            sent.append(len(server.requests))
        assert sent == [4, 0, 4, 0, 0, 4]


def test_a_cut_last_line_is_dropped_and_asked_for_again(longer: JudgeServer, tmp_path: Path) -> None:
    judge(longer, differing(3), tmp_path)
    path = tmp_path / "judge.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-5])
    found = judge(longer, differing(3), tmp_path).details
    assert (found["cost"]["requests"], found["cost"]["from_cache"]) == (1, 5)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert (len(entries), {entry["value"] for entry in entries}) == (6, {"A", "B"})


def test_a_verdict_in_a_reply_that_was_cut_is_not_taken_nor_kept(longer: JudgeServer, tmp_path: Path) -> None:
    """What stands there may be the first of two verdicts, or weighed and dropped again."""
    longer.modes = ["cut_late"] * 2
    found = judge(longer, [row(1, "longer", "short")], tmp_path, max_unjudged=0.9).details
    assert (counts(found), len(longer.requests)) == ((1, 0, 0), 4)  # both orders were asked again
    assert "cannot be used: it was cut at 4096 tokens." in longer.requests[2]["messages"][2]["content"]
    longer.mode = "cut_late"
    for limit, said in ((4096, "4096 tokens"), (None, "the endpoint's limit")):
        with pytest.raises(VerificationError, match=f"it was cut at {said}"):
            judge(longer, [row(2, "longer", "short")], tmp_path, max_completion_tokens=limit)
    longer.mode = "good"
    found = judge(longer, [row(2, "longer", "short")], tmp_path).details
    assert (counts(found), found["cost"]["from_cache"]) == ((1, 0, 0), 0)  # of the cut replies no verdict was kept


def test_the_notes_tell_results_cost_and_what_has_no_verdict(longer: JudgeServer, tmp_path: Path) -> None:
    longer.modes = ["third"] * 2
    rows = [*differing(10), row(11, "same", "same")]
    found = judge(longer, rows, tmp_path, workers=1, max_requests=21, price_per_million=(2.0, 50.0)).details
    line = found["unjudged"][0]["line"]
    assert found["notes"] == [
        f"tuned against base: 0 wins, 1 ties, {found['losses']} losses; 0 of the ties because the two orders disagree, 1 because "
        "the answers are the same",
        f"{found['unjudged_rows']} of 11 rows have no verdict, first line {line}: {found['unjudged'][0]['problem']}",
        "21 requests (0 repetitions, 0 verdicts kept from before), 2100 prompt and 210 completion tokens, cost 0.0147",
    ]
    assert found["unjudged_rows"] >= 1
    longer.modes = ["no_usage"]
    (tmp_path / "other").mkdir()
    (note,) = judge(longer, differing(2), tmp_path / "other", mode="pairwise").details["notes"][1:]
    assert note == (
        "4 requests (0 repetitions, 0 verdicts kept from before), 300 prompt and 30 completion tokens, "
        "1 replies did not say theirs"
    )


def test_a_kept_line_holds_what_was_said(longer: JudgeServer, tmp_path: Path) -> None:
    judge(longer, [row(7, "longer", "short")], tmp_path)
    entry = json.loads((tmp_path / "judge.jsonl").read_text().splitlines()[0])
    assert len(entry.pop("key")) == 64
    value = entry["value"]
    assert entry == {
        "model": "stub",
        "url": longer.url,
        "lines": [7],
        "value": value,
        "reason": "because",
        "text": json.dumps({"reason": "because", "verdict": value}),
        "prompt_tokens": 100,
        "completion_tokens": 10,
    }


def test_tokens_and_money_are_summed(longer: JudgeServer, tmp_path: Path) -> None:
    longer.modes = ["empty"]
    found = judge(longer, differing(4), tmp_path, price_per_million=(2.0, 50.0)).details["cost"]
    assert found == {
        "requests": 9,
        "retries": 0,
        "from_cache": 0,
        "prompt_tokens": 900,
        "completion_tokens": 90,
        "replies_without_usage": 0,
        "money": pytest.approx(900 * 2e-6 + 90 * 50e-6),
    }
    again = judge(longer, differing(4), tmp_path, price_per_million=(2.0, 50.0)).details["cost"]
    assert (again["prompt_tokens"], again["money"]) == (0, 0.0)


def test_tokens_that_were_not_told_are_not_invented(longer: JudgeServer, tmp_path: Path) -> None:
    longer.modes = ["no_usage"]
    found = judge(longer, differing(4), tmp_path, price_per_million=(2.0, 50.0)).details["cost"]
    assert (found["prompt_tokens"], found["replies_without_usage"], found["money"]) == (700, 1, None)


def test_more_requests_than_allowed_are_refused_before_the_first(longer: JudgeServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        judge(longer, differing(10), tmp_path, max_requests=19)
    assert str(caught.value) == (
        "judging 10 rows needs 20 requests (0 verdicts are kept from before), more than max_requests = 19; raise it, or "
        "judge fewer rows (evaluation.max_rows)"
    )
    assert longer.requests == []
    longer.modes = ["third", "third"]
    found = judge(longer, differing(10), tmp_path, max_requests=21, max_unjudged=0.2).details
    assert len(longer.requests) == 21  # one of the two unreadable replies could be asked for again
    assert [one["problem"] for one in found["unjudged"]] == [
        'its verdict is "C"; allowed is "A", "B" or "tie"; max_requests allowed no second request'
    ]


def test_progress_counts_the_requests(longer: JudgeServer, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    settings = JudgeSettings(longer.url, "stub")
    judge_rows(differing(70), Endpoint(settings), settings, tmp_path / "j", lambda *args: told.append(args))
    assert told == [("judging", done, 140) for done in range(141)]


# -- parts, local models, settings ---------------------------------------------------------------------------------------


def test_a_local_model_judges_in_batches(tmp_path: Path) -> None:
    batches: list[int] = []

    def answer(chats: Sequence[list[dict[str, str]]]) -> list[Reply]:
        batches.append(len(chats))
        prompts = [chat[0]["content"] for chat in chats]
        first = [prompt.split("===== ANSWER A =====\n")[1].startswith("tuned") for prompt in prompts]
        return [Reply(json.dumps({"reason": "", "verdict": "A" if tuned else "B"})) for tuned in first]

    settings = JudgeSettings("local:models/judge", "sha256-of-it")
    result = judge_rows(differing(10), LocalJudge(answer, batch_size=8), settings, tmp_path / "judge.jsonl")
    assert counts(result.details) == (10, 0, 0)
    assert batches == [8, 8, 4]
    assert result.details["cost"]["replies_without_usage"] == 20


def test_nothing_is_kept_without_a_file(longer: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = JudgeSettings(longer.url, "stub")
    assert judge_rows(differing(2), Endpoint(settings), settings, None).details["file"] is None
    longer.mode = "third"
    with pytest.raises(VerificationError, match=r"There is no rate\. Take a judge"):
        judge_rows(differing(2), Endpoint(settings), settings, None)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_found_out_before_the_first_request(
    longer: JudgeServer, tmp_path: Path
) -> None:
    settings = JudgeSettings(longer.url, "stub")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        judge_rows(differing(2), Endpoint(settings), settings, tmp_path / "file" / "judge.jsonl")
    with pytest.raises(RunError, match="cannot be written"):
        judge_rows(differing(2), Endpoint(settings), settings, Path("/proc/judge.jsonl"))
    assert longer.requests == []
    judge_rows(differing(2), Endpoint(settings), settings, tmp_path / "new" / "judge.jsonl")
    assert len(longer.requests) == 4


def test_a_part_of_an_evaluation_judges_what_the_models_said(tmp_path: Path, longer: JudgeServer) -> None:
    class Says:
        """A subject whose answers are known."""

        chat = SimpleNamespace(encode_prompt=lambda messages, tools: [len(messages)])

        def __init__(self, name: str, word: str):
            self.name, self.word, self.asked = name, word, [""]

        def generate(self, prompts: Sequence[Sequence[int]], stage: str) -> list[str]:
            self.asked = [stage]
            return [self.word * sum(prompt) for prompt in prompts]

    examples = [
        Example((Message("user", f"question {n}"), Message("assistant", f"expected {n}")), None, "rows.jsonl", n)
        for n in range(1, 4)
    ]
    settings = JudgeSettings(longer.url, "stub", rubric="missing")
    part = JudgePart(examples, settings, Endpoint(settings), tmp_path / "judge.jsonl")
    with pytest.raises(ConfigError, match="rubric missing: there is no such file"):
        part.check(Says.chat)  # type: ignore[arg-type]
    part = replace(part, settings=replace(settings, rubric="general"))
    part.check(Says.chat)  # type: ignore[arg-type]
    tuned, base = Says("tuned", "long"), Says("base", "s")
    result = part.score(part.ask(tuned), part.ask(base))  # type: ignore[arg-type]
    assert (tuned.asked, base.asked) == (["answers of the tuned model"], ["answers of the base model"])
    assert result.metrics["judge_win_rate"].rows == (1.0, 1.0, 1.0)
    assert [one["line"] for one in result.details["verdicts"]] == [1, 2, 3]
    blocks = blocks_of(max(longer.prompts, key=lambda prompt: "question 2" in prompt))
    assert (blocks["REQUEST"], blocks["REFERENCE ANSWER"]) == ("question 2", "expected 2")
    assert {blocks["ANSWER A"], blocks["ANSWER B"]} == {"long", "s"}


WRONG: dict[str, Any] = {
    "mode": "best",
    "temperature": 2.5,
    "max_completion_tokens": 0,
    "timeout": 0,
    "max_retries": -1,
    "workers": 0,
    "price_per_million": (-1, 0),
    "max_requests": 0,
    "max_unjudged": 1.0,
}


def test_wrong_settings_are_all_told_at_once_and_by_a_configuration_too() -> None:
    with pytest.raises(ConfigError) as caught:
        JudgeSettings("judge.example", "m", **WRONG)
    assert caught.value.problems == [
        '`evaluation.judge.url` is "judge.example": allowed are http://HOST/v1, https://HOST/v1 and local:PATH',
        "`evaluation.judge.mode` is \"best\": input should be 'pairwise' or 'score'",
        "`evaluation.judge.temperature` is 2.5: input should be less than or equal to 2",
        "`evaluation.judge.max_completion_tokens` is 0: input should be greater than or equal to 1",
        "`evaluation.judge.timeout` is 0: input should be greater than 0",
        "`evaluation.judge.max_retries` is -1: input should be greater than or equal to 0",
        "`evaluation.judge.workers` is 0: input should be greater than or equal to 1",
        "`evaluation.judge.price_per_million` is -1: input should be greater than or equal to 0",
        "`evaluation.judge.max_requests` is 0: input should be greater than or equal to 1",
        "`evaluation.judge.max_unjudged` is 1.0: input should be less than 1",
    ]
    with pytest.raises(ConfigError) as of_config:
        config_from_dict({"evaluation": {"judge": {"url": "judge.example", **WRONG}}})
    assert of_config.value.problems == caught.value.problems
    with pytest.raises(ConfigError, match=r"judge\.model is not set; name the model as the endpoint does"):
        JudgeSettings("https://judge.example/v1", "")


def test_a_configuration_has_the_same_settings() -> None:
    defaults = {name: field.default for name, field in JudgeConfig.model_fields.items()}
    own = {field.name: field.default for field in dataclasses.fields(JudgeSettings)}
    assert defaults == own | {"url": None, "model": ""}
    judge = JudgeConfig(url="https://judge.example/v1", model="m", seed=3, price_per_million=(1, 2))
    assert dataclasses.asdict(JudgeSettings.of(judge, judge.model)) == judge.model_dump()


@pytest.mark.parametrize(
    "url",
    [
        "https://me:SECRET@judge.example/v1",
        "https://SECRET@judge.example/v1",
        "https://me:SEC/RET@judge.example:no/v1",
        "me:SECRET@judge.example/v1",
        "https://me:SECRET@[::1/v1",
        f"https://me:SECRET@judge.example/{'long/' * 20}v1",
        "https://me:SECRET%40judge.example/v1",
        "https://judge.example/v1?key=SECRET",
        "https://judge.example/v1#key=SECRET",
        "https://judge.example/v1;key=SECRET",
    ],
)
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    """Wherever it comes from: the message names the override, the file, or neither."""
    wrong = f"evaluation.judge={{url: '{url}', workers: 0}}"
    for refused in (
        lambda: JudgeSettings(url, "m"),
        lambda: load_config(None, [f"evaluation.judge.url={url}"]),
        lambda: load_config(None, [wrong]),
        lambda: load_config(None, [], {"evaluation.judge.url": url}),
    ):
        with pytest.raises(ConfigError, match="it holds a password, a query, a fragment") as caught:
            refused()
        assert not re.search("SEC|RET", str(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1/v1", "http://[zz]/v1", "http://127.0.0.1:notaport/v1", "http://127.0.0.1:99999/v1", "http:///v1",
        "http://a b/v1", "http://h/v1\n", "http://h/\x7f", "http://b\u00fccher.example/v1", f"http://{'a' * 70}.com/v1", "", "local:",
        "ftp://judge.example/v1",
    ],
)  # fmt: skip
def test_a_malformed_url_is_one_line(url: str) -> None:
    with pytest.raises(ConfigError, match=r"allowed are http://HOST/v1, https://HOST/v1 and local:PATH") as caught:
        JudgeSettings(url, "m")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "url", ["http://[::1]:80/v1", "HTTP://My_Host:8000/v1/", "http://10.0.0.1/v1", "https://xn--bcher-kva.example/v1"]
)
def test_sound_urls_make_an_endpoint(url: str) -> None:
    Endpoint(JudgeSettings(url, "m"))


def test_what_a_local_model_ignores_is_refused() -> None:
    ignored: dict[str, Any] = {
        "api_key_env": "KEY", "temperature": 0.7, "seed": 1, "timeout": 3.0, "max_retries": 0, "workers": 1,
        "price_per_million": (1, 1),
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        JudgeSettings("local:judge", "m", **ignored)
    defaults = ("OPENAI_API_KEY", 0.0, "null", 60.0, 6, 8, "null")
    assert caught.value.problems == [
        f"evaluation.judge.{name} is {value!r}, which has no effect on a local model; remove it (the default is {default})"
        for (name, value), default in zip(ignored.items(), defaults, strict=True)
    ]
    JudgeSettings("local:judge", "m", api_key_env=None, temperature=None)


@pytest.mark.parametrize(
    ("rows", "mode", "problem"),
    [
        ([], "score", "judging: there is no row to judge"),
        (
            [row(1, "a", "b"), row(2, "a", None)],
            "pairwise",
            "pairwise judging compares with the base model's answers, which are missing (1 of 2 rows, first in line 2); "
            "evaluate with --baseline, or judge with mode score",
        ),
        (
            [row(1, "a", "b"), row(2, "a", None)],
            "score",
            "judging: 1 of 2 rows have no base answer; give all of them one, or none",
        ),
    ],
)
def test_rows_that_do_not_fit_the_mode_are_refused(
    longer: JudgeServer, tmp_path: Path, rows: list[JudgedRow], mode: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        judge(longer, rows, tmp_path, mode=mode)
    assert (str(caught.value), longer.requests) == (problem, [])


def test_the_example_of_the_docs_runs(longer: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example.replace("https://api.openai.com/v1", longer.url), found)  # noqa: S102
    assert found["result"].metrics["judge_win_rate"].rows == (1.0, 0.5)
    assert found["result"].details["cost"]["money"] == pytest.approx(2 * (100 * 0.4 + 10 * 1.6) / 1e6)
    table = re.findall(r"^\| `(\w+)` \| (.*?) \|", page.split("## Settings")[1], flags=re.MULTILINE)
    defaults = {field.name: field.default for field in dataclasses.fields(JudgeSettings)}
    assert list(dict(table)) == list(defaults)
    for name, shown in table[2:]:
        assert yaml.safe_load(shown.strip("`")) == defaults[name], name
