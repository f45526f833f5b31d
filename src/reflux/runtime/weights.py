"""Handles of the weights that a learner publishes to samplers and teachers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """The adapter of a student that is trained by LoRA, in peft's names and format."""

    # the content of adapter_config.json
    config: Mapping[str, Any]
    read: Callable[[], Iterable[tuple[str, Tensor]]]


class Weights(Protocol):
    """A handle of the student's full weights at one version. It is valid until the learner's next update."""

    @property
    def version(self) -> int:
        """The number of optimiser steps and extrapolation jumps so far; below 0 for weights from
        `Services.lend`.

        Weights of the same version are equal. So a part may cache weights by version while it is open.
        """
        ...

    @property
    def path(self) -> Path | None:
        """The place of the weights on disk or in shared memory; None if they are in this process only."""
        ...

    @property
    def adapter(self) -> AdapterWeights | None:
        """The adapter alone; None where the student has none, or one that other programs cannot compute."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of each parameter, one after the other, with the model's own parameter names and
        with adapters merged. Callers must not write to the tensors.
        """
        ...


@dataclass(frozen=True)
class InMemory:
    """Weights in this process. Each call of `read` makes the tensors again, one at a time, so
    there is never a complete second copy of the model.
    """

    version: int
    read: Callable[[], Iterable[tuple[str, Tensor]]]
    path: Path | None = None
    adapter: AdapterWeights | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], version: int) -> InMemory:
        return cls(version, tensors.items)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.read())


@dataclass(frozen=True)
class Lent:
    """The same weights under another version; see `Services.lend`."""

    weights: Weights
    version: int

    @property
    def path(self) -> Path | None:
        return self.weights.path

    @property
    def adapter(self) -> AdapterWeights | None:
        return self.weights.adapter

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self.weights.tensors()
