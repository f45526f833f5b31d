"""Evaluations see the averaged student, in the sampler and in the learner, from the first to the last;
afterwards the live one is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from reflux.evals import at_step
from reflux.runtime.weights import InMemory, Weights


class Student:
    """Learner and sampler in one: which weights it has, and which were published last."""

    version = 3

    def __init__(self, average: bool):
        self.average, self.weights, self.published = average, "live", "live"
        # published
        self.versions: list[int] = []

    @property
    def access(self) -> Student:
        return self

    @contextmanager
    def at_mean(self) -> Iterator[bool]:
        self.weights = "mean" if self.average else "live"
        try:
            yield self.average
        finally:
            self.weights = "live"

    def publish(self, *published: Any) -> Any:
        """Of a learner, the weights of now; of a sampler, those it is given."""
        return (
            self._follow(*published)
            if published
            else InMemory(self.version, lambda: {"name": self.weights}.items())
        )  # type: ignore

    async def _follow(self, weights: Weights, step: int) -> None:
        self.published = dict(weights.tensors())["name"]  # type: ignore[assignment]
        self.versions.append(weights.version)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_average_is_held_while_evaluations_run_and_no_longer(
    tmp_path: Path, average: bool, fails: bool
) -> None:
    seen: list[tuple[str, str]] = []

    class Looks:
        asked = "always"

        def __init__(self, fails: bool):
            self.fails = fails

        async def __call__(self, evaluation: Any, source: Any) -> dict[str, Any]:
            seen.append((source.access.weights, evaluation.sampler.published))
            if self.fails:
                raise OSError("the evaluation is broken")
            return {}

    evals: Any = {"first": Looks(False), "second": Looks(fails)}
    student: Any = Student(average)
    asked: Any = SimpleNamespace(sampler=student, services=tiny.services(), step=3)
    evaluated = at_step.results(evals, asked, student, steps=9, seen=(), folder=lambda name: tmp_path / name)
    if fails:
        with pytest.raises(OSError, match="broken"):
            asyncio.run(evaluated)
    else:
        asyncio.run(evaluated)
    assert seen == [("mean", "mean") if average else ("live", "live")] * 2
    assert (student.weights, student.published) == ("live", "live")
    # the average is lent, under a version of its own
    assert student.versions == ([-1, 3] if average else [])
