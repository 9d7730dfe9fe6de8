"""Checks over rows that read well: what each finds, on which line, and in which words."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tunesmith.config import DataConfig
from tunesmith.data.checks import (
    CONTROL_TOKENS,
    check_rows,
    labels_of,
    repeated_across,
)
from tunesmith.data.fingerprints import fingerprint, normalized, supervised_turns
from tunesmith.data.formats import DataFile, inspect_file
from tunesmith.types import Example, Finding, Message, PreferenceExample, ToolCall


def ask(question: str, answer: str, line: int = 1, **fields: Any) -> Example:
    messages = (Message("user", question), Message("assistant", answer))
    return Example(messages, None, fields.pop("file", "train.jsonl"), line, **fields)


def pair(prompt: str, chosen: str, rejected: str, line: int = 1) -> PreferenceExample:
    turns = [(Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),)]
    return PreferenceExample(*turns, "train.jsonl", line)


def asked(*pairs: tuple[str, str]) -> list[Example]:
    return [ask(question, answer, line) for line, (question, answer) in enumerate(pairs, 1)]


def file_of(rows: Sequence[Any], path: str = "train.jsonl", **fields: Any) -> DataFile:
    return DataFile(path, "JSON Lines", "prompt", list(rows), len(rows), [], **fields)


def found(
    rows: Sequence[Any], check: str, held_out: Sequence[Any] | None = None, tokenized: bool = False, **settings: Any
) -> list[Finding]:
    """The findings of one check."""
    held = file_of(held_out, "test.jsonl") if held_out is not None else None
    findings = check_rows(file_of(rows), DataConfig(path="train.jsonl", **settings), held, tokenized)
    return [finding for finding in findings if finding.check == check]


def lines(findings: Sequence[Finding]) -> list[int | None]:
    return [finding.line for finding in findings]


# duplicates


def test_exact_duplicates_are_warned_of_with_their_count_and_the_first_line() -> None:
    rows = asked(("a?", "one"), ("b?", "two"), ("a?", "one"), ("a?", "one"))
    findings = found(rows, "duplicate_row")
    assert [str(finding) for finding in findings] == [
        "train.jsonl:3: the same as line 1 (2 of 4 rows repeat an earlier one); "
        "remove the repetitions, or keep them if these rows are to count more",
        "train.jsonl:4: the same as line 1 (2 of 4 rows repeat an earlier one); "
        "remove the repetitions, or keep them if these rows are to count more",
    ]
    assert {finding.severity for finding in findings} == {"warning"}
    assert not found(rows, "near_duplicate_row")
    assert not found(rows, "conflicting_answers")


@pytest.mark.parametrize(
    "other",
    ["WHERE is it?", " where \t is\n it? ", "Where is it?\u3000"],
    ids=["case", "white space", "ideographic space"],
)
def test_near_duplicates(other: str) -> None:
    findings = found(asked(("Where is it?", "Here."), (other, "here.")), "near_duplicate_row")
    assert lines(findings) == [2]
    assert "the same as line 1 but for case, white space or Unicode composition" in findings[0].message


def test_near_duplicates_by_unicode_composition() -> None:
    composed, decomposed = "한국 café", unicodedata.normalize("NFD", "한국 café")
    assert composed != decomposed
    assert lines(found(asked((composed, "yes"), (decomposed, "yes")), "near_duplicate_row")) == [2]


def test_other_words_other_roles_and_other_borders_are_no_duplicates() -> None:
    rows = [
        *asked(("a b", "c"), ("a", "b c"), ("a b", "d"), ("ab", "c")),
        Example((Message("system", "a b"), Message("assistant", "c")), None, "train.jsonl", 5),
        Example((Message("user", "a b"), Message("assistant", "c", train=None)), None, "train.jsonl", 6, label="x"),
        Example(None, "a b c", "train.jsonl", 7),
    ]
    assert not found(rows, "duplicate_row")
    assert not found(rows, "near_duplicate_row")


def test_tool_calls_reasoning_and_tools_are_part_of_a_row() -> None:
    def row(line: int, place: str = "Seoul", thought: str | None = None, tool: str = "weather") -> Example:
        call = ToolCall("weather", {"place": place})
        answer = Message("assistant", "", reasoning=thought, tool_calls=(call,))
        return Example((Message("user", "Rain?"), answer), None, "train.jsonl", line, tools=({"name": tool},))

    rows = [row(1), row(2, place="Busan"), row(3, thought="hm"), row(4, tool="forecast"), row(5)]
    assert lines(found(rows, "duplicate_row")) == [5]
    assert not found(rows, "near_duplicate_row")


def test_the_malformed_file_of_duplicates(shared_data: Path) -> None:
    path = shared_data / "malformed" / "s15_duplicated_rows.jsonl"
    findings = check_rows(inspect_file(path), DataConfig(path=str(path)))
    assert [(finding.check, finding.line, finding.severity) for finding in findings] == [
        *(("duplicate_row", line, "warning") for line in range(17, 22)),
        ("near_duplicate_row", 22, "warning"),
    ]
    assert all("5 of 22 rows" in finding.message for finding in findings[:5])


def test_real_files_duplicates_counted_by_their_text(shared_data: Path) -> None:
    path = shared_data / "banking77" / "train.jsonl"
    data = inspect_file(path)
    findings = check_rows(data, DataConfig(path=str(path)))
    texts = Counter((row.messages[0].content, row.label) for row in data.examples if isinstance(row, Example))
    repeated = sum(count - 1 for count in texts.values())
    assert repeated == 4
    assert len([finding for finding in findings if finding.check == "duplicate_row"]) == repeated


# answers that contradict each other


def test_the_same_prompt_with_another_answer() -> None:
    rows = asked(("a?", "one"), ("A? ", "two"), ("b?", "two"), ("a?", "two"))
    findings = found(rows, "conflicting_answers")
    # Line 4 repeats line 2 but for case: it is a near-duplicate, not one more contradiction.
    assert [str(finding) for finding in findings] == [
        "train.jsonl:2: the prompt of line 1 with another answer: 'one' there, 'two' here (1 of 4 rows are such); "
        "keep the right one, unless several answers are meant"
    ]
    assert lines(found(rows, "near_duplicate_row")) == [4]


def test_long_contradicting_answers_are_not_quoted() -> None:
    (finding,) = found(asked(("a?", "one " * 50), ("a?", "two " * 50)), "conflicting_answers")
    assert finding.found == "the prompt of line 1 with another answer (1 of 2 rows are such)"


def test_the_whole_conversation_before_the_last_answer_is_the_prompt() -> None:
    def row(line: int, *texts: str) -> Example:
        roles = ("user", "assistant", "user", "assistant")
        return Example(tuple(map(Message, roles, texts)), None, "train.jsonl", line)

    rows = [
        row(1, "hi", "hello", "who?", "me"),
        row(2, "hi", "hey", "who?", "you"),
        row(3, "hi", "hello", "who?", "you"),
    ]
    assert lines(found(rows, "conflicting_answers")) == [3]


def test_kto_rows_contradict_each_other_when_one_answer_is_good_and_bad() -> None:
    rows = [
        ask("a?", "one", 1, desirable=True),
        ask("a?", "two", 2, desirable=False),
        ask("a?", "one", 3, desirable=False),
    ]
    assert lines(found(rows, "conflicting_answers")) == [3]
    assert not found(rows, "duplicate_row")


def test_preference_pairs_contradict_each_other_when_turned_around() -> None:
    rows = [pair("a?", "one", "two", 1), pair("a?", "one", "three", 2), pair("a?", "two", "one", 3)]
    assert lines(found(rows, "conflicting_answers")) == [3]


# leaks


def test_held_out_rows_and_prompts_that_were_trained_on() -> None:
    rows = asked(("a?", "one"), ("b?", "two"), ("c?", "three"))
    held = [
        ask(q, a, line, file="test.jsonl")
        for line, (q, a) in enumerate([("A?", "one"), ("b?", "four"), ("d?", "x")], 1)
    ]
    (leaked,) = found(rows, "leaked_row", held)
    (prompt,) = found(rows, "leaked_prompt", held)
    fix = "remove it from one of the two files, or its score says nothing about unseen data"
    assert str(leaked) == (
        f"test.jsonl:1: this held-out row is also a training row, train.jsonl:1 (1 of 3 rows are such); {fix}"
    )
    assert str(prompt) == (
        "test.jsonl:2: this held-out prompt is also a training prompt, train.jsonl:2, with another answer "
        f"(1 of 3 rows are such); {fix}"
    )


def test_another_system_message_makes_no_prompt_unseen() -> None:
    def under(system: str, question: str, answer: str, file: str = "train.jsonl") -> Example:
        turns = (Message("system", system), Message("user", question), Message("assistant", answer))
        return Example(turns, None, file, 1)

    rows = [under("Be brief.", "a?", "one")]
    assert found(rows, "leaked_row", [under("Be long.", "a?", "one", "test.jsonl")])
    assert found(rows, "leaked_prompt", [under("Be long.", "a?", "two", "test.jsonl")])
    assert not found([*rows, under("Be long.", "a?", "two")], "conflicting_answers")  # each right under its own
    lonely = Example((Message("system", "Be brief."), Message("assistant", "ok")), None, "train.jsonl", 1)
    assert fingerprint(lonely).exchanges[0].prompt is None


def test_plain_text_leaks_too() -> None:
    rows = [Example(None, "Once upon a time", "train.jsonl", 7)]
    held = [Example(None, "once upon  a time", "test.jsonl", 1), Example(None, "Twice", "test.jsonl", 2)]
    assert [(f.line, "train.jsonl:7" in f.message) for f in found(rows, "leaked_row", held)] == [(1, True)]
    assert not found(rows, "leaked_prompt", held)


def test_leaks_between_real_files(shared_data: Path) -> None:
    train = inspect_file(shared_data / "banking77" / "ten_class_train_chat.jsonl")
    held = inspect_file(shared_data / "banking77" / "ten_class_test_chat.jsonl")
    whole = inspect_file(shared_data / "banking77" / "train.jsonl")
    settings = DataConfig(path="train")
    leaks = [f for f in check_rows(train, settings, held) if f.check.startswith("leaked")]
    assert [(f.check, f.line) for f in leaks] == [("leaked_row", 310)]
    assert f"{train.path}:1000" in leaks[0].message
    # The chat file's questions come from this one; that they stand under a system message there makes them no new ones.
    leaks = [f for f in check_rows(whole, settings, train) if f.check.startswith("leaked")]
    assert (len(leaks), {f.check for f in leaks}) == (1342, {"leaked_row"})


# conversations that begin alike


def talk(*texts: str, line: int = 1, file: str = "train.jsonl", train: Sequence[bool | None] = ()) -> Example:
    """A conversation of user and assistant in turn; `train` are the assistant's flags."""
    flags = dict(zip(range(1, len(texts), 2), train, strict=False))
    turns = (Message(("user", "assistant")[i % 2], text, train=flags.get(i)) for i, text in enumerate(texts))
    return Example(tuple(turns), None, file, line)


