"""Captured steps of decoding without a GPU. What stands in for a CUDA graph records the operations of a step
on their tensors and repeats just these: a number of the host stays as it was, and what waits for the device
is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from device import DEVICE
from methods.test_static_decoder import DRAW, MODELS, asked, model, opened, same
from reflux.models import graphs
from reflux.models.generate import decode

# operations that read a number back, or whose result has as many numbers as the data says
WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")
# the attention of these fills its mask from a number on the host, which no capture allows
UNCAPTURED = {"alibi", "attention sinks"}

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="a GPU has real graphs, and kernels of Triton in them"
)


class Recorded(TorchDispatchMode):
    """The operations in order, with their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if name == "lift_fresh":
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        made = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for op, args, kwargs, made in self.calls:
            again = op(*args, **kwargs)
            for old, new in zip(pytree.tree_leaves(made), pytree.tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def capturing() -> Iterator[None]:
    """transformers leaves out its looks at a mask while a stream is captured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
        yield


def recorded(self: graphs.Graphs, work: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """In the place of `Graphs.of`."""
    kept, steps = [tensor.clone() for tensor in state], Recorded()
    try:
        with capturing(), steps:
            work()
        self.captured += 1
    except RuntimeError as error:
        self.failure = str(error)
    graphs._restore(state, kept)
    return work if self.failure else steps.replay


@pytest.mark.parametrize("kind", MODELS)
def test_a_repeated_step_reads_nothing_from_the_host(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.Graphs, "of", recorded)
    loaded = model(**MODELS[kind])
    decoder, asks = opened(loaded), asked(loaded, 17, top_k=3)
    assert (decoder.graphs.failure is not None) == (kind in UNCAPTURED), decoder.graphs.failure
    same(decode(loaded, asks, lambda: 0, decoder), decode(loaded, asks, lambda: 0))
    # at the trial, and for two numbers of rows
    assert decoder.graphs.captured == (0 if kind in UNCAPTURED else 3)


@pytest.mark.parametrize("how", [{"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}])
def test_so_does_every_kind_of_draw(how: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.Graphs, "of", recorded)
    loaded = model("qwen3")
    decoder, asks = opened(loaded), asked(loaded, draw=replace(DRAW, **how))
    same(decode(loaded, asks, lambda: 0, decoder), decode(loaded, asks, lambda: 0))
    assert decoder.graphs.failure is None
