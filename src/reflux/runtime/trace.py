"""Writes trace.json: when each part worked, for trace viewers such as Perfetto and chrome://tracing.

The file is in the Chrome trace event format, as a JSON array with one event per line. A line is written as
soon as its span has ended. If a run is killed, the file lacks only its closing bracket, which viewers do not
need. Where a file exists, as after a resume, the events go on behind the old ones: work that a resumed run
does again was done twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# the tracks in the order in which a viewer shows them
TRACKS = ("steps", "loop", "learner", "sampler", "teachers", "rewards", "environments", "groups")
# the most rows of one track; viewers sort rows by their number
_MOST = 10_000


@dataclass
class _Lane:
    """A row of the viewer. Two spans of one lane do not overlap, or one is inside the other."""

    number: int
    # the end of its last span, in seconds of time.perf_counter
    until: float = 0.0
    # spans that are open in it
    open: int = 0


class Trace:
    """An open trace file, for calls from any thread. name: of the run, as the viewer shows it."""

    def __init__(self, path: Path, name: str):
        self._lock, self._name = threading.Lock(), name
        if path.exists():
            _cut(path)
        # unbuffered, so that each line is written whole
        self._file = path.open("ab", buffering=0)
        self._begun = self._file.tell() > 0
        # event times are since 1970, because a resumed run has another origin of perf_counter
        self._origin = time.time() - time.perf_counter()
        self._lanes: dict[str, list[_Lane]] = {track: [] for track in TRACKS}
        # by caller and track: the lane in which the caller has open spans
        self._open: dict[tuple[int, str], _Lane] = {}

    @contextmanager
    def span(self, track: str, name: str, what: Mapping[str, Any]) -> Iterator[None]:
        """A span that lasts as long as the block. Spans of one task (or thread) in one track are nested.

        track: one of TRACKS. what: values that the viewer shows for the span, such as the step.
        """
        caller = _caller(), track
        began = time.perf_counter()
        with self._lock:
            lane = self._open.get(caller) or self._free(track, began)
            self._open[caller] = lane
            lane.open += 1
        try:
            yield
        finally:
            ended = time.perf_counter()
            with self._lock:
                lane.open, lane.until = lane.open - 1, ended
                if not lane.open:
                    del self._open[caller]
                self._span(lane, name, began, ended, what)

    def add(self, track: str, name: str, began: float, ended: float, what: Mapping[str, Any]) -> None:
        """A span that has ended. began, ended: in seconds of time.perf_counter."""
        with self._lock:
            lane = self._free(track, began)
            lane.until = ended
            self._span(lane, name, began, ended, what)

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.write(b"\n]\n" if self._begun else b"[\n]\n")
                self._file.close()

    def _free(self, track: str, began: float) -> _Lane:
        """The first lane of the track without a span at this time, or after it."""
        lanes = self._lanes[track]
        for lane in lanes:
            if not lane.open and lane.until <= began:
                return lane
        if not any(self._lanes.values()):
            self._write({"name": "process_name", "ph": "M", "args": {"name": self._name}}, 0)
        lanes.append(lane := _Lane(_MOST * TRACKS.index(track) + len(lanes) + 1))
        shown = track if len(lanes) == 1 else f"{track} {len(lanes)}"
        self._write({"name": "thread_name", "ph": "M", "args": {"name": shown}}, lane.number)
        order = {"sort_index": lane.number}
        self._write({"name": "thread_sort_index", "ph": "M", "args": order}, lane.number)
        return lane

    def _span(self, lane: _Lane, name: str, began: float, ended: float, what: Mapping[str, Any]) -> None:
        # Both ends are rounded in the same way, so rounding keeps what is inside what.
        first, last = (int((self._origin + at) * 1e6) for at in (began, ended))
        shown = {key: value for key, value in what.items() if value is not None}
        self._write({"name": name, "ph": "X", "ts": first, "dur": last - first, "args": shown}, lane.number)

    def _write(self, event: dict[str, Any], lane: int) -> None:
        # After the end of the run a thread may still finish its work.
        if not self._file.closed:
            line = json.dumps({**event, "pid": os.getpid(), "tid": lane})
            self._file.write(f"{',' if self._begun else '['}\n{line}".encode())
            self._begun = True


def _caller() -> int:
    """A number of the asyncio task that calls, or of the thread where there is none."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident() if task is None else id(task)


def _cut(path: Path) -> None:
    """Remove the end of an older file: its closing bracket, and a line that was not written to its end."""
    data = path.read_bytes()
    end = len(data.rstrip(b"]\n"))
    while end and not _is_event(data[data.rfind(b"\n", 0, end) + 1 : end]):
        end = max(0, data.rfind(b"\n", 0, end))
    os.truncate(path, len(data[:end].rstrip(b",")))


def _is_event(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.rstrip(b",")), dict)
    except ValueError:
        return False
