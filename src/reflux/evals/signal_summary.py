"""How each signal ranks the attempts that were measured, and what a reader must know beside the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from reflux.evals.attempt_signals import Row
from reflux.metrics.ranking import ranking

# the most reasons of one kind that are told
REASONS = 3


def summarised(
    rows: Sequence[Row], signals: Mapping[str, str], truths: Collection[str], seed: int
) -> dict[str, Any]:
    """The numbers of signal.json that are computed from the attempts. rows: of `attempt_signals.measured`.
    signals: what each is, by name. truths: the names of those that are the verdicts of the verifier. seed: of
    the bootstrap.

    `attempts` are all of them, `judged` those with a verdict, and `right` those that are right. `mixed`
    prompts have both a right and a wrong attempt. Each signal has the fields of `metrics.ranking.Ranking`
    over the judged attempts. Its `what` says what it is, and its `truth` whether it is the verdicts. `notes`
    are sentences about what is missing or not defined.
    """
    judged = [row for row in rows if row["truth"] is not None]
    found = ranked(judged, list(signals), seed)
    return {
        "prompts": len({row["prompt"] for row in rows}),
        "attempts": len(rows),
        "judged": len(judged),
        "right": sum(row["truth"] for row in judged),
        "mixed": mixed(judged),
        "signals": {
            name: {"what": what, "truth": name in truths, **found.get(name, {})}
            for name, what in signals.items()
        },
        "notes": list(_notes(rows, judged, found)),
    }


def ranked(judged: Sequence[Row], names: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """How each signal ranks the attempts, by name: the fields of `Ranking`. Empty if there is no attempt.
    judged: rows with a verdict. seed: of the bootstrap.
    """
    if not judged:
        return {}
    right = np.asarray([row["truth"] for row in judged])
    numbers = {name: index for index, name in enumerate(dict.fromkeys(row["prompt"] for row in judged))}
    prompt = np.asarray([numbers[row["prompt"]] for row in judged])
    found = {}
    for name in names:
        values = np.asarray([row["signals"].get(name) for row in judged], dtype=np.float64)
        found[name] = asdict(ranking(values, right, prompt, seed))
    return found


def mixed(judged: Sequence[Row]) -> int:
    """The number of prompts with both a right and a wrong attempt. judged: rows with a verdict."""
    right, wrong = ({row["prompt"] for row in judged if row["truth"] is truth} for truth in (True, False))
    return len(right & wrong)


def _notes(
    rows: Sequence[Row], judged: Sequence[Row], found: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    if without := len(rows) - len(judged):
        reasons = Counter(row["error"] for row in rows if row["truth"] is None)
        yield (
            f"{without:,} of {len(rows):,} attempts could not be judged by the verifier. They are left out"
            f"{_listed(reasons)}."
        )
    verdicts = {row["truth"] for row in judged}
    if len(verdicts) == 1:
        yield (
            f"Every attempt that was judged is {'right' if True in verdicts else 'wrong'}, so no ranking is "
            "defined. Choose prompts of another difficulty (reflux difficulty measures it), or another "
            "student."
        )
    elif judged and not mixed(judged):
        yield (
            "No prompt has both a right and a wrong attempt, so no pair at one prompt can be compared. Take "
            "more samples, or other prompts."
        )
    lacking = {name: ranks["missing"] for name, ranks in found.items() if ranks["missing"]}
    if lacking:
        reasons = Counter(reason for row in judged for reason in row.get("missing", {}).values())
        listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in lacking.items())
        yield f"Attempts without a value, which are left out of that signal: {listed}{_listed(reasons)}."


def _listed(reasons: Counter[str]) -> str:
    """The most frequent reasons, as a clause. A reason may hold text of a server, so it is cut."""
    told = [f"{times} x {str(reason)[:200].rstrip('.')}" for reason, times in reasons.most_common(REASONS)]
    more = len(reasons) - len(told)
    return "".join([": " if told else "", "; ".join(told), f"; and {more} more reasons" if more > 0 else ""])