def leaks(rows: Sequence[Any], held: Sequence[Any], **settings: Any) -> list[tuple[str, str]]:
    findings = check_rows(file_of(rows), DataConfig(path="x", **settings), file_of(held, "test.jsonl"))
    return [(f.check, f.found.split(" (")[0]) for f in findings if f.check.startswith("leaked")]


LONG = ("a?", "one", "b?", "two")


@pytest.mark.parametrize(
    ("trained", "held", "expected"),
    [
        (LONG, LONG[:2], ("leaked_row", "this held-out row is how a training row begins, train.jsonl:7")),
        (LONG[:2], LONG, ("leaked_row", "turn 2 of this held-out row is also an answer in training, train.jsonl:7")),
        (LONG, (*LONG[:2], "c?", "x"), ("leaked_row", "turn 2 of this held-out row is also an answer in training, train.jsonl:7")),
        (LONG, ("A? ", "ONE", "b?", "two"), ("leaked_row", "this held-out row is also a training row, train.jsonl:7")),
        (LONG, ("a?", "other"), ("leaked_prompt", "this held-out prompt is also a training prompt, train.jsonl:7, with another answer")),
        (("a?", "other"), LONG, ("leaked_prompt", "the prompt of turn 2 of this held-out row is also a training prompt, train.jsonl:7, with another answer")),
        (LONG, (*LONG[:3], "other"), ("leaked_row", "turn 2 of this held-out row is also an answer in training, train.jsonl:7")),
        (LONG, ("b?", "two"), None),  # asked with nothing before it, it is another question
    ],
)  # fmt: skip
def test_conversations_that_begin_alike_leak(
    trained: Sequence[str], held: Sequence[str], expected: tuple[str, str] | None
) -> None:
    found_ = leaks([talk(*trained, line=7)], [talk(*held, file="test.jsonl")])
    assert found_ == ([expected] if expected else [])


