"""Law 7. A run that was stopped, or killed at any moment, and resumed has the result of an uninterrupted
run.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from laws.kill_driver import POINTS, SETTINGS
from reflux.config.recipe import load_recipe
from reflux.config.requirements import Requirements
from reflux.errors import RunError, Stopped
from reflux.loop import train
from reflux.runtime.watch import Silent
from reflux.storage import checkpoints
from reflux.training import Options, Run
from tiny import same

HERE = Path(__file__).parent
# only these metrics may differ
UNLIKE = ("seconds", "peak_memory_bytes")
PLAIN = {"steps": 5, "save_every": 2, "eval_every": 2, "evals__accuracy": {"problems": 3}}


class StopAfter(Silent):
    def __init__(self, step: int):
        self.step = step

    def stepped(self, metrics: dict[str, Any]) -> None:
        if metrics["step"] == self.step:
            signal.raise_signal(signal.SIGINT)


def stop_after(step: int, folder: Path, cfg: Any) -> None:
    with pytest.raises(Stopped, match=f"stopped after step {step} of {cfg.steps}; everything is saved"):
        asyncio.run(train(cfg, Options(folder, watch=StopAfter(step))))


def told(done: Any) -> dict[str, Any]:
    """All results of a run, except seconds and memory."""
    metrics = [
        {key: value for key, value in row.items() if key not in UNLIKE} for row in done.rows("metrics")
    ]
    searches = [
        {key: value for key, value in row.items() if key != "seconds"} for row in done.rows("searches")
    ]
    summary = {key: value for key, value in done.summary.items() if key != "seconds"}
    return {
        "metrics": metrics,
        "evals": done.rows("evals"),
        "attempts": done.rows("attempts"),
        "searches": searches,
        "summary": summary,
    }


@pytest.mark.parametrize("recipe", ["vopd", "sft", "prefix", "peers"])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_stopping_changes_nothing(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path, recipe: str, step: int
) -> None:
    more = (
        {"sampler__train_max_tokens": {"kind": "linear", "start": 3, "increment": 2}}
        if recipe == "prefix"
        else {}
    )
    settings = {**PLAIN, **more, "learner__lr": {"kind": "cosine", "peak": 1e-3, "warmup": 2}}
    whole = tiny_run(recipe, **settings)
    stop_after(step, tmp_path / "stopped", tiny.config(recipe, student, teacher, **settings))
    resumed = tiny_run(recipe, **settings, out=tmp_path / "stopped", resume=True)
    assert same(whole.state, resumed.state)
    assert told(whole) == told(resumed)
    assert [row["step"] for row in resumed.rows("metrics")] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def killed(student: str, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per kill point, each left by a process that was killed there."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(HERE / "kill_driver.py"), student, teacher, str(folder)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == dict.fromkeys(POINTS, -9)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(student: str, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from conftest import Done

    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return Done(
        folder, asyncio.run(train(tiny.config("rl_opd", student, teacher, **SETTINGS), Options(folder)))
    )


@pytest.mark.parametrize("point", POINTS)
def test_kill_minus_nine_changes_nothing(
    tiny_run: Callable[..., Any], killed: Path, uninterrupted: Any, tmp_path: Path, point: str
) -> None:
    folder = shutil.copytree(killed / point, tmp_path / point)
    resumed = tiny_run("rl_opd", **SETTINGS, out=folder, resume=True)
    assert same(uninterrupted.state, resumed.state)
    assert told(uninterrupted) == told(resumed)
    if point != "final_checkpoint_named":
        # a finished run is left as it is, with one checkpoint too many
        assert files_of(folder) == files_of(uninterrupted.dir)
    assert exported(folder) == exported(uninterrupted.dir)


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def exported(folder: Path) -> bytes:
    return (folder / "student" / "model.safetensors").read_bytes()


def test_files_are_cut_back_to_the_checkpoint_before_anything_else(
    tiny_run: Callable[..., Any], killed: Path, tmp_path: Path
) -> None:
    """A resumed run that is killed at once leaves nothing of step 3 and later."""
    from reflux import checks
    from reflux.training import Run

    folder = shutil.copytree(killed / "moving", tmp_path / "moving")
    last = checkpoints.steps(folder / "checkpoints")[-1]
    before = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (last, max(before)) == (2, 3)
    cfg = tiny.config("rl_opd", *models_of(folder), **SETTINGS)
    Run.open(cfg, checks.join(cfg), Options(folder, resume=True)).close()
    for name in ("metrics", "attempts", "evals"):
        steps = [json.loads(line)["step"] for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        assert max(steps) == 2


def models_of(folder: Path) -> tuple[str, str]:
    import tomllib

    table = tomllib.loads((folder / "config.toml").read_text())
    return table["learner"]["model"], table["teachers"]["main"]["model"]


def test_a_finished_run_that_is_resumed_does_nothing(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=2, save_every=1, evals__accuracy={"problems": 2})
    before = snapshot(done.dir)
    again = tiny_run("opd", steps=2, save_every=1, evals__accuracy={"problems": 2}, out=done.dir, resume=True)
    assert snapshot(done.dir) == before
    assert again.summary == done.summary


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The modification time and content of every file except the lock."""
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in kept}


