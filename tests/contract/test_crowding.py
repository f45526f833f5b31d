"""A run says so when other programs use the cores that its threads need."""

import os

import pytest
import torch

from reflux.models.torch_settings import crowding
from reflux.runtime.watch import Silent


def machine(monkeypatch, load: float, cores: int, threads: int, gpu: bool = False) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


@pytest.mark.parametrize(
    ("load", "cores", "threads", "said"),
    [
        (0.3, 2, 2, False),
        (1.0, 2, 2, False),
        (1.2, 2, 2, True),
        (5.0, 2, 2, True),
        # one thread waits for no other
        (5.0, 2, 1, False),
        (30.0, 64, 64, False),
        (40.0, 64, 64, True),
        (50.0, 64, 16, False),
    ],
)
def test_it_is_said_when_less_than_half_of_the_cores_is_free(monkeypatch, load, cores, threads, said):
    machine(monkeypatch, load, cores, threads)
    notes = list(crowding())
    assert len(notes) == said
    if said:
        assert f"about {load:.1f} of {cores} cores were busy, and torch uses {threads} threads" in notes[0]


def test_nothing_is_said_where_a_gpu_does_the_work(monkeypatch):
    machine(monkeypatch, 5.0, 2, 2, gpu=True)
    assert list(crowding()) == []


def test_a_run_tells_it_once(monkeypatch, tiny_run):
    machine(monkeypatch, 5.0, 2, 2)
    told: list[str] = []
    monkeypatch.setattr(Silent, "noted", lambda self, text: told.append(text))
    tiny_run("full", steps=1)
    assert sum("threads = 1 may be faster" in text for text in told) == 1