def test_answers_that_are_not_trained_on_leak_nothing() -> None:
    shots = [talk("shot?", "yes", f"q{i}?", f"a{i}", train=(False, None)) for i in range(4)]
    assert leaks(shots[:2], shots[2:]) == []
    plain = [talk("shot?", "yes", f"q{i}?", f"a{i}") for i in range(4)]
    assert {check for check, _ in leaks(plain[:2], plain[2:])} == {"leaked_row"}
    assert leaks(plain[:2], plain[2:], train_on="last") == []


def test_a_greeting_before_any_question_is_no_leak() -> None:
    def greeted(question: str, answer: str, file: str) -> Example:
        return Example((Message("assistant", "Hello!"), *ask(question, answer).messages), None, file, 1)  # type: ignore[misc]

    assert leaks([greeted("a?", "one", "x")], [greeted("b?", "two", "test.jsonl")]) == []
    assert leaks([greeted("a?", "one", "x")], [greeted("a?", "one", "test.jsonl")])[0][0] == "leaked_row"


def test_rows_that_differ_in_what_is_trained_are_no_duplicates() -> None:
    rows = [talk(*LONG, line=1), talk(*LONG, line=2, train=(False, None)), talk(*LONG, line=3, train=(True, True))]
    assert lines(found(rows, "duplicate_row")) == [3]
    assert not found(rows, "near_duplicate_row")
    assert lines(found(rows, "duplicate_row", train_on="last")) == [2]


