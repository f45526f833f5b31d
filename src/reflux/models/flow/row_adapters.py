"""Applies to each row of a batch its own adapter, with one product by the weights of the base for all rows.

peft has the same for lists of adapter names. It selects the rows of an adapter by a list of indices, which on
a GPU is copied to the device, with a synchronisation, three times per layer and adapter. Here the rows of an
adapter are a slice, and the product by B adds to the output itself, so that their sum is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.nn import functional as F

# the name of an adapter and the rows that it changes
Run = tuple[str, slice]


@contextmanager
def row_adapters(layers: Sequence[Any], adapters_N: Sequence[str | None]) -> Iterator[None]:
    """Context in which row n of a batch of N rows is computed with the adapter adapters_N[n], or with the
    base alone where this is None: x W^T + scale (x A^T) B^T.

    layers: peft's layers with these adapters, all switched off. Any order of rows is right. An order in which
    the rows of an adapter are neighbours needs the fewest products.
    """
    runs = list(_runs(adapters_N))
    with ExitStack() as hooks:
        for layer in layers if runs else ():
            handle = layer.register_forward_hook(partial(_add_changes, runs, len(adapters_N)))
            hooks.callback(handle.remove)
        yield


def _runs(adapters_N: Sequence[str | None]) -> Iterator[Run]:
    start = 0
    for name, rows in groupby(adapters_N):
        stop = start + len(list(rows))
        if name is not None:
            yield name, slice(start, stop)
        start = stop


def _add_changes(runs: Sequence[Run], rows: int, layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    """A forward hook of `layer`: add the changes of the adapters that have this layer to its output, in
    place.
    """
    (x,) = inputs
    if len(x) != rows:
        raise ValueError(f"a layer got a batch of {len(x)} rows, and adapters are given for {rows}")
    for name, its in runs:
        if name in layer.scaling:
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            inner = F.linear(x[its], A)
            output[its].view(-1, len(B)).addmm_(inner.view(-1, len(A)), B.T, alpha=layer.scaling[name])
