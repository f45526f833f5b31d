"""python tests/architectures/matrix.py [--write] [NAME ...]: try every model type, or those named.

Prints one row for each, and fails where docs/what_runs.md says something else. With `--write` it writes these
rows to the page. Each type is tried in a process of its own with a time limit, so a crash or a hang is a row.
"""

from __future__ import annotations

import argparse
import difflib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import torch  # noqa: E402

from architectures.outcome import WRONG, Outcome, outcome  # noqa: E402
from architectures.page import PAGE, page, recorded  # noqa: E402
from architectures.tiny_models import names  # noqa: E402

LIMIT_S = 300
# forked, so that torch and transformers are imported once
FORK = multiprocessing.get_context("fork")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    if unknown := sorted(set(asked.names) - set(names())):
        parser.error(f"there is no row called {', '.join(unknown)}; docs/what_runs.md lists all names")
    torch.set_num_threads(1)
    rows = {row.name: row for row in tried(asked.names or names(), asked.processes)}
    known = rows if not asked.names else {**recorded(), **rows}
    return (written if asked.write else compared)(page([known[name] for name in names() if name in known]))


def written(text: str) -> int:
    PAGE.write_text(text)
    print(f"wrote {PAGE}")
    return 0


def compared(text: str) -> int:
    """1 where the page differs from what came."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    different = list(difflib.unified_diff(lines, text.splitlines(), "recorded", "now", lineterm="", n=0))
    print("\n".join(different) or f"{PAGE.name} says the same")
    return int(bool(different))


def tried(todo: Sequence[str], processes: int) -> list[Outcome]:
    """The outcomes in the order of the names, each from a process of its own."""
    left, running, done = list(reversed(todo)), [], {}
    while left or running:
        while left and len(running) < processes:
            running.append(Trial(left.pop()))
        wait([trial.channel for trial in running], timeout=1)
        for trial in [trial for trial in running if trial.over]:
            running.remove(trial)
            done[trial.name] = trial.end()
            print(done[trial.name].line, flush=True)
    return [done[name] for name in todo]


class Trial:
    """A model type in a process of its own."""

    def __init__(self, name: str):
        self.name, self.deadline = name, time.monotonic() + LIMIT_S
        self.channel, theirs = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=report, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def over(self) -> bool:
        return self.channel.poll() or time.monotonic() > self.deadline

    def end(self) -> Outcome:
        try:
            if not self.channel.poll():
                return Outcome(self.name, WRONG, note=f"no end after {LIMIT_S} s")
            return self.channel.recv()
        except EOFError:
            self.process.join()
            return Outcome(self.name, WRONG, note=f"the process ended with {self.process.exitcode}")
        finally:
            self.process.kill()
            self.process.join()


def report(name: str, channel: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        channel.send(outcome(name, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