def test_rows_of_an_earlier_file_of_a_mix_are_repetitions() -> None:
    one = file_of([ask("a?", "1", 4, file="a.jsonl"), ask("b?", "2", 5, file="a.jsonl")], "a.jsonl")
    two = file_of(
        [ask("c?", "3", 1, file="b.jsonl"), ask("b?", "2", 2, file="b.jsonl"), ask("A?", "1", 3, file="b.jsonl")],
        "b.jsonl",
    )
    findings = repeated_across([one, two], "assistant")
    fix = "remove it from one of the two files, or keep it if it is to count more"
    assert [str(finding) for finding in findings] == [
        f"b.jsonl:2: the same as a.jsonl:5 (1 of 3 rows repeat one of another source); {fix}",
        f"b.jsonl:3: the same as a.jsonl:4 but for case, white space or Unicode composition (1 of 3 rows are such); {fix}",
    ]
    assert [finding.check for finding in findings] == ["duplicate_row", "near_duplicate_row"]
    assert not repeated_across([one], "assistant")


# labels


def test_rare_labels_are_named_with_their_counts() -> None:
    counts = {"often": 60, "some": 6, "rare": 3, "once": 1}
    rows = [
        ask(f"{label} {i}", "x", i, label=label) for label, count in counts.items() for i in range(count)
    ]  # the answer plays no part: rows have labels
    (finding,) = found(rows, "label_imbalance")
    assert finding.line is None
    assert finding.message == (
        "2 of 4 labels have fewer than 5 rows (`once` 1, `rare` 3); the most frequent label, `often`, has 60 rows, "
        "60 times those of the rarest, `once`, with 1; collect more of the rare ones, or judge the model label by label"
    )


