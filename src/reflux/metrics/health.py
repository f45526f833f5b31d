"""Alarms: conditions of a run that a person should look at.

Each alarm is a rule that reads the recorded numbers of steps and evaluations (`History`) and the thresholds
of the table [health]. It asks for no work of a model. A rule returns a sentence with the numbers if its
condition holds, else None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from reflux.config.thresholds import AlarmName, Health
from reflux.metrics.history import History, Measured, Row, number


def _mean(rows: Sequence[Row], *path: str) -> float | None:
    """The mean of a number of the rows, by the path of its key. None if no row has it."""
    known = [value for row in rows if (value := number(row, *path)) is not None]
    return fmean(known) if known else None


def _names(rows: Sequence[Row], key: str) -> list[str]:
    """The keys of a table of the rows."""
    return sorted({name for row in rows for name in row.get(key, {})})


def length_inflation(history: History, cfg: Health) -> str | None:
    before, now = (_mean(rows, "response_tokens_mean") for rows in (history.start, history.newest))
    if not before or now is None or now < cfg.length_growth * before:
        return None
    return f"The mean answer has {now:.0f} positions, {now / before:.1f} times as many as at first."


def length_limited(history: History, cfg: Health) -> str | None:
    share = None if history.cut else _mean(history.settled, "truncated")
    if share is None or share < cfg.limited_share:
        return None
    return f"{share:.0%} of the answers end at the length limit of {history.limit} positions."


def entropy_collapse(history: History, cfg: Health) -> str | None:
    """The student's entropy has fallen. With a teacher the KL must also be at least the entropy: a student
    that has become as certain as its teacher has learnt what it should.
    """
    before, now = (_mean(rows, "entropy_nats") for rows in (history.start, history.newest))
    kl = _mean(history.newest, "kl_nats")
    if not before or now is None or now > cfg.entropy_share * before or (kl is not None and kl < now):
        return None
    return f"The student's entropy is {now:.2g} nats per token; at first it was {before:.2g}."


def uniform_teacher(history: History, cfg: Health) -> str | None:
    for name in _names(history.newest, "teacher_nats_by_table"):
        nats, spread = (_mean(history.newest, "teacher_nats_by_table", name, key) for key in ("mean", "std"))
        if nats is None or spread is None or nats < cfg.teacher_nats or spread > cfg.teacher_spread * nats:
            continue
        return f"Teacher {name} gives nearly all sampled tokens a log-prob of -{nats:.1f} nats."
    return None


def starved_teacher(history: History, cfg: Health) -> str | None:
    """A teacher name has no target for most attempts, or a table was asked for no attempt."""
    rows = history.newest
    attempts = sum(sum(row["finishes"].values()) - row["errors"] for row in rows)
    if not attempts:
        return None
    for name in _names(rows, "without_target"):
        share = sum(row["without_target"].get(name, 0) for row in rows) / attempts
        if share >= cfg.starved_share:
            return f"Teacher {name} gave no target for {share:.0%} of the attempts."
    for table in _names(rows, "asked"):
        if not sum(row["asked"].get(table, 0) for row in rows):
            return f"Teacher {table} was asked for none of the attempts of {len(rows)} steps."
    return None


def stalled_sampler(history: History, cfg: Health) -> str | None:
    spent = [number(row, "seconds", "sample") for row in history.recent]
    now, known = (spent or [None])[-1], [value for value in spent[:-1] if value is not None]
    if now is None or len(known) < cfg.window or now < max(cfg.stall_s, cfg.stall_factor * median(known)):
        return None
    return f"Sampling took {now:.0f} s; the median of the steps before is {median(known):.3g} s."


def small_effective_sample(history: History, cfg: Health) -> str | None:
    for rule in _names(history.newest, "credit"):
        share = _mean(history.newest, "credit", rule, "effective")
        if share is not None and share <= cfg.effective_share:
            return f"With the weights of credit.{rule} a batch counts as {share:.0%} of its attempts."
    return None


def ratio_outside(history: History, cfg: Health) -> str | None:
    share = _mean(history.newest, "ratio_outside_share")
    if share is None or share < cfg.outside_share:
        return None
    return f"{share:.0%} of the importance ratios are outside their bounds."


def disk_nearly_full(history: History, cfg: Health) -> str | None:
    free, size = history.free_bytes, history.saved_bytes
    if free is None or size is None or free >= cfg.disk_checkpoints * size:
        return None
    return f"{free / 1e9:.3g} GB are free, and a checkpoint with the student takes {size / 1e9:.3g} GB."


def no_checkpoint(history: History, cfg: Health) -> str | None:
    if history.unsaved_s < cfg.checkpoint_hours * 3600:
        return None
    return f"The last checkpoint is {history.unsaved_s / 3600:.1f} hours of training old."


def falling_evaluation(history: History, cfg: Health) -> str | None:
    """Each of the newest `fall_evaluations` accuracies p is below the highest one before them, P, by more
    than their intervals allow:

        P - p > sqrt((P - low of P)^2 + (high of p - p)^2)

    Newcombe's interval for the difference of two proportions (1998, method 10) then lies above 0. It takes
    the two as measured on different problems. Here they are the same, for which it is wider than needed. The
    highest of many accuracies is too high by chance, which is not corrected.
    """
    for name, scores in history.scores.items():
        before, newest = scores[: -cfg.fall_evaluations], scores[-cfg.fall_evaluations :]
        peak = max(before, key=lambda score: score.accuracy, default=None)
        if peak is not None and all(_is_below(score, peak) for score in newest):
            return f"{name} is {newest[-1].accuracy:.1%}; at step {peak.step} it was {peak.accuracy:.1%}."
    return None


def _is_below(score: Measured, peak: Measured) -> bool:
    allowed = math.hypot(peak.accuracy - peak.low, score.high - score.accuracy)
    return peak.accuracy - score.accuracy > allowed


@dataclass(frozen=True)
class Alarm:
    """rule: the sentence with the numbers if the alarm holds. look_at: what a person should look at, in one
    sentence.
    """

    rule: Callable[[History, Health], str | None]
    look_at: str


ALARMS: dict[AlarmName, Alarm] = {
    "length_inflation": Alarm(
        length_inflation,
        "Read the longest of the newest answers in the report: repetitions and text after the end of the "
        "answer are the usual reasons.",
    ),
    "length_limited": Alarm(
        length_limited,
        "Look whether these answers repeat themselves, which needs a lower learning rate, or are unfinished, "
        "which needs a higher sampler.max_tokens.",
    ),
    "entropy_collapse": Alarm(
        entropy_collapse,
        "Compare several answers to one prompt: if they are all alike, lower the learning rate, or start "
        "again from an earlier student.",
    ),
    "uniform_teacher": Alarm(
        uniform_teacher,
        "Check the teacher's weights, tokenizer and chat template with reflux doctor: it knows nothing of "
        "these texts.",
    ),
    "starved_teacher": Alarm(
        starved_teacher,
        "Look at asked, answer_errors and without_target in metrics.jsonl: the route, the context or the "
        "teacher's server is the usual reason.",
    ),
    "stalled_sampler": Alarm(
        stalled_sampler,
        "Look at the sampler's log, the tools of the environment, and what else runs on this machine.",
    ),
    "small_effective_sample": Alarm(
        small_effective_sample,
        "Look at the weights of this rule by attempt in the report, and at the staleness of the attempts.",
    ),
    "ratio_outside": Alarm(
        ratio_outside,
        "Lower max_staleness or the learning rate, and check with reflux doctor that sampler and learner "
        "agree on log-probs.",
    ),
    "disk_nearly_full": Alarm(
        disk_nearly_full,
        "Free space on the disk of the run directory, or lower keep_checkpoints before you resume.",
    ),
    "no_checkpoint": Alarm(no_checkpoint, "Lower save_every, so that an interruption costs less."),
    "falling_evaluation": Alarm(
        falling_evaluation,
        "Look at the accuracy and the answers in the report: an earlier checkpoint may be the better "
        "student, and the learning rate may be too high.",
    ),
}


@dataclass(frozen=True)
class Period:
    """The steps at which an alarm held, without a gap. last: None if it still held at the last step."""

    name: str
    first: int
    last: int | None


def periods(steps: Iterable[Row], evals: Iterable[Row]) -> list[Period]:
    """The periods of all alarms, by their beginnings, from the rows of metrics.jsonl and evals.jsonl. An
    evaluation comes after the step of the same number. A row without the key `health` holds no alarm.
    """
    moments = [(row["step"], place, row) for place, rows in enumerate((steps, evals)) for row in rows]
    began: dict[str, int] = {}
    last, found = 0, []
    for step, _, row in sorted(moments, key=lambda moment: moment[:2]):
        names = row.get("health", ())
        found += [Period(name, began.pop(name), last) for name in [*began] if name not in names]
        began |= {name: step for name in names if name not in began}
        last = step
    found += [Period(name, first, None) for name, first in began.items()]
    return sorted(found, key=lambda period: (period.first, period.name))