@pytest.mark.parametrize("at", [2, 3])
def test_an_evaluation_that_raises_costs_no_step(
    tiny_run: Callable[..., Any], tmp_path: Path, at: int
) -> None:
    """During the run and at the end: the trained weights are saved, and the evaluation runs again."""
    settings, broken = (
        {"steps": 3, "eval_every": 1, "save_every": 100},
        {"evals__mine": {"kind": "outside:Breaks", "at": at}},
    )
    with pytest.raises(OSError, match="the evaluation is broken"):
        tiny_run("opd", **settings, **broken, out=tmp_path / "run")
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [at]
    with pytest.raises(OSError, match="the evaluation is broken"):
        tiny_run("opd", **settings, **broken, out=tmp_path / "run", resume=True)
    mended = {"evals__mine": {"kind": "outside:Breaks", "at": 9}}
    done = tiny_run("opd", **settings, **mended, out=tmp_path / "run", resume=True)
    whole = tiny_run("opd", **settings, **mended)
    assert same(done.state, whole.state)
    assert done.rows("evals") == whole.rows("evals")
    assert [row["step"] for row in done.rows("evals")] == [0, 1, 2, 3]


def test_a_damaged_line_or_recipe_is_named(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=1)
    lines = (done.dir / "attempts.jsonl").read_text()
    (done.dir / "attempts.jsonl").write_text("null\n" + lines)
    with pytest.raises(RunError, match=r"attempts\.jsonl, line 1 is damaged: it holds no JSON object"):
        tiny_run("opd", steps=2, out=done.dir, resume=True)
    (done.dir / "attempts.jsonl").write_text(lines)
    recipe = (done.dir / "config.toml").read_text()
    for text, why in (
        (f"{recipe}\n= 3", "Invalid statement"),
        ("steps = 1\n", "it has no task and no sampler and no learner"),
    ):
        (done.dir / "config.toml").write_text(text)
        with pytest.raises(RunError, match=rf"config\.toml is damaged: {why}"):
            tiny_run("opd", steps=2, out=done.dir, resume=True)


def test_another_recipe_is_refused_with_its_differences(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=1)
    before = snapshot(done.dir)
    changed = {
        "learner__lr": 1e-4,
        "seed": 3,
        "credit": {"prefix": {"length": 4}},
        "objectives": [{"kind": "divergence"}],
    }
    with pytest.raises(RunError, match="another recipe") as refused:
        tiny_run("opd", **(changed | {"steps": 1}), out=done.dir, resume=True)
    text = str(refused.value)
    for words in (
        "learner.lr: was 0.001, is 0.0001",
        "seed: was 0, is 3",
        "credit.prefix",
        "objectives: was",
    ):
        assert words in text
    assert "steps" not in text
    assert snapshot(done.dir) == before


def test_more_steps_may_be_asked_for(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=2)
    longer = tiny_run("opd", steps=4, out=done.dir, resume=True)
    assert same(longer.state, tiny_run("opd", steps=4).state)
    assert longer.summary["steps"] == 4


def test_a_folder_that_holds_a_run_is_not_overwritten(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", steps=1)
    before = snapshot(done.dir)
    with pytest.raises(
        RunError, match=r"already contains a run\. Continue it with --resume, or choose another folder"
    ):
        tiny_run("opd", steps=1, out=done.dir)
    assert snapshot(done.dir) == before


def test_there_must_be_something_to_resume(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run to resume"):
        tiny_run("opd", out=tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()


def test_a_folder_in_use_is_refused(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "used").mkdir()
    with (tmp_path / "used" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="written by another process"):
            tiny_run("opd", out=tmp_path / "used")


def test_a_run_with_staleness_resumes(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path
) -> None:
    """Not bit for bit, because the policy version of an attempt depends on timing, but complete, in order and
    within the bound of staleness.
    """
    settings = {**PLAIN, "max_staleness": 2, "task": {"kind": "outside:Chat"}}
    stop_after(2, tmp_path / "staleness", tiny.config("opd", student, teacher, **settings))
    done = tiny_run("opd", **settings, out=tmp_path / "staleness", resume=True)
    assert [row["step"] for row in done.rows("metrics")] == [1, 2, 3, 4, 5]
    assert all(0 <= row["staleness_max"] <= 2 for row in done.rows("metrics"))
    asked = [(row["step"], row["prompt"]) for row in done.rows("attempts") if row["kind"] == "attempt"]
    assert sorted(asked) == sorted((1 + i // 4, f"train-{i}") for i in range(20))


def test_lora_and_gradient_checkpointing_resume(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path
) -> None:
    settings = {**PLAIN, "learner__lora": {"rank": 2, "alpha": 4}, "learner__gradient_checkpointing": True}
    whole = tiny_run("full", **settings)
    stop_after(3, tmp_path / "lora", tiny.config("full", student, teacher, **settings))
    resumed = tiny_run("full", **settings, out=tmp_path / "lora", resume=True)
    assert same(whole.state, resumed.state)
    assert exported(whole.dir) == exported(resumed.dir)


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match=r"run is a file\. Choose another folder with --out\."):
        Run.open(load_recipe("opd", {"steps": 1}), Requirements(), Options(tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"
