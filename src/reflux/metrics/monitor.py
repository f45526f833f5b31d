"""Raises and ends the alarms of a run (`health.py`) after each step and each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from reflux.metrics.health import ALARMS
from reflux.metrics.history import History, Row
from reflux.metrics.values import jsonable

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig
    from reflux.config.thresholds import AlarmName


class Monitor:
    """The alarms that hold now. free_bytes(): the free space in the run directory, in bytes.

    What a rule reads is in the recorded rows, so a resumed run reads them again (`replay`) and goes on with
    the same alarms.
    """

    def __init__(self, cfg: RunConfig, free_bytes: Callable[[], int]):
        self.cfg, self._free_bytes = cfg, free_bytes
        self.history = History(cfg.health.window)
        # the alarms that hold, in the order of `ALARMS`
        self.held: list[AlarmName] = []
        # a sentence on the first alarm of `stop_on` that began in this process
        self.ending: str | None = None

    @property
    def numbers(self) -> dict[str, int]:
        """For trackers: 1 for each alarm that holds, 0 for each other one."""
        return {name: int(name in self.held) for name in ALARMS if name not in self.cfg.health.skip}

    def replay(self, steps: Iterable[Row], evals: Iterable[Row]) -> None:
        """Read the rows of an earlier process. The alarms that held at its last row hold on, and are not
        raised again. `saved` comes afterwards, since a run goes on from a checkpoint.
        """
        last, held = (0, 0), ()
        for place, (rows, add) in enumerate(((steps, self._add), (evals, self.history.evaluated))):
            for row in rows:
                add(row)
                if (row["step"], place) >= last:
                    last, held = (row["step"], place), row.get("health", ())
        self.held = [name for name in ALARMS if name in held]

    def _add(self, row: Row) -> None:
        limit = self.cfg.draw(row["step"] - 1).max_positions
        self.history.add(row, limit, limit < self.cfg.evaluation_positions)

    def stepped(self, row: Row) -> list[str]:
        """Add a row of metrics.jsonl. Returns a note for each alarm that begins."""
        self._add(_as_read(row))
        return self._raised(row["step"])

    def evaluated(self, row: Row) -> list[str]:
        """Add a row of evals.jsonl. Returns a note for each alarm that begins."""
        self.history.evaluated(_as_read(row))
        return self._raised(row["step"])

    def saved(self, size_bytes: int) -> None:
        """A checkpoint was written. size_bytes: its size with the exported student."""
        self.history.unsaved_s, self.history.saved_bytes = 0.0, size_bytes

    def _raised(self, step: int) -> list[str]:
        cfg = self.cfg.health
        self.history.free_bytes = self._free_bytes()
        held, notes = [], {}
        for name, alarm in ALARMS.items():
            what = None if name in cfg.skip else alarm.rule(self.history, cfg)
            if what is not None:
                held.append(name)
                if name not in self.held:
                    notes[name] = f"step {step}: alarm {name}. {what} {alarm.look_at}"
        self.held = held
        if self.ending is None:
            self.ending = next((text for name, text in notes.items() if name in cfg.stop_on), None)
        return [*notes.values()]


def _as_read(row: Row) -> Row:
    """The row as a resumed run reads it from its file: without NaN and infinity."""
    read = jsonable(row)
    assert isinstance(read, dict)
    return read
