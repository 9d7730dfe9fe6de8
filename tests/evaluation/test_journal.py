"""Answers survive an interruption, and only for the same weights and settings."""

from __future__ import annotations

from pathlib import Path

from tunesmith.evaluation.journal import Journal, key_of


def interrupted(path: Path, identity: dict[str, str], answers: dict[str, str]) -> None:
    journal = Journal(path, identity)
    journal.add(answers)
    journal.__exit__(KeyboardInterrupt, None, None)


def test_it_goes_on_after_an_interruption_and_goes_away_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "evaluations" / "journal.jsonl"
    interrupted(path, {"weights": "a"}, {"1": "one", "2": "zwei é\n"})
    with Journal(path, {"weights": "a"}) as journal:
        assert journal.known == {"1": "one", "2": "zwei é\n"}
        journal.add({"3": "three"})
    assert not path.exists()


def test_a_cut_line_is_dropped_and_what_follows_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "j" / "journal.jsonl"
    interrupted(path, {}, {"1": "one", "2": "two"})
    path.write_bytes(path.read_bytes()[:-4])
    interrupted(path, {}, {"3": "three"})
    with Journal(path, {}) as journal:
        assert journal.known == {"1": "one", "3": "three"}


def test_other_weights_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "j" / "journal.jsonl"
    interrupted(path, {"weights": "a"}, {"1": "one"})
    interrupted(path, {"weights": "b"}, {"2": "two"})
    with Journal(path, {"weights": "b"}) as journal:
        assert journal.known == {"2": "two"}


def test_what_a_crash_left_of_a_line_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "j" / "journal.jsonl"
    interrupted(path, {}, {"1": "one", "2": "two", "3": "three"})
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"\0" * 20 + b"\xff"
    path.write_bytes(b"\n".join(lines))
    with Journal(path, {}) as journal:
        assert journal.known == {"1": "one", "3": "three"}


def test_nothing_is_written_before_there_is_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "j" / "journal.jsonl"
    interrupted(path, {}, {})
    Journal(tmp_path / "other" / "journal.jsonl")
    assert not (tmp_path / "other").exists()


def test_keys_tell_who_was_asked_what_with_which_limit() -> None:
    assert len({key_of(*asked) for asked in (("tuned", [1, 2], 8), ("base", [1, 2], 8), ("tuned", [1, 2], 9))}) == 3
    assert key_of("tuned", [1, 2], 8) == key_of("tuned", [1, 2], 8)


def test_without_a_file_it_is_a_memory() -> None:
    with Journal() as journal:
        journal.add({"1": "one"})
        assert journal.known == {"1": "one"}
