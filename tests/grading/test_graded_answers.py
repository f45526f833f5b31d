"""The grader says of each row of answers.toml what the row says."""

from __future__ import annotations

import sys
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from reflux.grading.character_table import same_characters
from reflux.grading.clean import bare
from reflux.grading.clock import same_time
from reflux.grading.final import final_answer
from reflux.grading.math import exact, grade
from reflux.grading.numbers import Number, equal_numbers, last_number, read_number
from reflux.grading.numerals import value_of
from reflux.grading.thinking import without_thinking
from reflux.grading.unit_names import unit_of
from reflux.grading.word_answers import choice_of

KINDS: list[dict[str, Any]] = tomllib.loads((Path(__file__).parent / "answers.toml").read_text())["kinds"]


def rows(key: str) -> list[list[Any]]:
    return [row for kind in KINDS for row in kind.get(key, [])]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind["name"])
def test_the_grader_agrees_with_the_table(kind: dict[str, Any]) -> None:
    expected = [(text, gold, 1.0) for text, gold in kind.get("right", [])]
    expected += [(text, gold, 0.0) for text, gold in kind.get("wrong", [])]
    assert [row for row in expected if grade(row[0], row[1]) != row[2]] == []


@pytest.mark.parametrize("row", rows("known"), ids=lambda row: row[0][:40])
def test_what_the_table_calls_known_is_still_judged_falsely(row: list[Any]) -> None:
    """If this fails, the grader has become better: move the row to `right` or `wrong`."""
    text, gold, is_right, why = row
    assert why
    assert grade(text, gold) == float(not is_right)


def test_the_table_is_large_names_its_sources_and_has_no_row_twice() -> None:
    right, wrong = rows("right"), rows("wrong")
    assert len(right) + len(wrong) >= 300
    assert len(wrong) >= (len(right) + len(wrong)) / 3
    assert all(
        kind["source"] and kind.keys() <= {"name", "source", "right", "wrong", "known"} for kind in KINDS
    )
    pairs = [tuple(row[:2]) for key in ("right", "wrong", "known") for row in rows(key)]
    assert sorted(pair for pair in set(pairs) if pairs.count(pair) > 1) == []


@pytest.mark.parametrize("answer", sorted({row[1] for row in rows("right")}))
def test_each_stored_answer_equals_itself(answer: str) -> None:
    assert grade(f"\\boxed{{{answer}}}", answer) == 1.0
    assert grade(f"<answer>{answer}</answer>", answer) == 1.0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a", "a"),
        ("a<think>b</think>c", "ac"),
        ("a</think>b", "b"),
        ("a</think>b<think>c</think>d", "bd"),
        ("<think>a<think>b</think>c", "c"),
        ("a<think>b</think>c</think>d", "d"),
        ("a<think>b", ""),
        ("", ""),
        ("2 < 3 and [1, 2]", "2 < 3 and [1, 2]"),
        ("<thinker>a", "<thinker>a"),
        ("analysis of 3 cases", "analysis of 3 cases"),
        ("a<|im_end|>", "a "),
    ],
)
def test_thinking_is_removed(text: str, shown: str) -> None:
    assert without_thinking(text) == shown


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("no marker", None),
        (r"\boxed{a} \boxed{}", "a"),
        (r"\boxed{a}, \boxed{b}", "a, b"),
        (r"\boxed{a} \boxed{b", ""),
        ("<answer>a", ""),
        ("<answer> a b </answer>", "a b"),
        ("Answer: a b. c", "a b"),
        ("Answer: 0.5. c", "0.5"),
        ("Answer: 0.333... c", "0.333... c"),
        ("Answer:\n- a\n- b\n", "a, b"),
        ("The answer is <<9*2=18>>18.", "18"),
    ],
)
def test_the_final_answer_is_found(text: str, found: str | None) -> None:
    assert final_answer(text) == found