@pytest.mark.parametrize(("most", "least", "warned"), [(50, 5, False), (51, 5, True), (8, 4, True), (5, 5, False)])
def test_from_when_on_labels_are_imbalanced(most: int, least: int, warned: bool) -> None:
    rows = [ask(f"{i}", label, i) for label, count in (("yes", most), ("no", least)) for i in range(count)]
    assert bool(found(rows, "label_imbalance")) is warned


def test_labels_are_read_from_short_repeated_answers_only() -> None:
    classes = [ask(f"{i}", "abc"[i % 3], i) for i in range(30)]
    assert labels_of(classes) == [*"abc"] * 10
    assert set(labels_of([ask(f"{i}", f"answer {i}", i) for i in range(30)])) == {None}  # not repeated
    assert set(labels_of([ask(f"{i}", "abc"[i % 3] * 65, i) for i in range(30)])) == {None}  # not short
    assert set(labels_of([*classes, ask("x", "one\ntwo", 31)])) == {None}
    assert labels_of([ask("x", "y", desirable=True), ask("x", "z", desirable=False)]) == ["desirable", "undesirable"]
    assert labels_of([pair("a", "b", "c")]) == [None]


def test_labels_of_real_files(shared_data: Path) -> None:
    def labels(name: str) -> Counter[str | None]:
        return Counter(labels_of(inspect_file(shared_data / name).examples))

    assert labels("banking77/ten_class_train_chat.jsonl")["card_arrival"] == 153
    assert len(labels("banking77/train_10shot_chat.jsonl")) == 77
    for name in ("gsm8k/train.jsonl", "chat/fastchat_identity_sharegpt.jsonl", "knowledge/svamp.jsonl"):
        assert set(labels(name)) == {None}, name


def test_imbalance_of_a_real_file(shared_data: Path) -> None:
    path = shared_data / "banking77" / "train_longtail.jsonl"
    findings = check_rows(inspect_file(path), DataConfig(path=str(path)))
    (finding,) = [finding for finding in findings if finding.check == "label_imbalance"]
    assert finding.found.startswith("22 of 77 labels have fewer than 5 rows (`atm_support` 2, ")
    assert "`transfer_not_received_by_recipient`, has 100 rows, 50 times" in finding.found


# columns


def test_columns_that_nothing_reads_but_not_the_usual_ids() -> None:
    data = file_of(asked(("a", "b")) * 4, ignored={"id": 4, "Source": 4, "rating": 3})
    (finding,) = [f for f in check_rows(data, DataConfig(path="x")) if f.check == "ignored_column"]
    assert finding.field == "rating"
    assert finding.message == (
        "nothing reads the column `rating` (3 of 4 rows have it); "
        "name what it holds in data.columns if it matters, else ignore this"
    )


def test_columns_of_rows_that_were_not_read_are_no_news() -> None:
    mismatch = Finding("form_mismatch", "error", "train.jsonl", 2, "another form")
    for rows, findings in (([], []), (asked(("a", "b")), [mismatch])):
        data = DataFile("train.jsonl", "JSON Lines", "prompt", rows, 2, findings, {"rating": 2})
        assert not [f for f in check_rows(data, DataConfig(path="x")) if f.check == "ignored_column"]


# lengths


