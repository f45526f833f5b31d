"""One attempt at an image as the page shows it: the image, its verdict, and a table of denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

from reflux.reports.attempts import ShownAttempt
from reflux.reports.examples import verdict, words
from reflux.reports.reading import items, number
from reflux.reports.strips import Image, parts_of, picture_in
from reflux.reports.tokens import level
from reflux.reports.units import NONE, signed
from reflux.reports.views import absent_because, policy, title_of, unjudged

RATIO = "log q − log p, nats"
# the largest number of steps that are shown
_MOST = 200


@dataclass(frozen=True)
class Step:
    """One denoising step: its cells by column name, and the css class of the log-ratio's colour."""

    css: str
    cells: dict[str, str]


@dataclass(frozen=True)
class TrajectoryView:
    """One attempt as the template shows it. verdict: empty if the attempt was not graded."""

    title: str
    facts: list[str]
    question: str
    image: Image | None
    verdict: str
    parts: list[str]
    header: list[str]
    steps: list[Step]
    left_out: int
    missing: str


def trajectory(shown: ShownAttempt) -> TrajectoryView:
    """The report's view of an image attempt. Its table has one row per denoising step, with the recorded
    time, log-ratio, KL, weight and advantage offset. A column without a number in any row is left out,
    except the log-ratio.
    """
    acted = shown.acted
    steps = [_step(shown, place) for place in range(len(items(acted.get("mask"))))]
    header = [
        name
        for name in (steps[0].cells if steps else ())
        if name == RATIO or any(step.cells[name] != NONE for step in steps)
    ]
    return TrajectoryView(
        title=title_of(acted),
        facts=_facts(shown),
        question=words(acted.get("question")),
        image=picture_in(acted.get("image")),
        verdict="" if shown.reward is None else verdict(shown.reward),
        parts=parts_of(acted),
        header=header,
        steps=steps[:_MOST],
        left_out=max(0, len(steps) - _MOST),
        missing=absent_because(shown, "steps"),
    )


def _facts(shown: ShownAttempt) -> list[str]:
    acted = shown.acted
    mask = items(acted.get("mask"))
    noise, guidance = number(acted.get("noise_level")), number(acted.get("guidance"))
    facts = [
        f"{len(mask):,} denoising steps, {sum(number(value) == 1 for value in mask):,} to train on"
        if mask
        else "",
        "" if shown.reward is None else f"reward {shown.reward:.3g}",
        unjudged(acted),
        "" if noise is None else f"noise level {noise:g}",
        "" if guidance in (None, 1.0) else f"guidance {guidance:g}",
        f"finish: {words(acted['finish'])}" if acted.get("finish") else "",
        policy(acted),
    ]
    return [fact for fact in facts if fact]


def _step(shown: ShownAttempt, place: int) -> Step:
    """One row of the table. A step without noise (the last one of a full grid) is not sampled and has no
    ratio.
    """
    acted, learned = shown.acted, shown.learned
    chosen = _at(acted.get("mask"), place) == 1
    student, teacher = _at(shown.student_logp, place), _at(shown.teacher_logp, place)
    ratio = None if student is None or teacher is None else teacher - student
    depth = 0 if ratio is None else level(ratio)
    cells = {
        "step": str(place),
        "time": _number(_at(acted.get("t"), place), ".3f"),
        RATIO: signed(ratio, 2) if chosen else "not trained on",
        "KL, nats": _number(_at(learned.get("kl"), place), ".3f"),
        "weight": _number(_at(learned.get("weight"), place), ".3g"),
        "advantage offset, nats": signed(_at(learned.get("advantage_offset"), place)),
    }
    return Step(
        "given" if not chosen else "unknown" if ratio is None else f"{'n' if depth < 0 else 'p'}{abs(depth)}",
        cells,
    )


def _at(values: object, place: int) -> float | None:
    found = items(values)
    return number(found[place]) if place < len(found) else None


def _number(value: float | None, how: str) -> str:
    return NONE if value is None else f"{value:{how}}"