@pytest.mark.parametrize(
    ("notation", "numeral", "value"),
    [
        ("recurring", "0.1(6)", "1/6"),
        ("recurring", "2.1212...", "70/33"),
        ("recurring", "0.12...", "0.12"),
        ("mixed", "2 3/4", "2.75"),
        ("power", "1.5e-2", "0.015"),
        ("power", r"2 \times 10^{3}", "2000"),
        ("power", "10^{2}", "100"),
        ("based", "z_36", "35"),
        ("prefixed", "0o17", "15"),
        ("indian", "1,00,000", "100000"),
        ("slash", "1/0", None),
        ("based", "9_2", None),
        ("decimal", "1" * 2000, None),
    ],
)
def test_numerals_have_the_value_of_their_notation(notation: str, numeral: str, value: str | None) -> None:
    assert value_of(notation, numeral) == (None if value is None else Fraction(value))


def number(text: str) -> Number:
    found = read_number(text)
    assert found is not None
    return found


def test_numbers_carry_their_percent_sign_unit_and_base() -> None:
    assert equal_numbers(number("50%"), number("50"))
    assert equal_numbers(number("50%"), number("0.5"))
    assert not equal_numbers(number("50%"), number("0.5%"))
    assert not equal_numbers(number("5 km"), number("5 m"))
    assert equal_numbers(number("5 km"), number("5"))
    assert (number("1011_2").base, number("0x1F").base, number("11").base) == (2, 16, None)
    assert [read_number(text) for text in ("12 or 13", "4x", "not 4", "4 or more", "", "x")] == [None] * 6


def test_the_last_number_is_not_one_of_several_that_are_offered() -> None:
    assert last_number("5 eggs, 12 or 13") is None
    assert last_number("between 12 and 13") is None
    assert last_number("it is not 13") is None
    assert last_number("30 + 160 or 190") == number("190")
    assert last_number("0.6 or 60%") is not None


def test_units_have_one_spelling() -> None:
    assert unit_of("kilometers per hour") == unit_of("km/h") == unit_of("kph") == "km / h"
    assert unit_of("square metres") == unit_of("m^2") == unit_of("sq. m") == "m^2"
    assert [unit_of(words) for words in ("", "apples", "km apples")] == [None] * 3


def test_forms_are_removed_and_characters_are_one() -> None:
    assert bare(r"**$12\,345 \text{ km}$**.") == "12 345 km"
    assert bare(r"\left( \$5 \right)") == "( $5 )"
    assert same_characters("\u2212\uff11\uff12 m\u00b2") == "-12 m^{2}"
    assert same_characters("1\u00bd") == "1 1/2"
    assert same_characters("abc") == "abc"


def test_choices_and_times_are_read() -> None:
    assert [choice_of(text) for text in ("B) Paris", "(b)", "A or B", "A dog", "B")] == [
        "B",
        "B",
        None,
        None,
        "B",
    ]
    assert same_time("12:15 AM", "0:15") is True
    assert same_time("12:15 PM", "12:15") is True
    assert same_time("12:15 PM", "0:15") is False
    assert same_time("x", "0:15") is None


def test_the_exact_grader_ignores_thinking_and_white_space() -> None:
    assert exact("<think>Rome</think>\nNew  York", "New York") == 1.0
    assert exact("<think>New York</think> Rome", "New York") == 0.0
    assert exact("<think>Rome</think> Answer: New York.", "New York") == 1.0
    assert exact("<think>New York", "New York") == 0.0
    assert exact("<think>", "<think>") == 1.0


@pytest.mark.parametrize(
    "unit", ["1", "1 ", "1,", "0.1", "(", "{", "\\boxed{", "\\text{", "Answer: ", "<think>"]
)
@pytest.mark.parametrize("form", ["%s", "Answer: %s", "\\boxed{%s}"])
def test_a_long_repeated_text_is_judged_in_time(
    unit: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would take longer than a test may if the time grew with the square of the length."""
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert grade(form % (unit * (200_000 // len(unit))), "18") == 0.0
