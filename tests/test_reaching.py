"""What an arm spends until it reaches a share of the baseline's last score."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

STUDIES = Path(__file__).parents[1] / "studies"
# scripts import their neighbours
sys.path.insert(0, str(STUDIES))

from reaching import Courses, estimate, reached, shown, to_goal  # noqa: E402


def arm(spent, scores):
    """A course on one seed for each row of `scores`, which spends the same on every seed."""
    scores = np.array(scores, float)
    return Courses(np.arange(scores.shape[1]), np.tile(np.array(spent, float), (len(scores), 1)), scores)


def test_the_goal_is_reached_where_the_line_first_crosses_it():
    spent, score = np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.1, 0.3, 0.7, 0.5])
    assert reached(spent, score, 0.3) == 10.0
    assert reached(spent, score, 0.5) == pytest.approx(15.0)
    assert reached(spent, score, 0.05) == 0.0
    assert reached(spent, score, 0.71) == math.inf


def test_the_ratio_is_of_the_mean_courses_on_the_same_seeds():
    full = arm([0, 10, 20], [[0.0, 0.4, 0.8], [0.2, 0.6, 1.0]])
    fast = arm([0, 5, 10], [[0.0, 0.4, 0.8], [0.2, 0.6, 1.0]])
    # the means are 0.1, 0.5, 0.9; 90 % of the last is 0.81, at 31/40 of the second part
    spent, ratio = to_goal(fast, full, 0.9, np.arange(2))
    assert spent == pytest.approx(5 + 5 * 0.31 / 0.4)
    assert ratio == pytest.approx(2.0)
    # of the second seed alone: 0.9 between 0.6 and 1.0
    spent, ratio = to_goal(fast, full, 0.9, np.array([1, 1]))
    assert spent == pytest.approx(5 + 5 * 0.3 / 0.4)
    assert ratio == pytest.approx(2.0)


def test_an_interval_covers_the_draws_and_may_end_where_the_goal_is_not_reached():
    full = arm([0, 10], [[0.0, 0.8], [0.0, 0.8], [0.0, 0.8]])
    level = estimate(full, full, 0.9)
    assert level[0] == pytest.approx((9.0, 9.0, 9.0))
    assert level[1] == pytest.approx((1.0, 1.0, 1.0))
    # 0.72 is reached by the first two seeds, and not by the third
    mixed = arm([0, 10], [[0.0, 0.9], [0.0, 0.8], [0.0, 0.5]])
    (value, low, high), ratio = estimate(mixed, full, 0.9)
    assert value == pytest.approx(10 * 0.72 / (2.2 / 3))
    assert low == pytest.approx(10 * 0.72 / 0.9)
    assert math.isinf(high)
    assert ratio[1] == 0.0
    assert shown((value, low, high), 1) == "9.8 (8.0 to not)"
    never = arm([0, 10], [[0.0, 0.1]] * 3)
    assert {shown(values, 1) for values in estimate(never, full, 0.9)} == {"not", "0.0"}


def write(run, accuracies, flop):
    run.mkdir(parents=True)
    rows = [{"step": 2 * i, "accuracy": {"accuracy": score}} for i, score in enumerate(accuracies)]
    steps = [
        {
            "step": i,
            "flops": {"sample": flop, "learn": flop},
            "seconds": {"sample": 1, "teach": 2, "learn": 3, "total": 9},
        }
        for i in range(1, 5)
    ]
    for name, lines in (("evals", rows), ("metrics", steps)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text("{}")


def test_a_table_is_printed_from_run_directories(tmp_path):
    for seed in (0, 1):
        write(tmp_path / "full" / f"seed-{seed}", [0.2, 0.5, 0.8], 1e12)
        write(tmp_path / "cap" / f"seed-{seed}", [0.2, 0.5, 0.8], 0.5e12)
    write(tmp_path / "cap" / "seed-2", [0.2, 0.2, 0.2], 1e12)
    (tmp_path / "cap" / "seed-3").mkdir()

    def printed(*options):
        command = [sys.executable, str(STUDIES / "reaching.py"), str(tmp_path), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    # 0.4 is reached after 4/3 of 4 steps of 2 TFLOP
    assert printed("--shares", "0.5").stdout.splitlines() == [
        "| arm | seeds | last score | TFLOP in all | TFLOP to 50% | full over it, to 50% |",
        "| --- | --- | --- | --- | --- | --- |",
        "| full | 2 | 80.0% | 8 | 2.667 |  |",
        "| cap | 2 | 80.0% | 4 | 1.333 | 2.00 |",
    ]
    assert "| full | 2 | 80.0% | 24 | 8.000 |  |" in printed("--spent", "seconds", "--shares", "0.5").stdout
    failed = printed("--baseline", "other")
    assert failed.returncode == 1
    assert "no finished run of the arm other" in failed.stderr
