"""Write the attempts of one group to a file, and read them again with all that was sampled and judged.

A file holds the arrays as safetensors, and everything else as JSON in the file's metadata. The prompt is not
in it: the task gives it again. Answers of teachers and credits are not in it either: they are made again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reflux.metrics.values import jsonable
from reflux.types import (
    Attempt,
    FlowRollout,
    Group,
    Prompt,
    Reward,
    Rollout,
    SampledTarget,
    TokenRollout,
    TopKTarget,
    VelocityTarget,
)

_ROLLOUTS = {kind.__name__: kind for kind in (TokenRollout, FlowRollout)}
_TARGETS = {kind.__name__: kind for kind in (TopKTarget, SampledTarget, VelocityTarget)}
_GROUP = "attempts"


def write(path: Path, group: Group, told: Mapping[str, Any]) -> None:
    """Write a group under a temporary name and rename the file. After a power cut the file may be damaged,
    because it is not synced. told: plain JSON values for `read_told`. TypeError for a rollout of an unknown
    class.
    """
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    lines = [_plain(attempt.rollout, f"{place}/", arrays) for place, attempt in enumerate(group)]
    for line, attempt in zip(lines, group, strict=True):
        line["reward"] = None if attempt.reward is None else dataclasses.asdict(attempt.reward)
    metadata = {_GROUP: json.dumps(jsonable(lines)), "told": json.dumps(dict(told))}
    path.parent.mkdir(exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata))
    scratch.replace(path)


def read_told(path: Path) -> dict[str, Any] | None:
    """What `write` was told; None for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            return json.loads(file.metadata()["told"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return None


def read(path: Path, prompt: Prompt, asked_step: int) -> Group:
    """The attempts that `write` wrote, at this prompt."""
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        lines = json.loads(file.metadata()[_GROUP])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    group = []
    for place, line in enumerate(lines):
        reward = line.pop("reward")
        rollout = _made(line, f"{place}/", arrays, {"prompt": prompt})
        group.append(Attempt(rollout, None if reward is None else Reward(**reward), asked_step=asked_step))
    return group


def _plain(value: Any, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a rollout or a target that JSON can hold. Its arrays are added to `arrays`."""
    if type(value).__name__ not in {**_ROLLOUTS, **_TARGETS}:
        raise TypeError(f"attempts of class {type(value).__name__} cannot be written to a file")
    line: dict[str, Any] = {"class": type(value).__name__}
    for entry in dataclasses.fields(value):
        held = getattr(value, entry.name)
        if isinstance(held, np.ndarray):
            arrays[prefix + entry.name] = held
        elif type(held) in _TARGETS.values():
            line[entry.name] = _plain(held, f"{prefix}{entry.name}/", arrays)
        elif not isinstance(held, Prompt):
            line[entry.name] = held
    return line


def _made(
    line: dict[str, Any], prefix: str, arrays: Mapping[str, np.ndarray], more: Mapping[str, Any]
) -> Any:
    """The rollout or target that `_plain` took apart. more: further fields."""
    kind: type[Rollout] | type[Any] = {**_ROLLOUTS, **_TARGETS}[line["class"]]
    fields: dict[str, Any] = dict(more)
    for entry in dataclasses.fields(kind):
        held = line.get(entry.name)
        if prefix + entry.name in arrays:
            fields[entry.name] = arrays[prefix + entry.name]
        elif isinstance(held, dict) and held.get("class") in _TARGETS:
            fields[entry.name] = _made(held, f"{prefix}{entry.name}/", arrays, {})
        elif isinstance(held, list):
            fields[entry.name] = tuple(held)
        elif entry.name in line:
            fields[entry.name] = held
    return kind(**fields)
