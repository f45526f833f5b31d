"""Makes the program that stands in for an interpreter with vLLM, and reads what it wrote."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reflux import __version__

HERE = Path(__file__).parent
PACKAGES: tuple[Any, ...] = (None, "0.32.0", __version__, ["reflux.engines.plugin:register"])


@dataclass(frozen=True)
class FakePython:
    path: str
    folder: Path

    def calls(self) -> list[str]:
        """The paths of all requests, of all servers."""
        return [json.loads(line)["path"] for line in (self.folder / "calls").read_text().splitlines()]

    def servers(self) -> list[int]:
        """The process ids of the servers, in order."""
        return [int(line.split()[0]) for line in self._lines()]

    def processes(self) -> list[int]:
        """The process ids of servers and workers."""
        return [int(word) for line in self._lines() for word in line.split()]

    def _lines(self) -> list[str]:
        pids = self.folder / "pids"
        return pids.read_text().splitlines() if pids.exists() else []


def fake_python(
    folder: Path,
    faults: Mapping[str, Mapping[int, str]] = {},
    packages: tuple[Any, ...] = PACKAGES,
    **more: Any,
) -> FakePython:
    """faults: by path, by the number of the request to this path, from 0."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calls").touch()
    named = {path: {str(number): kind for number, kind in table.items()} for path, table in faults.items()}
    told = {"calls": str(folder / "calls"), "pids": str(folder / "pids"), "faults": named, **more}
    program = folder / "python"
    variables = {"FAKE_VLLM": json.dumps(told), "FAKE_VLLM_PACKAGES": json.dumps(packages)}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
    run = shlex.join([sys.executable, str(HERE / "fake_vllm_program.py")])
    program.write_text(f'#!/bin/sh\n{exports}exec {run} "$@"\n')
    program.chmod(0o755)
    return FakePython(str(program), folder)
