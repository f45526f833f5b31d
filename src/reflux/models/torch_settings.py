"""The settings of torch that hold for the whole process."""

from __future__ import annotations

import os

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
