"""The chart of margins and release points: its numbers are those on disk, and damage costs a line, not the
page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reflux.reports.diagnostics import own_charts
from reflux.reports.reading import rows
from reflux.reports.recorded import Recorded
from reflux.reports.release_charts import read_judged, release_chart
from synthetic_run import write_lines


def line(margins: list[Any], kept: int, *, rule: str = "release", **more: Any) -> dict[str, Any]:
    detail = {
        rule: {"starts": [4 * i for i in range(len(margins))], "margins": margins, "kept": kept, "gain": 1.0}
    }
    return {"kind": "learned", "step": 3, "prompt": "train-1", "sample": 0, "detail": detail, **more}


def test_the_chart_holds_the_means_and_the_shares(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    write_lines(path, [line([4.0, 2.0, 0.0], 2), line([2.0, 1.0, 1.0, 0.5], 4), line([3.0, 0.0], 1)])
    chart = release_chart("release", rows(path, []))
    assert chart.rows == [
        ("1", "3.000", "3", "33.3%"),
        ("2", "1.000", "3", "33.3%"),
        ("3", "0.500", "2", "0.0%"),
        ("4", "0.500", "1", "0.0%"),
    ]
    assert "mean over the last 3 attempts; 67% of them are released" in chart.caption
    traces = chart.spec["data"]
    diamonds = [
        (trace["x"], trace["y"]) for trace in traces if trace.get("marker", {}).get("symbol") == "diamond"
    ]
    # the last segment that is kept, at its margin
    assert sorted(diamonds) == [([1], [3.0]), ([2], [2.0])]
    assert (traces[-1]["name"], traces[-1]["y"]) == ("mean margin", [3.0, 1.0, 0.5, 0.5])


def test_a_rule_of_another_name_is_found_by_its_kind(tmp_path: Path) -> None:
    write_lines(tmp_path / "attempts.jsonl", [line([1.0, 0.5], 2, rule="fade")])
    rules = {"prefix": {"length": 3}, "fade": {"kind": "release"}}
    (chart,) = own_charts({"credit": rules}, Recorded(tmp_path), [])
    assert chart.rows[0] == ("1", "1.000", "1", "0.0%")
    assert own_charts({"credit": {"prefix": {"kind": "prefix", "length": 3}}}, Recorded(tmp_path), []) == []
    assert own_charts({}, Recorded(tmp_path), []) == []


def test_nothing_learned_yet_is_said(tmp_path: Path) -> None:
    chart = release_chart("release", rows(tmp_path / "attempts.jsonl", []))
    assert chart.figure is None
    assert "the student has not been trained yet" in chart.absent


@pytest.mark.parametrize(
    "broken",
    [
        line([1.0, None], 1),
        line([], 0),
        line(["x"], 1),
        line([1.0], 1, kind="attempt"),
        {"detail": {"release": 3}},
    ],
)
def test_what_is_damaged_is_left_out(tmp_path: Path, broken: dict[str, Any]) -> None:
    path = tmp_path / "attempts.jsonl"
    write_lines(path, [broken, line([1.0, 0.0], 1)])
    assert [judged.margins for judged in read_judged(rows(path, []), "release")] == [(1.0, 0.0)]


def test_only_the_last_attempts_are_kept_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    write_lines(path, [line([float(i)], 1) for i in range(2500)])
    judged = read_judged(rows(path, []), "release")
    assert [judged[0].margins, judged[-1].margins, len(judged)] == [(500.0,), (2499.0,), 2000]


def test_a_hostile_name_is_no_markup(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    write_lines(path, [line([3.0, 0.0], 1, prompt="<b>x</b>")])
    chart = release_chart("release", rows(path, []))
    assert "<b>" not in str(chart.spec)
