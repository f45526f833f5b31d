"""The first section of the page: the settings of the run, its state, and its result in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from reflux.reports.alarms import ShownAlarm, shown_alarms
from reflux.reports.evals import EvalPoint, main_name
from reflux.reports.formatting import visible
from reflux.reports.metrics import Metrics
from reflux.reports.reading import Row, items, table, whole
from reflux.reports.scores import SearchScore, before_after_teacher
from reflux.reports.units import count, duration, percent


@dataclass(frozen=True)
class Overview:
    """The content of the first section of the report."""

    # the name of the recipe
    recipe: str
    # a sentence that names the last finished step; empty for a finished run
    state: str
    # the accuracy before and after training
    sentence: str
    # (name, value) of the settings of the run
    facts: list[tuple[str, str]]
    # (name, accuracy) of student before, student after and teacher
    scores: list[tuple[str, SearchScore | None]]
    # the alarms that held at some step
    alarms: list[ShownAlarm]


def overview(
    config: Row, summary: Row | None, metrics: Metrics, moments: list[EvalPoint], name: str
) -> Overview:
    """The first section of the report, from the files of a run. moments: its evaluations by step. name: of
    the run directory, which is shown if the recipe has no name.
    """
    planned, done = whole(config.get("steps")), metrics.steps_done
    finished = summary or {}
    scores = before_after_teacher(finished) if summary is not None else _so_far(moments)
    return Overview(
        recipe=visible(str(finished.get("recipe") or config.get("recipe") or name)),
        state="" if summary is not None else _state(done, planned),
        sentence=_sentence(scores, whole(finished.get("steps")) or done, finished.get("seconds")),
        facts=_facts(config, finished, done, planned),
        scores=scores,
        alarms=shown_alarms(metrics, moments),
    )


def _state(done: int, planned: int | None) -> str:
    reached = f"step {done} of {planned}" if planned else f"step {done}"
    return (
        f"This run is unfinished: {reached}. It has no summary.json. This page shows what was on disk when "
        "it was written."
    )


def _so_far(moments: list[EvalPoint]) -> list[tuple[str, SearchScore | None]]:
    name = main_name((name for moment in moments for name in moment.scores), "accuracy")
    measured = (
        [(moment.step, moment.scores[name]) for moment in moments if name in moment.scores] if name else []
    )
    before = measured[0][1] if measured and measured[0][0] == 0 else None
    latest = measured[-1] if measured and measured[-1][0] > 0 else None
    return [
        ("student before", before),
        (f"student at step {latest[0]}" if latest else "student after", latest[1] if latest else None),
        ("teacher", next((moment.teacher for moment in moments if moment.teacher), None)),
    ]


def _sentence(scores: list[tuple[str, SearchScore | None]], steps: int, seconds: object) -> str:
    (_, before), (_, after), (_, teacher) = scores
    if before is None or after is None:
        return ""
    spent = f" ({duration(float(seconds))})" if isinstance(seconds, int | float) else ""
    moved = (
        f"In {count(steps)} steps{spent} the student's accuracy went from {percent(before.accuracy)} to "
        f"{percent(after.accuracy)}"
    )
    whole = moved + (f"; the teacher's accuracy is {percent(teacher.accuracy)}." if teacher else ".")
    return whole.replace(" %", "\u00a0%")


def _facts(config: Row, summary: Row, done: int, planned: int | None) -> list[tuple[str, str]]:
    told = {name: table(entry) for name, entry in table(config.get("teachers")).items()}
    teachers = {
        name: "the student itself" if entry.get("kind") == "self" else entry.get("model")
        for name, entry in told.items()
    }
    one = len(teachers) == 1
    found: list[tuple[str, object]] = [
        ("method", summary.get("method") or _method(config)),
        ("student", table(config.get("learner")).get("model")),
        *[("teacher" if one else f"teacher {name}", model) for name, model in teachers.items()],
        ("task", table(config.get("task")).get("kind")),
        ("steps", f"{done} of {planned}" if planned and planned != done else done or planned),
        ("seed", summary.get("seed", config.get("seed"))),
        ("commit", summary.get("commit")),
        ("config hash", summary.get("config_hash")),
    ]
    return [
        (visible(what), visible(str(value))) for what, value in found if value is not None and value != ""
    ]


def _method(config: Row) -> str:
    objectives = [str(table(entry).get("kind")) for entry in items(config.get("objectives"))]
    return " + ".join([*objectives, *map(str, table(config.get("credit")))])
