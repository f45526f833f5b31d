"""Checkpoints: a folder per step, in it a folder per part, which the part fills itself. The last k are kept.

A checkpoint gets its name when it is complete and on disk. If the process is killed before, the previous
checkpoint is still complete. `write` and `read` are for parts whose state is a table: tensors are stored as
safetensors, other values as JSON.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from reflux.errors import RunError
from reflux.storage.files import write_folder

State = Mapping[str, Any]
# a function that writes the state of a part into an empty folder
Fill = Callable[[Path], None]


class Kept(Protocol):
    """A part of a run that has a folder of its own in every checkpoint."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


def save(folder: Path, step: int, parts: Mapping[str, Fill], keep: int) -> Path:
    """Write checkpoints/step-N and remove all checkpoints but the last `keep`."""

    def fill(scratch: Path) -> None:
        for part, write_part in parts.items():
            (scratch / part).mkdir()
            write_part(scratch / part)

    path = of_step(folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(path, fill)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(of_step(folder, old))
    return path


def of_step(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def read(folder: Path) -> dict[str, Any]:
    """The state that `write` stored in a folder. Raises RunError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state, tensors = read_plain(folder), folder / "tensors.safetensors"
    if not tensors.exists():
        return state
    try:
        return {**state, **load_file(tensors)}
    except SafetensorError as error:
        raise _damaged(folder, error) from error


def read_plain(folder: Path) -> dict[str, Any]:
    """The values of such a state that are not tensors, without importing torch. RunError if it is damaged."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> RunError:
    return RunError(
        f"{folder} is damaged: {error}. Remove {folder.parent}; --resume then continues from the previous "
        "checkpoint, if there is one."
    )


def write(folder: Path, state: State) -> None:
    """Store a state in a folder. Raises TypeError for a value that is neither a tensor nor plain JSON."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    (folder / "state.json").write_text(json.dumps(plain))
    if tensors:
        copies = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
        save_file(copies, folder / "tensors.safetensors")
