"""Rubrics, verdicts and scores, from their definition."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.grading.thinking import after_thinking
from reflux.rewards.json_object import json_object
from reflux.rewards.judge_forms import parse_preference, parse_score
from reflux.rewards.rubric import Criterion, Rubric, RubricError, parse_rubric, parse_verdicts, weighted_score
from reflux.rewards.rubric_forms import final_scores

points_and_verdicts = st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=12)


# --- the score


@given(points_and_verdicts)
def test_the_score_is_the_weighted_share(pairs: list[tuple[int, bool]]) -> None:
    points, verdicts = [p for p, _ in pairs], [v for _, v in pairs]
    exact = Fraction(sum(p for p, v in pairs if v), sum(points))
    assert weighted_score(points, verdicts) == float(exact)
    assert weighted_score(points, [True] * len(pairs)) == 1.0
    assert weighted_score(points, [False] * len(pairs)) == 0.0
    assert weighted_score([7 * p for p in points], verdicts) == pytest.approx(float(exact), rel=1e-15)
    for place in range(len(pairs)):
        raised = [*verdicts[:place], True, *verdicts[place + 1 :]]
        assert weighted_score(points, raised) >= weighted_score(points, verdicts)


@pytest.mark.parametrize(
    ("points", "verdicts"), [([], []), ([1], []), ([1, 2], [True]), ([0], [True]), ([3, -1], [True, True])]
)
def test_what_gives_no_score_is_refused(points: list[int], verdicts: list[bool]) -> None:
    with pytest.raises(ValueError):
        weighted_score(points, verdicts)


# --- rubrics


def rows(count: int = 4, **changes: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"criterion_id": f"c{n}", "category": "x", "criterion": f"Is {n} met?", "points": 1 + n % 5}
        for n in range(1, count + 1)
    ]
    found[1] |= changes
    return found


def written(entries: list[dict[str, Any]] | None = None, **more: Any) -> str:
    entries = rows() if entries is None else entries
    return json.dumps({"schema_version": "ropd.rubric.v1", "maximum_score": 14, "rubrics": entries, **more})


def test_a_rubric_is_read_in_all_forms_that_models_write() -> None:
    expected = Rubric(tuple(Criterion(f"c{n}", "x", f"Is {n} met?", 1 + n % 5) for n in range(1, 5)))
    plain = written()
    without = json.dumps({"rubrics": rows()})
    for text in (
        plain,
        f"  {plain}\n",
        f"```json\n{plain}\n```",
        f"```\n{plain}\n```\n",
        f"<think>first {{</think>\n{plain}",
        f"hidden</think>```json\n{plain}\n```",
        without,
        written(maximum_score=3, note="extra"),
        written(rows(extra=[1])),
        plain.replace("Is 1 met?", "  Is 1 met? "),
    ):
        assert parse_rubric(text) == expected
    assert (expected.points, expected.maximum) == ([2, 3, 4, 5], 14)
    assert parse_rubric(expected.text) == expected
    assert json.loads(expected.text)["maximum_score"] == 14
    assert (len(expected.hash), expected.hash) == (12, parse_rubric(plain).hash)
    assert parse_rubric(written(rows(points=5))).hash != expected.hash
    assert len(parse_rubric(written(rows(12))).criteria) == 12


BAD_RUBRICS = {
    "empty": "",
    "no json": "Here is it",
    "text before": f"Sure! {written()}",
    "text after": f"{written()} Done.",
    "two fences": f"```json\n{written()}\n```\n```json\n{written()}\n```",
    "text and fence": f"Sure:\n```json\n{written()}\n```",
    "list": f"[{written()}]",
    "cut": written()[:-20],
    "version": written(schema_version="ropd.rubric.v2"),
    "version null": written(schema_version=None),
    "three": written(rows(3)),
    "thirteen": written(rows(13)),
    "no rubrics": json.dumps({"schema_version": "ropd.rubric.v1"}),
    "id without c": written(rows(criterion_id="2")),
    "id with a word": written(rows(criterion_id="c2x")),
    "id with a line break": written(rows(criterion_id="c2\n")),
    "id in other digits": written(rows(criterion_id="c\u0662")),
    "id repeated": written(rows(criterion_id="c1")),
    "id a number": written(rows(criterion_id=2)),
    "empty text": written(rows(criterion=" \n")),
    "text null": written(rows(criterion=None)),
    "zero": written(rows(points=0)),
    "six": written(rows(points=6)),
    "true": written(rows(points=True)),
    "half": written(rows(points=2.5)),
    "whole float": written(rows(points=2.0)),
    "text points": written(rows(points="3")),
    "nan": written(rows(points=math.nan)),
    "infinity": written(note=math.inf),
    "repeated key": written().replace('"points"', '"points": 1, "points"', 1),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD_RUBRICS.values(), ids=BAD_RUBRICS)
def test_anything_else_is_no_rubric(text: str) -> None:
    with pytest.raises(RubricError) as refused:
        parse_rubric(text)
    # The sentence goes to the model.
    assert str(refused.value).endswith((".", "?"))
    assert isinstance(refused.value, ValueError)


# --- verdicts


def verdicts(answers: Any, **more: Any) -> str:
    return json.dumps({"schema_version": "ropd.batch_verifier.v2", "answers": answers, **more})


def answer(index: Any, judgement: Any, **more: Any) -> dict[str, Any]:
    return {"answer_index": index, "judgement": judgement, "final_score": 99, **more}


def test_verdicts_come_in_the_order_of_the_answers() -> None:
    text = verdicts([answer(2, [False, True]), answer(1, [True, True], note=1)])
    assert parse_verdicts(text, 2, 2) == [[True, True], [False, True]]
    assert parse_verdicts(f"```json\n{text}\n```", 2, 2) == [[True, True], [False, True]]
    told = verdicts([answer(2, [False], final_score=0), answer(1, [True], final_score="many")])
    assert final_scores(told, 2, 1) == ["many", 0]
    assert final_scores(verdicts([{"answer_index": 1, "judgement": [True]}]), 1, 1) == [None]


GOOD = [answer(1, [True, False]), answer(2, [True, True])]
BAD_VERDICTS: dict[str, tuple[str, str]] = {
    "missing": (verdicts(GOOD[:1]), "2 is missing"),
    "too much": (verdicts([*GOOD, answer(3, [True, True])]), "3 is missing or too much"),
    "repeated": (verdicts([*GOOD, GOOD[0]]), "repeated"),
    "from zero": (verdicts([answer(0, [True, True]), answer(1, [True, True])]), "must be 1 to 2"),
    "few verdicts": (verdicts([GOOD[0], answer(2, [True])]), "answer 2 has 1 verdicts"),
    "many verdicts": (verdicts([answer(1, [True] * 3), GOOD[1]]), "answer 1 has 3 verdicts"),
    "one for true": (verdicts([GOOD[0], answer(2, [1, True])]), "answers.1.judgement.0"),
    "text for true": (verdicts([GOOD[0], answer(2, ["true", True])]), "answers.1.judgement.0"),
    "null": (verdicts([GOOD[0], answer(2, [None, True])]), "answers.1.judgement.0"),
    "index true": (verdicts([answer(True, [True, True]), GOOD[1]]), "answers.0.answer_index"),
    "version": (verdicts(GOOD, schema_version="ropd.batch_verifier.v1"), "schema_version"),
    "no json": ("yes, yes", "not one JSON object"),
}


@pytest.mark.parametrize(("text", "words"), BAD_VERDICTS.values(), ids=BAD_VERDICTS)
def test_anything_else_are_no_verdicts(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_verdicts(text, 2, 2)


# --- the judge's forms


def test_scores_and_preferences() -> None:
    assert [parse_score(json.dumps({"score": score})) for score in (0, 7, 10)] == [0.0, 0.7, 1.0]
    for bad in ("11", "-1", "7.5", '"7"', "true", "null"):
        with pytest.raises(ValueError):
            parse_score(f'{{"score": {bad}}}')
    with pytest.raises(ValueError):
        parse_score("7")
    assert parse_preference('{"better": "second", "reason": "r"}') == "second"
    for bad in ('{"better": "both"}', '{"better": 1}', "first", '{"schema_version": "x", "better": "first"}'):
        with pytest.raises(ValueError):
            parse_preference(bad)


# --- texts


def test_thinking_is_removed_unless_nothing_would_remain() -> None:
    assert after_thinking("<think>5?</think> Answer: 6") == "Answer: 6"
    assert after_thinking("5?</think>a</think>\n b") == "b"
    assert after_thinking("<think>5?</think>  ") == "<think>5?</think>  "
    assert after_thinking("<think>5?") == "<think>5?"
    assert after_thinking("no tags ") == "no tags "


def test_a_json_object_is_the_only_thing_that_is_read() -> None:
    assert json_object('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    bad_objects = ("{} {}", "{'a': 1}", '{"a": NaN}', '{"a": 1, "a": 1}', '{"a": -Infinity}')
    for bad in ("null", "3", '"x"', "[]", *bad_objects):
        with pytest.raises(ValueError):
            json_object(bad)
