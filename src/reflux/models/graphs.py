"""Work that is captured once as a CUDA graph and then replayed. On a CPU the work itself is called."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# calls before the capture, in which libraries choose their kernels and allocate their workspaces
_WARM_UP = 2


class Graphs:
    """The graphs of one model. They share one memory pool, because only one of them runs at a time."""

    def __init__(self) -> None:
        self.captured, self.seconds = 0, 0.0
        # why work is called and not replayed, once a capture has failed
        self.failure: str | None = None
        self._pool: Any = None

    def of(self, work: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        """A function that does what `work` does. state: the tensors that `work` moves on from one call to the
        next; they are the same afterwards. Everything else that `work` reads must stay at its address.
        """
        if state[0].device.type != "cuda" or self.failure:
            return work
        started, device = time.perf_counter(), state[0].device
        kept = [tensor.clone() for tensor in state]
        try:
            # Streams belong to the current device. torch leaves its stream of captures current where a
            # capture fails, so the stream is set back here.
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
                replay = self._capture(work, state, kept)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.failure = _cause(error)
            _restore(state, kept)
            return work
        self.captured, self.seconds = self.captured + 1, self.seconds + time.perf_counter() - started
        return replay

    def forget(self) -> None:
        """All graphs were dropped. The next ones get a new pool, because torch frees that of the old ones."""
        self._pool = None

    def _capture(
        self, work: Callable[[], None], state: Sequence[Tensor], kept: Sequence[Tensor]
    ) -> Callable[[], None]:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                work()
                _restore(state, kept)
        current.wait_stream(side)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Another thread, which trains meanwhile, may allocate memory during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


def _cause(error: BaseException) -> str:
    """The first line of what failed first. The end of a failed capture fails too, and says no reason."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().partition("\n")[0]


def _restore(state: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    for tensor, value in zip(state, kept, strict=True):
        tensor.copy_(value)
