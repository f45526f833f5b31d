"""The folder of a run: which one, whose it is, and what of it stays where a run is resumed."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from reflux.config.recipe import RunConfig, differences, saved_table, to_table
from reflux.errors import RunError
from reflux.storage import failed_batch, files

# on resume: they touch no gradient
_MAY_DIFFER = ("steps", "save_every", "eval_every", "keep_checkpoints", "track", "threads", "evals")


def choose_folder(recipe: str, out: str | Path | None, resume: bool) -> Path:
    """The given folder, or runs/<recipe>, numbered where taken; on resume the newest of those."""
    if out is not None:
        return Path(out)
    taken = sorted(Path("runs").glob(f"{recipe}*/config.toml"), key=lambda path: path.stat().st_mtime)
    taken = [
        path.parent
        for path in taken
        if path.parent.name == recipe or path.parent.name.removeprefix(f"{recipe}-").isdigit()
    ]
    if resume:
        if not taken:
            raise RunError(
                f"there is no run of '{recipe}' under runs/ to resume; give its folder with --out."
            )
        return taken[-1]
    number = 1 + max(
        (int(path.name.removeprefix(f"{recipe}-")) if path.name != recipe else 1 for path in taken), default=0
    )
    return Path("runs") / (recipe if number == 1 else f"{recipe}-{number}")


def check_same(cfg: RunConfig, out: Path) -> None:
    """A run is resumed with the recipe it was started with, but for what touches no gradient."""
    if not (out / "config.toml").exists():
        raise RunError(
            f"there is no run to resume in {out}: it has no config.toml. Start one without --resume."
        )
    old, new = saved_table(out), to_table(cfg)
    changed = [line for line in differences(old, new) if line.split(".")[0].split(":")[0] not in _MAY_DIFFER]
    if changed:
        raise RunError(
            f"{out} was started with another recipe, so it cannot be resumed with this one:\n  "
            + "\n  ".join(changed)
        )


def take_lock(lock: IO[str], folder: Path) -> None:
    """Hold the lock file of a run's folder for as long as it is open. RunError where another process holds
    it.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RunError(
            f"{folder} is being written by another process. Wait for it, or choose another folder with --out."
        ) from None


def cut_back(folder: Path, step: int) -> None:
    """Everything on disk that came after the checkpoint goes: it will be done again."""
    for path in folder.glob("*.jsonl"):
        if not path.name.startswith(failed_batch.NAME):
            files.keep_lines(path, lambda row: row.get("step", 0) <= step)
