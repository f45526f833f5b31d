"""Records the results of steps and evaluations: in the files of a run, for its tracker and for its watch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reflux.metrics.trackers import NoTracker, Tracker
from reflux.runtime.watch import Watch
from reflux.storage import files


class Journal:
    """The record of one run in `folder`. tracker: gets the results too, once it is opened."""

    def __init__(self, folder: Path, watch: Watch):
        self.folder, self.watch = folder, watch
        self.tracker: Tracker = NoTracker()

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a line to the file `name` of the run."""
        files.append_lines(self.folder / name, [dict(row)])

    def stepped(self, metrics: dict[str, Any]) -> None:
        """Record the metrics of an optimiser step, with its number as `step`."""
        self.append("metrics.jsonl", metrics)
        self.tracker.log(metrics, metrics["step"])
        self.watch.stepped(metrics)
        if not metrics["tokens_trained"]:
            self.watch.noted(
                f"step {metrics['step']}: no attempt has both a weight above 0 and a target or an advantage "
                "offset, so the weights did not change"
            )

    def evaluated(self, results: dict[str, Any]) -> None:
        """Record the results of the evaluations at a step, whose number is `step`."""
        self.append("evals.jsonl", results)
        self.tracker.log({key: value for key, value in results.items() if key != "step"}, results["step"])
        self.watch.evaluated(results)

    def close(self) -> None:
        self.tracker.close()
