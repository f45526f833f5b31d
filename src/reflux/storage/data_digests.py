"""Digests of the data files of a run, so that a resumed run does not train on other prompts unnoticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from reflux.config.recipe import RunConfig
from reflux.errors import RunError
from reflux.storage import files, recipe_paths

NAME = "data.json"


def digests(cfg: RunConfig) -> dict[str, str]:
    """The digest of each single file that the recipe names, by its key in the recipe, such as "task.path"."""
    found = {}
    for keys, name in recipe_paths.named(cfg):
        path = Path(name).expanduser()
        if path.is_file():
            with path.open("rb") as file:
                found[".".join(map(str, keys))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def keep(cfg: RunConfig, out: Path) -> None:
    """Write the digests to data.json in the run directory, unless the recipe names no file."""
    if found := digests(cfg):
        files.write_text(out / NAME, json.dumps(found, indent=2) + "\n")


def check_unchanged(cfg: RunConfig, out: Path) -> None:
    """Raise RunError if a file has another content than when the run in `out` was started."""
    if not (out / NAME).exists():
        return
    try:
        before = json.loads((out / NAME).read_text())
    except ValueError as error:
        raise RunError(f"{out / NAME} is damaged: {error}. Remove it, then resume.") from error
    changed = [key for key, digest in digests(cfg).items() if before.get(key, digest) != digest]
    if changed:
        raise RunError(
            f"the content of {' and '.join(changed)} has changed since the run in {out} was started, so it "
            "would go on with other data. Restore the files, or start a new run with another --out."
        )
