"""Weights on their way from the learner to those who follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Weights(Protocol):
    """A handle on the student's full weights at one version; it is good until the learner moves again."""

    @property
    def version(self) -> int:
        """Optimiser steps and jumps done; below 0 for weights that are lent (`Services.lend`).

        Weights of one version are the same, so who is told of them may keep them by it, from its opening to
        its closing.
        """
        ...

    @property
    def path(self) -> Path | None:
        """Where they lie on disk or in shared memory; None where they are in this process alone."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) one after the other, by the model's own names, adapters merged; not to be written
        to.
        """
        ...


@dataclass(frozen=True)
class InMemory:
    """Weights in this process. `read` makes the tensors anew at each call, one at a time, so no second copy
    of the model is ever whole.
    """

    version: int
    read: Callable[[], Iterable[tuple[str, Tensor]]]
    path: Path | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], version: int) -> InMemory:
        return cls(version, tensors.items)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.read())


@dataclass(frozen=True)
class Lent:
    """Weights under a version of their own."""

    weights: Weights
    version: int

    @property
    def path(self) -> Path | None:
        return self.weights.path

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self.weights.tensors()
