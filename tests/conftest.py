"""Models and runs small enough for a law to be tested by running."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from device import ON_GPU

# Also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
if ON_GPU:
    # Read when cuBLAS is used first, which a test without `deterministic` may do.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Device "auto" is then the CPU on every machine.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test asserts a time. Loaded here and nowhere else: a profile holds for every module that is imported
# after it.
settings.register_profile(
    "suite", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@dataclass(frozen=True)
class Done:
    """A finished (or stopped) run on disk."""

    dir: Path
    summary: dict[str, Any]

    def rows(self, name: str) -> list[dict[str, Any]]:
        path = self.dir / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def state(self) -> dict[str, Any]:
        """Weights and moments of the last checkpoint."""
        from reflux.storage import checkpoints

        folder = self.dir / "checkpoints"
        return checkpoints.read(checkpoints.of_step(folder, checkpoints.steps(folder)[-1]) / "learner")

    @property
    def weights(self) -> dict[str, Any]:
        return {name: value for name, value in self.state.items() if name.startswith("weight/")}


@pytest.fixture(scope="session", autouse=True)
def one_way_to_compute() -> Iterator[None]:
    """Tiny products are slower on two threads, and the order of sums must not vary. Products of float32 are
    made in float32 also on a GPU.
    """
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def not_deterministic() -> Iterator[None]:
    """A run with `deterministic` sets it for the process, and some models have no such algorithms."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    import tiny

    return tiny.save(tiny.net(1, lift=1.5), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    import tiny

    # ends later than the student, so what is learnt is not to fall silent
    net = tiny.net(2, layers=2, lift=1.0)
    return tiny.save(net, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def tiny_run(student: str, teacher: str, tmp_path: Path) -> Callable[..., Done]:
    """`tiny_run("opd", steps=2, sampler__max_tokens=5)` trains a shipped recipe at tiny scale in a new folder
    (or in `out`).
    """
    import tiny
    from reflux.loop import train
    from reflux.training import Options

    numbers = count()

    def run(recipe: str = "opd", *, out: Path | None = None, resume: bool = False, **overrides: Any) -> Done:
        folder = out or tmp_path / f"run{next(numbers)}"
        cfg = tiny.config(recipe, student, teacher, **overrides)
        return Done(folder, asyncio.run(train(cfg, Options(folder, resume))))

    return run
