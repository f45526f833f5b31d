"""Send metrics to a tracker if the recipe names one. Otherwise nothing leaves the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from reflux.config.recipe import Track
from reflux.errors import ConfigError
from reflux.metrics.values import jsonable


class Tracker(Protocol):
    def log(self, values: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested dictionaries as one flat dictionary, with keys joined by slashes. Lists and texts
    are left out. prefix: comes before each key.
    """
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = float(value)
    return found


class NoTracker:
    def log(self, values: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        for name, value in flat(dict(jsonable(values))).items():  # type: ignore[call-overload]
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Hosted:
    """wandb or trackio, which has the same three functions."""

    def __init__(self, module: Any, track: Track, config: Mapping[str, Any]):
        self._module = module
        module.init(project=track.project, name=track.name, config=dict(config))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._module.log(flat(dict(jsonable(values))), step=step)  # type: ignore[call-overload]

    def close(self) -> None:
        self._module.finish()


def open_tracker(track: Track, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """The tracker that `track.kind` of the recipe names. folder: the run directory. config: the recipe, which
    the tracker stores. Raises ConfigError if the package of the tracker is not installed.
    """
    if track.kind == "none":
        return NoTracker()
    try:
        if track.kind == "tensorboard":
            return TensorBoard(folder)
        import importlib

        return Hosted(importlib.import_module(track.kind), track, config)
    except ImportError as error:
        raise ConfigError(
            f"track.kind: '{track.kind}' is not installed ({error}). Install it with: pip install "
            "'reflux[track]'"
        ) from error
