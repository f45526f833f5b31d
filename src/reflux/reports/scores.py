"""An accuracy with its interval, and the three accuracies of a run: before, after, and the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

from reflux.reports.asked import SPLITS, split_of
from reflux.reports.reading import Row, number, whole
from reflux.reports.units import count, interval, percent


@dataclass(frozen=True)
class SearchScore:
    """The share of problems solved, in [0, 1], with its 95 % interval, the number of problems and their
    split.
    """

    accuracy: float
    low: float | None = None
    high: float | None = None
    problems: int | None = None
    split: str | None = None

    @property
    def cells(self) -> tuple[str, str, str]:
        problems = (
            count(self.problems) if self.split is None else f"{count(self.problems)} {SPLITS[self.split]}"
        )
        return percent(self.accuracy), interval(self.low, self.high), problems


def score(value: object) -> SearchScore | None:
    """The accuracy in the result of an evaluation, with its interval, number of problems and split. None if
    the result has no accuracy.
    """
    if not isinstance(value, dict):
        return None
    accuracy = number(value.get("accuracy"))
    if accuracy is None:
        return None
    split = split_of(value.get("split"))
    return SearchScore(
        accuracy, number(value.get("low")), number(value.get("high")), whole(value.get("problems")), split
    )


def before_after_teacher(summary: Row) -> list[tuple[str, SearchScore | None]]:
    """(name, score) of student before, student after and teacher, from summary.json."""
    return [
        ("student before", score(summary.get("accuracy_before"))),
        ("student after", score(summary.get("accuracy_after"))),
        ("teacher", score(summary.get("teacher_accuracy"))),
    ]
