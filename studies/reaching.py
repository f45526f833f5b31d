"""What the arms of a study spend until they reach a share of what the baseline reaches at its end.

    python studies/reaching.py OUT [--baseline full] [--arms a,b] [--shares 0.9,0.99] [--score KEY]
                               [--spent flops|seconds] [--figure FILE.svg]

OUT is the folder of studies/run.py. The goal is `share` times the baseline's mean score at its last
evaluation. Both the scores of an arm and what it spent are averaged over seeds at each evaluation, and
straight lines join the evaluations: an arm reaches the goal where its line first crosses it. The intervals
are the 2.5 % and 97.5 % quantiles over 4,000 draws of as many seeds with replacement, the same seeds for
both arms of a ratio. "not" means that the arm never reaches the goal, and an interval may end there.

FLOP are those of the metrics (`reflux.metrics.step_flops`). Seconds are those of sampling, teachers and
learning, without evaluations. They are comparable only if the runs had the machine to themselves. --figure
draws the mean scores against what was spent.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reflux.storage.files import read_lines

DRAWS = 4000
PHASES = ("sample", "teach", "learn")
UNITS = {"flops": (1e12, "TFLOP"), "seconds": (1.0, "s")}


@dataclass(frozen=True)
class Courses:
    """An arm's evaluations: steps_E, and for each seed what was spent until then and the score."""

    steps_E: np.ndarray
    spent_SE: np.ndarray
    score_SE: np.ndarray


def courses(arm: Path, score: str, spent: str) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By seed (steps, spent, scores) at each evaluation of a finished run in which `score` was measured."""
    evaluation, key = score.split(".")
    found = {}
    for run in sorted(arm.glob("seed-*")):
        if not (run / "summary.json").exists():
            continue
        steps = list(read_lines(run / "metrics.jsonl"))
        rows = [row for row in read_lines(run / "evals.jsonl") if key in (row.get(evaluation) or {})]
        each = [
            sum(row["flops"].values()) if spent == "flops" else sum(row["seconds"][name] for name in PHASES)
            for row in steps
        ]
        at = np.array([row["step"] for row in rows])
        found[int(run.name.removeprefix("seed-"))] = (
            at,
            np.array([sum(each[:step]) for step in at]) / UNITS[spent][0],
            np.array([row[evaluation][key] for row in rows]),
        )
    return found


def of_seeds(arm: Mapping[int, tuple[np.ndarray, ...]], seeds: Sequence[int]) -> Courses:
    steps, spent, scores = zip(*(arm[seed] for seed in seeds), strict=True)
    return Courses(steps[0], np.array(spent), np.array(scores))


def reached(spent_E: np.ndarray, score_E: np.ndarray, goal: float) -> float:
    """What is spent where the line through the evaluations first comes to `goal`; infinite if it never
    does.
    """
    if score_E[0] >= goal:
        return float(spent_E[0])
    for i in range(1, len(score_E)):
        if score_E[i] >= goal:
            along = (goal - score_E[i - 1]) / (score_E[i] - score_E[i - 1])
            return float(spent_E[i - 1] + along * (spent_E[i] - spent_E[i - 1]))
    return math.inf


def to_goal(arm: Courses, baseline: Courses, share: float, drawn: np.ndarray) -> tuple[float, float]:
    """(spent by the arm, baseline's spent over it) until `share` of the baseline's last mean score.

    drawn: the indices of the seeds whose mean is taken. The ratio is 0 if the arm never reaches the goal.
    """
    goal = share * baseline.score_SE[drawn, -1].mean()
    ours, theirs = (
        reached(one.spent_SE[drawn].mean(0), one.score_SE[drawn].mean(0), goal) for one in (arm, baseline)
    )
    if ours == 0:
        return 0.0, math.inf
    return ours, theirs / ours


def estimate(arm: Courses, baseline: Courses, share: float) -> list[tuple[float, float, float]]:
    """For what is spent, and for the baseline's over it: the value and the ends of its 95 % interval."""
    seeds = len(arm.score_SE)
    rng = np.random.default_rng(0)
    value = to_goal(arm, baseline, share, np.arange(seeds))
    draws = [to_goal(arm, baseline, share, rng.integers(0, seeds, seeds)) for _ in range(DRAWS)]
    # "lower" and "higher" are values that were drawn. A quantile between a number and infinity is none.
    ends = [
        np.quantile(np.array(draws), q, axis=0, method=method)
        for q, method in ((0.025, "lower"), (0.975, "higher"))
    ]
    return [(value[i], float(ends[0][i]), float(ends[1][i])) for i in range(2)]


def shown(values: tuple[float, float, float], digits: int) -> str:
    texts = ["not" if math.isinf(value) else f"{value:.{digits}f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def table(
    arms: Mapping[str, Mapping[int, tuple[np.ndarray, ...]]],
    baseline: str,
    shares: Sequence[float],
    unit: str,
) -> str:
    """One row per arm: the last score, and for each share what is spent and the baseline's over it."""
    head = ["arm", "seeds", "last score", f"{unit} in all"]
    head += [
        title
        for share in shares
        for title in (f"{unit} to {share:.0%}", f"{baseline} over it, to {share:.0%}")
    ]
    rows = [head, ["---"] * len(head)]
    for name, arm in arms.items():
        seeds = sorted(arm.keys() & arms[baseline].keys())
        if not seeds:
            continue
        one, other = of_seeds(arm, seeds), of_seeds(arms[baseline], seeds)
        cells = [
            name,
            str(len(seeds)),
            f"{one.score_SE[:, -1].mean():.1%}",
            f"{one.spent_SE[:, -1].mean():.3g}",
        ]
        for share in shares:
            spent, ratio = estimate(one, other, share)
            cells += [shown(spent, 3), "" if name == baseline else shown(ratio, 2)]
        rows.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def draw(arms: Mapping[str, Mapping[int, tuple[np.ndarray, ...]]], unit: str, score: str, path: Path) -> None:
    from figures import axes, save

    figure, ax = axes(f"{unit} spent", score.split(".")[1])
    for name, arm in arms.items():
        if arm:
            mean = of_seeds(arm, sorted(arm))
            ax.plot(mean.spent_SE.mean(0), mean.score_SE.mean(0), marker="o", markersize=3, label=name)
    ax.set_xlim(left=0)
    ax.legend(frameon=False)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--baseline", default="full", help="the arm that sets the goal (full)")
    parser.add_argument("--arms", type=lambda text: text.split(","), help="separated by commas (all)")
    parser.add_argument(
        "--shares", type=lambda text: [float(part) for part in text.split(",")], default=[0.9, 0.99]
    )
    parser.add_argument("--score", default="accuracy.accuracy", help="EVALUATION.KEY, higher is better")
    parser.add_argument("--spent", choices=UNITS, default="flops")
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args(arguments)
    names = asked.arms or sorted(path.name for path in asked.out.iterdir() if path.is_dir())
    arms = {
        name: courses(asked.out / name, asked.score, asked.spent)
        for name in dict.fromkeys([asked.baseline, *names])
    }
    if not arms[asked.baseline]:
        sys.exit(f"{asked.out} has no finished run of the arm {asked.baseline}")
    unit = UNITS[asked.spent][1]
    print(table(arms, asked.baseline, asked.shares, unit))
    if asked.figure:
        draw(arms, unit, asked.score, asked.figure)


if __name__ == "__main__":
    main()
