"""The state of every part in one folder per step: tensors as safetensors, the rest as JSON. The last k are kept.

A checkpoint has its name only once it is complete and on disk, so a kill at any moment leaves the one before it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflux.files import write_folder

State = Mapping[str, Any]


def save(folder: Path, step: int, states: Mapping[str, State], keep: int) -> Path:
    """Write checkpoints/step-N and drop all but the last `keep`."""

    def fill(scratch: Path) -> None:
        for part, state in states.items():
            _write(scratch, part, state)

    path = folder / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    write_folder(path, fill)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old}")
    return path


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints, rising."""
    names = [path.name.removeprefix("step-") for path in folder.glob("step-*")]
    return sorted(int(name) for name in names if name.isdigit())


def load(folder: Path, step: int) -> dict[str, dict[str, Any]]:
    """The states of a checkpoint, by part."""
    from safetensors.torch import load_file

    path = folder / f"step-{step}"
    states = {file.stem: json.loads(file.read_text()) for file in path.glob("*.json")}
    for file in path.glob("*.safetensors"):
        states.setdefault(file.stem, {}).update(load_file(file))
    return states


def load_plain(folder: Path, step: int, part: str) -> dict[str, Any]:
    """What a part saved besides tensors."""
    return json.loads((folder / f"step-{step}" / f"{part}.json").read_text())


def _write(scratch: Path, part: str, state: State) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {key: value.detach().contiguous().cpu() for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    (scratch / f"{part}.json").write_text(json.dumps(plain))
    if tensors:
        save_file(tensors, scratch / f"{part}.safetensors")