@pytest.mark.parametrize(
    ("overlong", "fate"),
    [
        ("auto", "training refuses it; raise that, shorten the row, or set data.overlong to truncate, drop or split"),
        ("error", "training refuses it; raise that, shorten the row, or set data.overlong to truncate, drop or split"),
        ("truncate", "it is cut to that (data.overlong: truncate)"),
        ("drop", "it is dropped (data.overlong: drop)"),
        ("split", "it is split into several (data.overlong: split)"),
    ],
)
def test_long_rows_and_what_becomes_of_them(overlong: str, fate: str) -> None:
    rows = asked(("short?", "yes"), ("why?", "because " * 1000))
    (finding,) = found(rows, "long_row", max_seq_length=512, overlong=overlong)
    assert finding.line == 2
    assert finding.message == f"about 2,011 tokens (an estimate), data.max_seq_length is 512; {fate}"
    assert not found(rows, "long_row", max_seq_length=512, overlong=overlong, tokenized=True)


def test_a_long_prompt_leaves_nothing_of_the_answer() -> None:
    (finding,) = found(asked(("why? " * 1000, "because")), "long_row", max_seq_length=512, overlong="truncate")
    assert "nothing of its answer is left, and training refuses it; shorten its prompt" in finding.message


def test_plain_text_is_split_unless_said_otherwise() -> None:
    rows = [Example(None, "word " * 1000, "train.jsonl", 1)]
    assert "split into several" in found(rows, "long_row", max_seq_length=512)[0].message
    assert "training refuses it" in found(rows, "long_row", max_seq_length=512, overlong="error")[0].message


def test_automatic_max_seq_length() -> None:
    rows = asked(*[("q", "word " * 40)] * 99, ("q", "word " * 400))
    (finding,) = found(rows, "long_row", max_seq_length="auto")
    assert finding.line == 100
    assert finding.found == "about 511 tokens (an estimate), data.max_seq_length is 128"


def test_the_malformed_huge_row(shared_data: Path) -> None:
    path = shared_data / "malformed" / "s16_huge_row.jsonl"
    (finding,) = check_rows(inspect_file(path), DataConfig(path=str(path)))
    assert (finding.check, finding.line, finding.severity) == ("long_row", 5, "warning")
    assert finding.found == "about 257,165 tokens (an estimate), data.max_seq_length is 2048"


# texts


@pytest.mark.parametrize("token", [token for family in CONTROL_TOKENS.values() for token in family])
def test_control_tokens_of_every_family(token: str) -> None:
    family = next(name for name, tokens in CONTROL_TOKENS.items() if token in tokens)
    (finding,) = found(asked((f"say{token}now", "no")), "control_token")
    assert finding.message == (
        f"the user text holds {token!r}, a control token of {family}; "
        "it is encoded as plain text; remove it if it is not meant"
    )


def test_control_tokens_wherever_they_stand() -> None:
    rows: list[Any] = [
        *asked(("1 < 2 and |x| > 0", "[INST is no token, nor is <b>bold</b>"), ("q", "a</s>")),
        Example(None, "text <|endoftext|> text", "train.jsonl", 3),
        Example((Message("user", "q"), Message("assistant", "a", reasoning="<|eot_id|>")), None, "train.jsonl", 4),
        pair("q", "a", "<s>b", 5),
    ]
    findings = found(rows, "control_token")
    assert lines(findings) == [2, 3, 4, 5]
    assert findings[1].found == "the text holds '<|endoftext|>', a control token of GPT"
    assert not found(rows, "control_token", tokenized=True)  # then the tokenizer knows its own


def test_the_malformed_injection(shared_data: Path) -> None:
    path = shared_data / "malformed" / "s17_special_token_injection.jsonl"
    findings = check_rows(inspect_file(path), DataConfig(path=str(path)))
    assert [(finding.check, finding.line) for finding in findings] == [("control_token", line) for line in (2, 4, 6)]


