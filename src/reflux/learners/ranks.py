"""How the processes that train one student work together. A process is called a rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from reflux.loss.batch import one_rank
from reflux.storage import checkpoints

if TYPE_CHECKING:
    from reflux.loss.batch import Item
    from reflux.models.text import Model
    from reflux.models.text_rows import TextRows

Value = TypeVar("Value")


class Ranks(Protocol):
    """What differs between a learner in one process and one whose weights are divided among several. Every
    method that does not only read is called by all ranks at the same time.
    """

    # True in the process that runs the loop
    leads: bool
    # True if several processes share the student's weights
    shared: bool

    def divide(self, model: Model, narrow: bool) -> None:
        """Take the weights of a loaded model, before the optimiser is made. narrow: True if the products are
        made in bfloat16.
        """
        ...

    def states(self, model: Model, texts: TextRows, rows_N: Tensor) -> Tensor:
        """h_NH: the hidden states of the texts at these positions."""
        ...

    def gather(self) -> None:
        """Make the embeddings and the output head whole, until `rest` or the next backward pass."""
        ...

    def rest(self) -> None:
        """Give back the memory that `gather` took."""
        ...

    def passes(self, parts: Iterator[list[Item]]) -> Iterator[list[Item]]:
        """The micro-batches of this rank. Empty lists follow where another rank has more."""
        ...

    def counts(self, counts_C: np.ndarray) -> np.ndarray:
        """Counts, added up over the ranks."""
        ...

    def together(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of the ranks."""
        ...

    def add_up(self, parameters: Iterable[Tensor]) -> None:
        """Make the gradients of the parameters the sums over all ranks, after the last backward pass."""
        ...

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write a table of tensors and plain values into a folder."""
        ...

    def load(self, folder: Path, like: Mapping[str, Tensor]) -> dict[str, Any]:
        """The table that `save` wrote. like: the parameters by name, as they are divided here."""
        ...


class Alone:
    """One process has all weights."""

    leads, shared = True, False

    def divide(self, model: Model, narrow: bool) -> None: ...

    def states(self, model: Model, texts: TextRows, rows_N: Tensor) -> Tensor:
        return texts.states(model.trunk)[rows_N]

    def gather(self) -> None: ...

    def rest(self) -> None: ...

    def passes(self, parts: Iterator[list[Item]]) -> Iterator[list[Item]]:
        return parts

    def counts(self, counts_C: np.ndarray) -> np.ndarray:
        return one_rank(counts_C)

    def together(self, value: Value) -> list[Value]:
        return [value]

    def add_up(self, parameters: Iterable[Tensor]) -> None: ...

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        checkpoints.write(folder, state)

    def load(self, folder: Path, like: Mapping[str, Tensor]) -> dict[str, Any]:
        return checkpoints.read(folder)
