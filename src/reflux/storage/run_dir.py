"""The run directory: choose it, check its recipe, lock it, and cut its files back on resume."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

import tomli_w

from reflux.config.recipe import RunConfig, differences, saved_table
from reflux.errors import RunError
from reflux.runtime.positions import Positions
from reflux.storage import (
    attempt_log,
    checkpoints,
    data_digests,
    failed_batch,
    files,
    in_flight,
    recipe_paths,
)

# keys that may differ on resume, because they do not change any gradient
_MAY_DIFFER = (
    "steps",
    "save_every",
    "eval_every",
    "keep_checkpoints",
    "cluster",
    "track",
    "threads",
    "evals",
    "skip_checks",
    "health",
    "trace",
)

# the files and folders that hold what a run has made
_MADE = (attempt_log.NAME, in_flight.NAME, "checkpoints", "evals.jsonl", "metrics.jsonl", "student")


def choose_folder(recipe: str, out: str | Path | None, resume: bool) -> Path:
    """The folder `out` if it is given, else runs/<recipe>, with a number added if that exists. If `resume`,
    the newest of the folders runs/<recipe>*. Raises RunError if there is none to resume.
    """
    if out is not None:
        return Path(out)
    taken = sorted(Path("runs").glob(f"{recipe}*/config.toml"), key=lambda path: path.stat().st_mtime)
    taken = [
        path.parent
        for path in taken
        if path.parent.name == recipe or path.parent.name.removeprefix(f"{recipe}-").isdigit()
    ]
    if resume:
        # A run that was refused before its first step has made nothing, so there is nothing to continue.
        taken = [folder for folder in taken if _holds_a_run(folder)]
        if not taken:
            raise RunError(
                f"there is no run of '{recipe}' under runs/ to resume. Give the run's folder with --out."
            )
        return taken[-1]
    number = 1 + max(
        (int(path.name.removeprefix(f"{recipe}-")) if path.name != recipe else 1 for path in taken), default=0
    )
    return Path("runs") / (recipe if number == 1 else f"{recipe}-{number}")


def refuse_started(out: Path) -> None:
    """Raise RunError if the folder `out` holds a run. A run that was refused before its first step has only
    its config, and another one may take its place.
    """
    if _holds_a_run(out):
        raise RunError(
            f"{out} already contains a run. Continue it with --resume, or choose another folder with --out."
        )


def _holds_a_run(out: Path) -> bool:
    return (out / "config.toml").exists() and any((out / name).exists() for name in _MADE)


def check_place(out: Path) -> None:
    """Raise RunError unless the folder `out` can be written to, or can be made. Nothing is made."""
    above = out
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if os.path.islink(above) and not os.path.exists(above):
        raise _unusable(out, f"{above} is a link to something that does not exist")
    if not os.path.isdir(above):
        raise _unusable(out, f"{above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise _unusable(out, f"there is no permission to write to {above}")


def make(out: Path) -> None:
    """Make the run directory `out` unless it exists. Raises RunError if that is not possible."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(out, error.strerror or str(error)) from error


def _unusable(out: Path, why: str) -> RunError:
    return RunError(f"{out} cannot be the output folder: {why}. Choose another folder with --out.")


def write_recipe(cfg: RunConfig, out: Path) -> None:
    """Write config.toml, with absolute paths, and the digests of the data files. A file with the same content
    is not touched.
    """
    data_digests.keep(cfg, out)
    files.write_text(out / "config.toml", tomli_w.dumps(recipe_paths.absolute(cfg)))


def check_same(cfg: RunConfig, out: Path) -> None:
    """Raise RunError unless the run directory `out` was started with the same recipe and the same data files.
    Keys that do not change any gradient may differ.
    """
    if not (out / "config.toml").exists():
        raise RunError(
            f"there is no run to resume in {out}: it has no config.toml. Start one without --resume."
        )
    old, new = saved_table(out), recipe_paths.absolute(cfg)
    changed = [line for line in differences(old, new) if line.split(".")[0].split(":")[0] not in _MAY_DIFFER]
    if changed:
        raise RunError(
            f"{out} was started with another recipe, so it cannot be resumed with this one:\n  "
            + "\n  ".join(changed)
        )
    data_digests.check_unchanged(cfg, out)


def take_lock(lock: IO[str], folder: Path) -> str | None:
    """Lock the run directory `folder` until the file `lock` is closed. Raises RunError if another process
    holds the lock. Returns a note if the file system has no locks, as some network file systems.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise RunError(
            f"{folder} is being written by another process. Wait for it, or choose another folder with --out."
        ) from None
    except OSError as error:
        return (
            f"{folder} is on a file system without file locks ({error.strerror}), so a second process that "
            "writes to it is not noticed. Start no other run in this folder."
        )
    return None


def positions(folder: Path) -> Positions:
    """Those of the newest checkpoint. RunError if it is damaged."""
    saved = checkpoints.steps(folder / "checkpoints")
    if not saved:
        return Positions.after(0)
    newest = checkpoints.of_step(folder / "checkpoints", saved[-1])
    return Positions.from_state(checkpoints.read_plain(newest / "positions"))


def cut_back(folder: Path, step: int) -> None:
    """Remove from the files of the run all lines of steps after `step`, the step of the checkpoint. The
    resumed run does these steps again.
    """
    attempt_log.cut_back(folder / attempt_log.NAME, step)
    for path in folder.glob("*.jsonl"):
        if path.name != attempt_log.NAME and not path.name.startswith(failed_batch.NAME):
            files.keep_lines(path, lambda row: row.get("step", 0) <= step)
