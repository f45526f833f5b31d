"""Ten attempts out of attempts.jsonl, spread over the run. The file may be large, so it is streamed twice and
only the shown attempts are kept in memory. An attempt has two lines, joined on (step, prompt, sample): one
written after sampling and one written after the student was trained on it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from reflux.reports.reading import Row, number, rows, table, whole

Key = tuple[int, str, int]


@dataclass
class ShownAttempt:
    """One attempt as it is shown: its first line, and its second line if there is one."""

    acted: Row
    learned: Row = field(default_factory=dict)

    @property
    def teacher_logp(self) -> object:
        """The log-probs of teacher main, else of the first other teacher. None without a teacher."""
        by_name = table(self.learned.get("teacher_logp"))
        return by_name.get("main", next(iter(by_name.values()), None))

    @property
    def student_logp(self) -> object:
        """The student's log-probs from training if they are recorded, else those from sampling."""
        return self.learned.get("student_logp") or self.acted.get("logp")

    @property
    def reward(self) -> float | None:
        return number(self.acted.get("reward"))


def read_attempts(path: Path, notes: list[str], limit: int = 10) -> list[ShownAttempt]:
    """At most `limit` attempts, from steps evenly spaced between the first and the last trained step; of each
    step its first attempts.

    Steps that were only sampled (in a killed or a running run) are shown if no step was trained on yet.
    """
    acted: Counter[int] = Counter()
    learned: set[int] = set()
    for row in rows(path, notes):
        key = _key(row)
        if key is not None and row.get("kind") == "attempt":
            acted[key[0]] += 1
        elif key is not None and row.get("kind") == "learned":
            learned.add(key[0])
    trained = {step: attempts for step, attempts in acted.items() if step in learned}
    return _collect(path, spread(trained or acted, limit))


def _collect(path: Path, wanted: dict[int, int]) -> list[ShownAttempt]:
    chosen: dict[Key, ShownAttempt] = {}
    taken: Counter[int] = Counter()
    for row in rows(path, []) if wanted else ():
        key = _key(row)
        if key is None or key[0] not in wanted:
            continue
        if row.get("kind") == "learned" and key in chosen:
            chosen[key].learned = row
        elif row.get("kind") == "attempt" and (key in chosen or taken[key[0]] < wanted[key[0]]):
            taken[key[0]] += key not in chosen
            chosen[key] = ShownAttempt(row)
    return [chosen[key] for key in sorted(chosen, key=lambda key: key[0])]


def spread(available: dict[int, int], limit: int) -> dict[int, int]:
    """How many attempts to take of each step, at most `limit` in all: spread evenly, both ends included."""
    steps = sorted(available)
    if len(steps) >= limit:
        return {steps[round(index * (len(steps) - 1) / max(1, limit - 1))]: 1 for index in range(limit)}
    wanted = dict.fromkeys(steps, 0)
    left = min(limit, sum(available.values()))
    while left:
        for step in steps:
            if left and wanted[step] < available[step]:
                wanted[step] += 1
                left -= 1
    return wanted


def _key(row: Row) -> Key | None:
    step, sample = whole(row.get("step")), whole(row.get("sample"))
    return None if step is None else (step, str(row.get("prompt")), 0 if sample is None else sample)
