"""Digests of the data files and tokenizers of a run, so that a resumed run does not train on other prompts
unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from reflux.config.recipe import RunConfig
from reflux.errors import RunError
from reflux.storage import files, recipe_paths

NAME = "data.json"
# What makes tokens from prompts, in the folder of a model.
_TOKENIZER = ("tokenizer*", "chat_template*", "special_tokens_map.json", "vocab.*", "merges.txt")
# Endings of data in a folder; other files there, such as images, may be many and large.
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".gz", ".bz2", ".zst", ".lz4")


def digests(cfg: RunConfig) -> dict[str, str]:
    """The digest of each file and folder that the recipe names, by its key in the recipe, such as
    "task.path". Of the folder of a model, only the files of its tokenizer count.
    """
    found = {}
    for keys, name in recipe_paths.named(cfg):
        path = Path(name).expanduser()
        read = [path] if path.is_file() else sorted(_of_task(path) if keys[0] == "task" else _of_model(path))
        if len(read) == 1 and read[0] == path:
            found[".".join(map(str, keys))] = _digest(path)
        elif read:
            lines = [f"{file.relative_to(path)} {_digest(file)}\n" for file in read]
            found[".".join(map(str, keys))] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return found


def _of_task(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.suffix.lower() in _DATA and file.is_file())


def _of_model(folder: Path) -> Iterator[Path]:
    inner = folder / "student" if (folder / "student").is_dir() else folder
    return (file for pattern in _TOKENIZER for file in inner.glob(pattern) if file.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            "would go on with other prompts. Restore the files (of a model, its tokenizer), or start "
            "a new run with another --out."
        )
