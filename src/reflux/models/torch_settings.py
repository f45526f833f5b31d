"""The settings of torch that hold for the whole process."""

from __future__ import annotations

import os
from collections.abc import Iterator

from reflux.errors import ConfigError

# cuBLAS reads it when it is used first. With this value it computes a product in one way only.
WORKSPACE, ONE_WAY = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


def prepare_torch(threads: int, deterministic: bool) -> None:
    """Apply the settings of a run. threads 0 keeps the default of torch.

    deterministic: True if torch uses only deterministic algorithms, so that a run on one GPU repeats bit for
    bit. ConfigError where this process has used the GPU without them.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    if not deterministic:
        return
    if torch.cuda.is_initialized() and WORKSPACE not in os.environ:
        raise ConfigError(
            "deterministic = true: this process has used the GPU before this run, so cuBLAS can no longer be "
            f"made deterministic. Set the environment variable {WORKSPACE}={ONE_WAY} before Python starts."
        )
    os.environ.setdefault(WORKSPACE, ONE_WAY)
    torch.use_deterministic_algorithms(True)


def crowding() -> Iterator[str]:
    """A note if the load of the last minute leaves free less than half of the cores that the threads of torch
    want. None is given where the work is done on a GPU.

    At the end of each product the fast threads wait for the slow ones and keep their cores busy meanwhile. So
    with fewer free cores than threads a step can take longer than with one thread.
    """
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    # Windows does not know its load.
    busy = os.getloadavg()[0] if os.name == "posix" else 0.0
    if threads > 1 and not torch.cuda.is_available() and cores - busy < threads / 2:
        yield (
            f"In the last minute about {busy:.1f} of {cores} cores were busy, and torch uses {threads} "
            "threads. If other programs keep the cores busy, the threads wait for each other, and "
            "threads = 1 may be faster."
        )
