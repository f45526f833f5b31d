"""The capture of a graph with stand-ins for the functions of torch.cuda: a graph records the work that is
called while it is open. Decoding with real graphs is in test_static_decoder.py, on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from reflux.models.graphs import Graphs


class Stream:
    def __init__(self, device: Any = None):
        self.device = device

    def wait_stream(self, other: Any) -> None: ...


class Gpu:
    """The current stream of this thread, and the current device at each capture."""

    def __init__(self) -> None:
        self.stream, self.device = Stream(), torch.device("cuda:0")
        self.captured_on: list[torch.device] = []

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device
        try:
            yield
        finally:
            self.device = before


class Graph:
    """Replays what was called while it was open."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.work: Callable[[], None] | None = None

    def replay(self) -> None:
        assert self.work is not None
        self.work()


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> list[Graph]:
    """The graphs, in order. Nothing runs while one is open, as on a GPU. As in torch, the stream of captures
    stays the current one where the end of a capture fails, and the error of the end hides that of the work.
    """
    graphs: list[Graph] = []

    @contextmanager
    def opened(graph: Graph, pool: Any, capture_error_mode: str) -> Iterator[None]:
        # another thread may allocate memory meanwhile
        assert capture_error_mode == "thread_local"
        graph.pool = pool
        graphs.append(graph)
        gpu.captured_on.append(gpu.device)
        before, gpu.stream = gpu.stream, Stream()
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
        gpu.stream = before

    fakes = {
        "Stream": Stream,
        "current_stream": lambda device=None: gpu.stream,
        "stream": gpu.on_stream,
        "device": gpu.on_device,
        "graph": opened,
        "CUDAGraph": Graph,
        "graph_pool_handle": object,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return graphs


class OnGpu:
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, value: float):
        self.value = torch.tensor([value])

    def clone(self) -> Tensor:
        return self.value.clone()

    def copy_(self, other: Tensor) -> None:
        self.value.copy_(other)


def test_warm_up_leaves_the_state_and_graphs_share_a_pool(made: list[Graph]) -> None:
    graphs, state, calls = Graphs(), OnGpu(3.0), []

    def work() -> None:
        calls.append(float(state.value))
        # what is called in an open graph runs later
        if not made or made[-1].work is not None:
            state.value.add_(1)
        else:
            made[-1].work = work

    replay = graphs.of(work, [state])  # type: ignore[list-item]
    assert float(state.value) == 3
    # every call for warming up began from the same state
    assert set(calls) == {3.0}
    assert len(calls) > 2
    replay()
    replay()
    assert float(state.value) == 5
    graphs.of(work, [state])  # type: ignore[list-item]
    assert (graphs.captured, graphs.failure) == (2, None)
    assert made[0].pool is made[1].pool
    graphs.forget()
    graphs.of(work, [state])  # type: ignore[list-item]
    assert made[2].pool is not made[0].pool


def test_after_a_failed_capture_the_work_itself_is_called(made: list[Graph], gpu: Gpu) -> None:
    graphs, state, stream = Graphs(), OnGpu(3.0), gpu.stream

    def work() -> None:
        state.value.add_(1)
        if made:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    assert graphs.of(work, [state]) is work  # type: ignore[list-item]
    assert float(state.value) == 3
    assert (graphs.captured, graphs.failure) == (0, "operation not permitted when stream is capturing")
    assert gpu.stream is stream
    # the next ones are not tried
    assert graphs.of(work, [state]) is work  # type: ignore[list-item]
    assert len(made) == 1


def test_the_capture_is_on_the_device_of_the_model(made: list[Graph], gpu: Gpu) -> None:
    """Streams belong to the current device, and a graph of another device would stay empty."""
    graphs, state = Graphs(), OnGpu(3.0)
    state.device = torch.device("cuda:1")
    graphs.of(lambda: None, [state])  # type: ignore[list-item]
    assert gpu.captured_on == [torch.device("cuda:1")]
    assert gpu.device == torch.device("cuda:0")


def test_on_a_cpu_the_work_itself_is_called(made: list[Graph]) -> None:
    graphs, state = Graphs(), torch.zeros(1)

    def work() -> None:
        state.add_(1)

    assert graphs.of(work, [state]) is work
    assert (graphs.captured, made) == (0, [])
