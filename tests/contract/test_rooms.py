"""The rooms of the package stay few, hang together in one direction, and have names of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "reflux"
# The implementations of a protocol: learners, samplers and teachers for text and for flows, and their
# engines. Each folder of parts has its protocol in base.py.
PROTOCOLS = {"base.py", "flow.py", "flow_engine.py", "hf.py", "hf_engine.py", "vllm.py", "vllm_engine.py"}
CLASSES = {"Flow", "HF", "VLLM"}


@pytest.fixture(scope="module")
def rooms() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "benchmarks" / "rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_top_level_is_small(rooms: ModuleType) -> None:
    entries = rooms.top_level(SOURCE)
    assert len(entries) <= 33
    assert rooms.modules_in(entries) <= 6


def test_no_import_cycle_is_longer_than_a_part_and_its_engine(rooms: ModuleType) -> None:
    """A value, its engine and one module between them: three files."""
    assert [cycle for cycle in rooms.cycles_of(rooms.imports_of(SOURCE)) if len(cycle) > 3] == []


def test_few_imports_between_rooms_point_upward(rooms: ModuleType) -> None:
    upward, _ = rooms.fewest_upward(rooms.room_pairs(rooms.imports_of(SOURCE)))
    assert len(upward) <= 11


def test_names_are_used_once(rooms: ModuleType) -> None:
    assert rooms.repeated_files(SOURCE).keys() <= PROTOCOLS
    assert rooms.repeated_classes(SOURCE).keys() <= CLASSES


def test_what_is_counted_is_seen(rooms: ModuleType) -> None:
    """A ring of four in three rooms, one of its imports upward."""
    ring = {
        "p.a.x": {"p.b.x"},
        "p.b.x": {"p.b.y"},
        "p.b.y": {"p.c.x"},
        "p.c.x": {"p.a.x"},
        "p.c.y": {"p.a.x"},
    }
    assert rooms.cycles_of(ring) == [{"p.a.x", "p.b.x", "p.b.y", "p.c.x"}]
    assert rooms.room_pairs(ring) == {("a", "b"), ("b", "c"), ("c", "a")}
    assert len(rooms.fewest_upward(rooms.room_pairs(ring))[0]) == 1
