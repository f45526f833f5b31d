"""Alarms of whole runs: in the metrics, the terminal, the summary and the report, and as the end of a run."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import Done
from reflux.errors import ConfigError, StoppedByAlarm
from reflux.loop import train
from reflux.reports.page import write_report
from reflux.runtime.watch import Silent
from reflux.storage import checkpoints
from reflux.training import Options
from synthetic_run import evals_row, write_lines, write_run
from tiny import same

# every answer has one token, and nearly none is an end; the teacher's weights are random
LIMITED: dict[str, Any] = {
    "steps": 6,
    "save_every": 4,
    "health__window": 2,
    "health__skip": ["uniform_teacher"],
    "sampler__max_tokens": 1,
}
FALLING: dict[str, Any] = {
    "steps": 6,
    "save_every": 6,
    "eval_every": 1,
    "evals__falls": {"kind": "outside:Falls", "at": 3},
}


class Hearing(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def noted(self, text: str) -> None:
        self.notes.append(text)

    @property
    def alarms(self) -> list[str]:
        return [note for note in self.notes if ": alarm " in note]


def go(cfg: Any, folder: Path, resume: bool = False) -> tuple[Done, list[str]]:
    heard = Hearing()
    return Done(folder, asyncio.run(train(cfg, Options(folder, resume, heard)))), heard.alarms


def health_of(done: Done, name: str = "metrics") -> dict[int, list[str]]:
    return {row["step"]: row.get("health", []) for row in done.rows(name)}


def test_an_alarm_is_in_the_metrics_the_terminal_and_the_summary(
    student: str, teacher: str, tmp_path: Path
) -> None:
    done, notes = go(tiny.config("vopd", student, teacher, **LIMITED), tmp_path / "run")
    assert health_of(done) == {1: []} | {step: ["length_limited"] for step in range(2, 7)}
    assert len(notes) == 1
    assert notes[0].startswith(
        "step 2: alarm length_limited. 100% of the answers end at the length limit of 1 "
    )
    assert done.summary["health"] == {"length_limited": {"times": 1, "first_step": 2, "last_step": None}}
    assert json.loads((done.dir / "summary.json").read_text())["health"] == done.summary["health"]


def test_a_tracker_gets_a_number_for_each_alarm(
    student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reflux import training
    from reflux.metrics.trackers import NoTracker, flat

    logged: dict[int, dict[str, float]] = {}

    class Recording(NoTracker):
        def log(self, values: Any, step: int) -> None:
            logged.setdefault(step, {}).update(flat(values))

    monkeypatch.setattr(training, "open_tracker", lambda *asked: Recording())
    go(tiny.config("vopd", student, teacher, **LIMITED | {"steps": 2}), tmp_path / "run")
    assert [logged[step]["health/length_limited"] for step in (1, 2)] == [0, 1]
    assert logged[2]["health/no_checkpoint"] == 0
    assert "health/uniform_teacher" not in logged[2]


def test_a_healthy_run_has_no_alarm_and_its_evaluations_are_as_they_were(
    tiny_run: Callable[..., Any],
) -> None:
    done = tiny_run("vopd", steps=2, evals__accuracy={"problems": 3})
    assert health_of(done) == {1: [], 2: []}
    assert done.summary["health"] == {}
    assert all({*row} == {"step", "accuracy"} for row in done.rows("evals"))


@pytest.mark.parametrize(
    ("settings", "name", "step"), [(LIMITED, "length_limited", 2), (FALLING, "falling_evaluation", 4)]
)
def test_stop_on_ends_a_run_that_can_be_resumed_as_if_nothing_had_happened(
    student: str, teacher: str, tmp_path: Path, settings: dict[str, Any], name: str, step: int
) -> None:
    whole, _ = go(tiny.config("vopd", student, teacher, **settings), tmp_path / "whole")
    cfg = tiny.config("vopd", student, teacher, **settings, health__stop_on=[name])
    with pytest.raises(
        StoppedByAlarm,
        match=rf"stopped after step {step} of 6; everything is saved\. step {step}: alarm {name}\.",
    ):
        go(cfg, tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run" / "checkpoints")[-1] == step
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed, notes = go(cfg, tmp_path / "run", resume=True)
    assert notes == []
    assert same(whole.state, resumed.state)
    for file in ("metrics", "evals"):
        assert health_of(whole, file) == health_of(resumed, file)
    assert whole.summary["health"] == resumed.summary["health"]
    assert {*whole.summary["health"]} == {name}


def test_an_alarm_at_the_last_step_does_not_stop_the_run(student: str, teacher: str, tmp_path: Path) -> None:
    cfg = tiny.config("vopd", student, teacher, **LIMITED | {"steps": 2}, health__stop_on=["length_limited"])
    done, notes = go(cfg, tmp_path / "run")
    assert (done.summary["steps"], len(notes)) == (2, 1)


def test_an_evaluation_after_the_last_step_raises_an_alarm(
    student: str, teacher: str, tmp_path: Path
) -> None:
    done, notes = go(tiny.config("vopd", student, teacher, **FALLING | {"steps": 4}), tmp_path / "run")
    assert health_of(done) == {1: [], 2: [], 3: [], 4: []}
    assert health_of(done, "evals") == {0: [], 1: [], 2: [], 3: [], 4: ["falling_evaluation"]}
    assert done.summary["health"]["falling_evaluation"] == {"times": 1, "first_step": 4, "last_step": None}
    assert len(notes) == 1


def test_thresholds_may_differ_on_resume(student: str, teacher: str, tmp_path: Path) -> None:
    go(tiny.config("vopd", student, teacher, **LIMITED | {"steps": 2}), tmp_path / "run")
    cfg = tiny.config(
        "vopd", student, teacher, **LIMITED | {"health__skip": ["length_limited", "uniform_teacher"]}
    )
    done, notes = go(cfg, tmp_path / "run", resume=True)
    assert notes == []
    assert health_of(done)[6] == []
    assert done.summary["health"]["length_limited"] == {"times": 1, "first_step": 2, "last_step": 2}


def test_a_nearly_full_disk_is_measured_against_the_checkpoint_also_after_a_resume(
    student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 3, "save_every": 1}
    done, _ = go(tiny.config("vopd", student, teacher, **settings | {"steps": 1}), tmp_path / "run")
    folders = (done.dir / "student", done.dir / "checkpoints" / "step-1")
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    usage = shutil.disk_usage(tmp_path)
    # checkpoints of later steps differ by a few bytes of counters
    free = iter([3 * size - 1000, *[3 * size + 1000] * 9])
    cfg = tiny.config("vopd", student, teacher, **settings, skip_checks=["disk"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    done, notes = go(cfg, tmp_path / "run", resume=True)
    assert health_of(done) == {1: [], 2: ["disk_nearly_full"], 3: []}
    assert len(notes) == 1


def test_the_size_of_a_checkpoint_is_known_after_the_first_one(
    student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    settings = {"steps": 4, "save_every": 2, "skip_checks": ["disk"]}
    done, _ = go(tiny.config("vopd", student, teacher, **settings), tmp_path / "run")
    assert health_of(done) == {1: [], 2: [], 3: ["disk_nearly_full"], 4: ["disk_nearly_full"]}


def test_names_that_rows_of_evaluations_have_are_refused(student: str, teacher: str) -> None:
    for name in ("step", "health"):
        with pytest.raises(ConfigError, match=rf"evals\.{name}: evals.jsonl has this key already"):
            tiny.config("vopd", student, teacher, evals={name: {"kind": "accuracy"}})


RECIPE = """
base = "toy"
steps = 4
prompts_per_step = 2
threads = 1
[learner]
model = "{student}"
[sampler]
max_tokens = 1
[teachers.main]
model = "{teacher}"
[[objectives]]
kind = "divergence"
[health]
stop_on = ["length_limited"]
window = 2
skip = ["uniform_teacher"]
[evals]
accuracy = "none"
agreement = "none"
teacher_accuracy = "none"
test_accuracy = "none"
"""


def test_the_command_says_which_alarm_ended_the_run_and_how_to_go_on(
    student: str, teacher: str, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "short.toml", tmp_path / "run dir"
    recipe.write_text(RECIPE.format(student=student, teacher=teacher))
    command = [sys.executable, "-m", "reflux.cli.main", "run", str(recipe), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "400"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr
    said = " ".join(ended.stdout.split())
    assert "stopped after step 2 of 4; everything is saved. step 2: alarm length_limited." in said
    assert f"Report: {out / 'report.html'}" in said
    assert "Alarms" in (out / "report.html").read_text()
    assert f"Continue with: reflux run {recipe} --out '{out}' --resume" in said
    assert "Traceback" not in ended.stdout + ended.stderr
    again = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "alarm" not in again.stdout
    assert json.loads((out / "summary.json").read_text())["health"]["length_limited"]["times"] == 1


def shown(folder: Path) -> str:
    from test_report import Page

    return " ".join(Page(write_report(folder)).words.split())


def with_alarms(folder: Path) -> Path:
    """A synthetic run of 60 steps with alarms in its metrics and after its last evaluation."""
    write_run(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["health"] = [
            *(["ratio_outside"] if row["step"] in (7, *range(20, 31)) else []),
            *(["of_another_version"] if row["step"] > 55 else []),
        ]
    write_lines(folder / "metrics.jsonl", rows)
    last = evals_row(60, 60) | {"health": ["of_another_version", "falling_evaluation"]}
    write_lines(folder / "evals.jsonl", [evals_row(0, 60), last])
    return folder


def test_the_report_shows_the_steps_of_each_alarm_and_what_to_look_at(tmp_path: Path) -> None:
    words = shown(with_alarms(tmp_path / "run"))
    assert "ratio_outside, step 7, steps 20 to 30. Lower max_staleness or the learning rate" in words
    assert "of_another_version, from step 56 on." in words
    assert "falling_evaluation, from step 60 on. Look at the accuracy and the answers" in words
    (tmp_path / "run" / "summary.json").unlink()
    assert "falling_evaluation, from step 60 on." in shown(tmp_path / "run")


def test_a_report_without_alarms_has_no_such_list(tmp_path: Path) -> None:
    assert "Alarms" not in shown(write_run(tmp_path / "run"))


@pytest.mark.parametrize(
    ("last", "rest"), [(9, "step 9."), (11, "step 9, and once more."), (59, "step 9, and 25 more times.")]
)
def test_many_periods_of_one_alarm_are_cut(tmp_path: Path, last: int, rest: str) -> None:
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    odd = [["ratio_outside"] if row["step"] % 2 and row["step"] <= last else [] for row in rows]
    write_lines(
        folder / "metrics.jsonl", [row | {"health": held} for row, held in zip(rows, odd, strict=True)]
    )
    assert f"step 1, step 3, step 5, step 7, {rest}" in shown(folder)


@pytest.mark.parametrize("held", [None, 3, "ratio_outside", [1, None, {}], {"a": 1}])
def test_a_list_of_alarms_of_a_wrong_type_is_no_alarm(tmp_path: Path, held: Any) -> None:
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics.jsonl", [row | {"health": held} for row in rows])
    assert "Alarms" not in shown(folder)
