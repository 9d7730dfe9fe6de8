"""Pieces join to the decoded answer; stop strings never show, wherever the tokens cut them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tiny import make_tokenizer
from tunesmith.serving.answer_text import AnswerText

TOKENIZER = make_tokenizer(merges=[("a", "b"), ("Ġ", "a")])


def pieces_of(ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = AnswerText(TOKENIZER, stop)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            return pieces, True
    return [*pieces, text.finish()], text.stopped


PARTS = TOKENIZER.convert_tokens_to_ids(list("ĤâĺðŁĺĢéÃ"))
"""Bytes that are parts of characters of 2 to 4 bytes, some of them in their order."""


@given(st.lists(st.integers(0, 260) | st.sampled_from(PARTS), max_size=40))
def test_pieces_join_to_the_decoded_answer(ids: list[int]) -> None:
    pieces, _ = pieces_of(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text("abé☃", max_size=20), st.lists(st.text("abé☃", min_size=1, max_size=3), max_size=3))
def test_the_answer_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    ids: Any = TOKENIZER(text)["input_ids"]
    pieces, stopped = pieces_of(ids, tuple(stop))
    places = [text.find(one) for one in stop if one in text]
    assert stopped == bool(places)
    found = "".join(pieces)
    if not places:
        assert found == text
    else:
        assert text.startswith(found)
        assert not any(one in found for one in stop)
        assert any(text[len(found) :].startswith(one) for one in stop)


def test_a_character_is_shown_when_it_is_whole() -> None:
    pieces, _ = pieces_of(TOKENIZER("a☃b")["input_ids"])
    assert pieces == ["a", "", "", "☃", "b", ""]


def test_bytes_that_never_become_a_character_are_shown_as_they_come() -> None:
    # Held back for ever they would all be decoded again for every token.
    no_character, character = (
        TOKENIZER.convert_tokens_to_ids(["Ĥ"]),
        TOKENIZER("☃", add_special_tokens=False)["input_ids"],
    )
    ids = [*no_character * 20, *character, *no_character * 3]
    pieces, _ = pieces_of(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids) == "\ufffd" * 20 + "☃" + "\ufffd" * 3
    shown = [len("".join(pieces[: place + 1])) for place in range(20)]
    assert all(place + 1 - count <= 4 for place, count in enumerate(shown))


def test_what_may_begin_a_stop_string_is_held_back_no_longer_than_that() -> None:
    pieces, _ = pieces_of(TOKENIZER("x\nUx\nUser", add_special_tokens=False)["input_ids"], ("\nUser",))
    assert pieces == ["x", "", "", "\nUx", "", "", "", "", ""]
