"""Ctrl-C and SIGTERM: the step is finished, everything is saved, and the last words say how to go on."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tiny import same

RECIPE = """
base = "toy"
steps = 5000
prompts_per_step = 4
max_staleness = {max_staleness}
save_every = 1000
eval_every = 1000
threads = 1
[learner]
model = "{student}"
lr = 1e-4
[sampler]
max_tokens = 12
[teachers.main]
model = "{teacher}"
[[objectives]]
kind = "divergence"
[evals]
accuracy = "none"
agreement = "none"
teacher_accuracy = "none"
test_accuracy = "none"
"""


@pytest.mark.parametrize(("how", "max_staleness"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    student: str, teacher: str, tmp_path: Path, how: signal.Signals, max_staleness: int
) -> None:
    recipe, out = tmp_path / "slow.toml", tmp_path / "run dir"
    recipe.write_text(RECIPE.format(student=student, teacher=teacher, max_staleness=max_staleness))
    command = [sys.executable, "-m", "reflux.cli.main", "run", str(recipe), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "400"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(process, out / "metrics.jsonl")
        process.send_signal(how)
        behaviour, noise = process.communicate()
    finally:
        # where it hangs, the suite's timeout ends the test
        process.kill()
    assert process.returncode == 130, noise
    rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, rows[-1] + 1))
    assert (out / "checkpoints" / f"step-{rows[-1]}").is_dir()
    assert (out / "student" / "model.safetensors").exists()
    assert f"stopped after step {rows[-1]} of 5000; everything is saved" in behaviour
    assert f"reflux run {recipe} --out '{out}' --resume" in behaviour
    for words in ("Traceback", "was never retrieved", "was destroyed"):
        assert words not in behaviour + noise
    if max_staleness == 0:
        goes_on(recipe, out, rows[-1] + 1)


def wait_for(process: subprocess.Popen[str], path: Path, lines: int = 3) -> None:
    while not (path.exists() and len(path.read_text().splitlines()) >= lines):
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        time.sleep(0.05)


def goes_on(recipe: Path, out: Path, step: int) -> None:
    """The very recipe, one more step: as if it had never stopped."""
    import asyncio

    from conftest import Done
    from reflux.config.recipe import load_recipe
    from reflux.loop import train
    from reflux.training import Options

    cfg = load_recipe(recipe, {"steps": step})
    resumed = Done(out, asyncio.run(train(cfg, Options(out, resume=True))))
    whole = Done(out.parent / "whole", asyncio.run(train(cfg, Options(out.parent / "whole"))))
    assert same(resumed.state, whole.state)


@pytest.mark.parametrize(
    ("how", "holds"), [(signal.SIGINT, "true"), (signal.SIGTERM, "true"), (signal.SIGTERM, "false")]
)
def test_a_second_signal_ends_a_run_at_once_where_the_first_one_waits(
    student: str, teacher: str, tmp_path: Path, how: signal.Signals, holds: str
) -> None:
    """Inside a model call that holds the event loop for two minutes, and where the loop waits for what does
    not come.
    """
    recipe, out = tmp_path / "stuck.toml", tmp_path / "run"
    table = f'[learner]\nkind = "outside:StuckLearner"\nholds_the_loop = {holds}'
    recipe.write_text(
        RECIPE.format(student=student, teacher=teacher, max_staleness=0).replace("[learner]", table)
    )
    command = [sys.executable, "-m", "reflux.cli.main", "run", str(recipe), "save_every=1", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "400"}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        hears(process, "two minutes begin")
        hang_guard = threading.Timer(100, process.kill)
        hang_guard.start()
        process.send_signal(how)
        hears(process, "again to end at once")
        process.send_signal(how)
        rest = process.communicate()[0]
        hang_guard.cancel()
    assert process.returncode == (-signal.SIGTERM if how == signal.SIGTERM else 130), rest
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (out / "checkpoints" / "step-2").is_dir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def hears(process: subprocess.Popen[str], words: str) -> None:
    """Read what it prints until it has said them."""
    assert process.stdout is not None
    behaviour = ""
    for line in process.stdout:
        behaviour += line
        if words in line:
            return
    raise AssertionError(f"it ended with {process.wait()} and never said {words!r}:\n{behaviour}")


def test_signals_do_not_wait_for_the_event_loop_and_the_second_is_the_systems_own() -> None:
    """There is no await between a signal and its effect. Afterwards the earlier handlers are restored."""
    import asyncio
    from types import SimpleNamespace

    from reflux.runtime.signals import stopping_on_signals

    objective_teachers: list[str] = []
    run: Any = SimpleNamespace(stopping=False, watch=SimpleNamespace(noted=objective_teachers.append))
    before = signal.getsignal(signal.SIGTERM)

    async def main() -> None:
        of_asyncio = signal.getsignal(signal.SIGINT)
        with stopping_on_signals(run):
            os.kill(os.getpid(), signal.SIGTERM)
            assert run.stopping
            assert signal.getsignal(signal.SIGTERM) == before
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == of_asyncio

    asyncio.run(main())
    assert len(objective_teachers) == 1
    assert "again to end at once" in objective_teachers[0]
    assert signal.getsignal(signal.SIGTERM) == before
