"""Records the results of steps and evaluations: in the files of a run, for its tracker and for its watch. It
raises the alarms of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reflux.metrics.monitor import Monitor
from reflux.metrics.trackers import NoTracker, Tracker
from reflux.runtime.watch import Watch
from reflux.storage import checkpoints, files

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig


class Journal:
    """The record of one run in `folder`. tracker: gets the results too, once it is opened."""

    def __init__(self, folder: Path, watch: Watch, cfg: RunConfig):
        self.folder, self.watch = folder, watch
        self.monitor = Monitor(cfg, lambda: shutil.disk_usage(folder).free)
        self.tracker: Tracker = NoTracker()

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a line to the file `name` of the run."""
        files.append_lines(self.folder / name, [dict(row)])

    def resumed(self, step: int) -> None:
        """Read what an earlier process has recorded up to the checkpoint of `step`."""
        steps, evals = (files.read_lines(self.folder / f"{name}.jsonl") for name in ("metrics", "evals"))
        self.monitor.replay(steps, evals)
        if step:
            self.saved(step)

    def saved(self, step: int) -> None:
        """The checkpoint of `step` and the student are on disk."""
        kept = checkpoints.of_step(self.folder / "checkpoints", step)
        self.monitor.saved(files.size_bytes(kept) + files.size_bytes(self.folder / "student"))

    def stepped(self, metrics: dict[str, Any]) -> None:
        """Record the metrics of an optimiser step, with its number as `step`."""
        notes = self.monitor.stepped(metrics)
        metrics["health"] = self.monitor.held
        self.append("metrics.jsonl", metrics)
        self.tracker.log({**metrics, "health": self.monitor.numbers}, metrics["step"])
        self.watch.stepped(metrics)
        if not metrics["tokens_trained"]:
            self.watch.noted(
                f"step {metrics['step']}: no attempt has both a weight above 0 and a target or an advantage "
                "offset, so the weights did not change"
            )
        self._tell(notes)

    def evaluated(self, results: dict[str, Any]) -> None:
        """Record the results of the evaluations at a step, whose number is `step`."""
        notes = self.monitor.evaluated(results)
        if self.monitor.held:
            results["health"] = self.monitor.held
        self.append("evals.jsonl", results)
        self.tracker.log({key: value for key, value in results.items() if key != "step"}, results["step"])
        self.watch.evaluated(results)
        self._tell(notes)

    def _tell(self, notes: list[str]) -> None:
        for note in notes:
            self.watch.noted(note)

    def close(self) -> None:
        self.tracker.close()