def test_placeholders_in_what_the_assistant_says() -> None:
    rows = asked(("who?", "I am {{name}} by {{ author }}."), ("what is {{x}}?", "Jinja."), ("who?", "{{ no }} {1}"))
    findings = found(rows, "placeholder")
    assert lines(findings) == [1, 3]
    assert findings[0].message == (
        "the assistant text holds '{{ author }}', '{{name}}': a placeholder that nothing fills in; "
        "replace it, e.g. with the assistant's name"
    )


def test_placeholders_of_a_real_file(shared_data: Path) -> None:
    path = shared_data / "llamafactory" / "identity.jsonl"
    findings = check_rows(inspect_file(path), DataConfig(path=str(path)))
    rows = path.read_text(encoding="utf-8").splitlines()
    expected = [line for line, row in enumerate(rows, 1) if "{{" in row]
    assert lines([finding for finding in findings if finding.check == "placeholder"]) == expected
    assert len(expected) == 85


def test_answers_without_text() -> None:
    rows = asked(("a?", " ...!? "), ("b?", "🙂"), ("c?", "네"), ("d?", "7"), ("e?", "_"), ("...", "yes"))
    findings = found(rows, "answer_without_text")
    assert lines(findings) == [1, 2, 5]
    assert findings[0].message == "the answer '...!?' has no letter or digit; write the answer, or remove the row"


def test_only_supervised_answers_need_text() -> None:
    messages = (Message("user", "a?"), Message("assistant", "..."), Message("user", "b?"), Message("assistant", "yes"))
    call = (Message("user", "a?"), Message("assistant", "", tool_calls=(ToolCall("look", {}),)))
    rows = [Example(messages, None, "train.jsonl", 1), Example(call, None, "train.jsonl", 2)]
    assert lines(found(rows, "answer_without_text")) == [1]
    assert not found(rows, "answer_without_text", train_on="last")


# supervision


def test_rows_of_which_nothing_is_trained_on_are_errors() -> None:
    messages = (Message("user", "a?"), Message("assistant", "b", train=False))
    rows = [Example(messages, None, "train.jsonl", 3), ask("a?", "b", 4)]
    (finding,) = found(rows, "nothing_supervised")
    assert (finding.line, finding.severity) == (3, "error")
    assert finding.message == (
        "no turn of this row is trained on; there is nothing to learn from it; "
        "set `train` or `weight` of an assistant's turn, or remove the row"
    )
    assert not found(rows, "nothing_supervised", tokenized=True)  # tokenizing says it


def test_which_turns_are_supervised() -> None:
    def turns(*trains: bool | None) -> list[Message]:
        return [Message(("user", "assistant")[i % 2], "x", train=train) for i, train in enumerate(trains)]

    plain = turns(None, None, None, None)
    assert supervised_turns(plain, "assistant") == [False, True, False, True]
    assert supervised_turns(plain, "last") == [False, False, False, True]
    assert supervised_turns(plain, "all") == [True] * 4
    chosen = turns(None, True, None, False)
    assert supervised_turns(chosen, "assistant") == [False, True, False, False]
    assert supervised_turns(chosen, "last") == [False, True, False, False]
    assert supervised_turns(chosen, "all") == [False, True, False, False]


# the rest


def test_a_good_file_has_no_findings(shared_data: Path) -> None:
    for name in ("gsm8k/train.jsonl", "preference/hrc_ko_dpo.jsonl", "knowledge/openbookqa.jsonl"):
        path = shared_data / name
        assert check_rows(inspect_file(path), DataConfig(path=str(path))) == [], name


def test_normalized() -> None:
    assert normalized("  Straße\n\tA  B ") == "strasse a b"
    assert normalized(unicodedata.normalize("NFD", "한글")) == "한글"


def test_fingerprints_of_plain_text_have_no_prompt() -> None:
    print_ = fingerprint(Example(None, "Some text", "x", 1))
    assert ([exchange.prompt for exchange in print_.exchanges], print_.question) == ([None], None)
    assert print_.near == fingerprint(Example(None, "some  TEXT", "y", 2)).near
    assert print_.exact != fingerprint(Example(None, "some  TEXT", "y", 2)).exact
