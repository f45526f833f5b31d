"""Killed runs: `python kill_driver.py STUDENT TEACHER FOLDER` starts one run per kill point and kills it
there with SIGKILL.

Everything is imported once. Each run is a fork that has not computed anything yet. Prints how each run ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401  resolved before the forks

import tiny
from reflux.extrapolation import score
from reflux.learners import hf_engine
from reflux.loop import train
from reflux.storage import checkpoints, files
from reflux.training import Options

SETTINGS: dict[str, Any] = {
    "steps": 5, "save_every": 2, "eval_every": 2, "group_size": 2, "prompts_per_step": 3,
    "keep_checkpoints": 1, "evals__accuracy": {"problems": 3}, "rewards": {"verifier": {}},
    "credit": {"group_advantage": {}, "prefix": {"length": 6}},
    "learner__lr": {"kind": "cosine", "peak": 1e-3, "warmup": 1}, "evals__foresight": {},
    "extrapolation": {"kind": "extrapolate", "prompts": 4, "accept": "not_worse"},
}  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_first_file() -> None:
    """Kill in the checkpoint of step 4, when one part is written and the others are not."""
    write = checkpoints.write

    def broken(folder: Path, state: Any) -> None:
        write(folder, state)
        if "step-4" in folder.parent.name:
            die()

    checkpoints.write = broken


def around_folder(name: str, where: str) -> Callable[[], None]:
    """Kill before or after the folder `name` gets its name, or in the middle of the rename."""

    def patch() -> None:
        plain = files.write_folder

        def broken(path: Path, fill: Callable[[Path], None]) -> None:
            late = path.name == name and (
                name != "student" or (path.parent / "checkpoints" / "step-2").exists()
            )
            if late and where == "swap":
                # the old folder no longer has its name, and the new one does not have it yet
                path.rename(path.with_name(f".{path.name}.old"))
                die()
            plain(path, (lambda scratch: (fill(scratch), die())) if late and where == "before" else fill)  # type: ignore[arg-type,return-value]
            if late:
                die()

        files.write_folder = checkpoints.write_folder = broken

    return patch


def half_a_line(name: str) -> Callable[[], None]:
    """Kill in the middle of a line of step 4, in the middle of a character."""

    def patch() -> None:
        plain = files.append_lines

        def broken(path: Path, rows: list[dict[str, Any]]) -> None:
            if path.name == name and rows[0]["step"] == 4:
                with path.open("ab") as file:
                    file.write(b'{"step": 4, "text": "\xc3')
                die()
            plain(path, rows)

        files.append_lines = broken

    return patch


def pruning() -> None:
    shutil.rmtree = lambda path, **_: (
        (next(Path(path).glob("*"), Path("none")).unlink(missing_ok=True), die())
        if "step-2" in str(path)
        else None
    )  # type: ignore[assignment]


def moving() -> None:
    """Kill in the optimiser step, after the gradients."""
    gradients = hf_engine.HFLearner.gradients

    def broken(self: Any, *args: Any) -> Any:
        found = gradients(self, *args)
        if self.updates == 3:
            die()
        return found

    hf_engine.HFLearner.gradients = broken  # type: ignore[method-assign]


def searching() -> None:
    """Kill in the search after step 4, with a candidate's weights in the learner and in the sampler."""
    call, asked = score.Scorer.__call__, []

    async def broken(self: Any, evaluation: Any, rng: int = 0) -> float:
        asked.append(evaluation.step)
        found = await call(self, evaluation, rng)
        if asked.count(3) == 3:
            die()
        return found

    score.Scorer.__call__ = broken  # type: ignore[method-assign]


POINTS: dict[str, Callable[[], None]] = {
    "first_file": after_first_file,
    "checkpoint_unnamed": around_folder("step-4", "before"),
    "checkpoint_named": around_folder("step-4", "after"),
    "final_checkpoint_named": around_folder("step-5", "after"),
    "student_unnamed": around_folder("student", "before"),
    "student_swapping": around_folder("student", "swap"),
    "student_named": around_folder("student", "after"),
    "metrics_line": half_a_line("metrics.jsonl"),
    "attempts_line": half_a_line("attempts.jsonl"),
    "evals_line": half_a_line("evals.jsonl"),
    "pruning": pruning,
    "moving": moving,
    "searching": searching,
    "searches_line": half_a_line("searches.jsonl"),
}


def main(student: str, teacher: str, folder: Path) -> None:
    cfg = tiny.config("rl_opd", student, teacher, **SETTINGS)
    children = {name: _fork(patch, cfg, folder / name) for name, patch in POINTS.items()}
    print(
        json.dumps(
            {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for name, child in children.items()}
        )
    )


def _fork(patch: Callable[[], None], cfg: Any, folder: Path) -> int:
    child = os.fork()
    if not child:
        try:
            patch()
            asyncio.run(train(cfg, Options(folder)))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    return child


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
