"""trace.json: spans of one row of a viewer nest, a killed run leaves a file that opens, and a run shows its
parts.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from reflux.errors import RunError
from reflux.loop import train
from reflux.runtime.timers import Clock, Waiting
from reflux.runtime.trace import TRACKS, Trace
from reflux.training import Options, Run
from tiny import same

Event = dict[str, Any]


def read(path: Path) -> list[Event]:
    return json.loads(path.read_text())


def spans(events: list[Event]) -> dict[str, list[Event]]:
    """The spans by the name of their row."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[str, list[Event]] = {name: [] for name in names.values()}
    for event in events:
        if event["ph"] == "X":
            found[names[event["pid"], event["tid"]]].append(event)
    return found


def assert_nested(events: list[Event]) -> None:
    """In one row a span is inside another one, or apart from it."""
    for row in spans(events).values():
        enclosing: list[int] = []
        for event in sorted(row, key=lambda event: (event["ts"], -event["dur"])):
            end = event["ts"] + event["dur"]
            while enclosing and enclosing[-1] <= event["ts"]:
                enclosing.pop()
            assert not enclosing or end <= enclosing[-1]
            enclosing.append(end)


def test_every_event_has_what_the_format_asks_for(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", "a run")
    with trace.span("loop", "outer", {"step": 1, "group": None}), trace.span("loop", "inner", {}):
        pass
    trace.add("learner", "learn", 5.0, 7.5, {"step": 2})
    trace.close()
    events = read(tmp_path / "trace.json")
    assert all({"name", "ph", "pid", "tid"} <= {*event} for event in events)
    assert events[0]["args"] == {"name": "a run"}
    by_name = {event["name"]: event for event in events}
    assert by_name["outer"]["args"] == {"step": 1}
    assert by_name["learn"]["dur"] in (2_499_999, 2_500_000, 2_500_001)
    assert [*spans(events)] == ["loop", "learner"]
    assert len(spans(events)["loop"]) == 2
    assert_nested(events)


def test_tasks_at_the_same_time_have_rows_of_their_own_and_rows_are_used_again(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", "run")

    async def work(name: str, go: asyncio.Event) -> None:
        with trace.span("groups", name, {}), trace.span("groups", f"{name} waits", {}):
            await go.wait()

    async def both() -> None:
        for turn in range(3):
            first, second = asyncio.Event(), asyncio.Event()
            tasks = [
                asyncio.create_task(work(f"a{turn}", first)),
                asyncio.create_task(work(f"b{turn}", second)),
            ]
            await asyncio.sleep(0)
            # the first to begin ends last
            second.set()
            await tasks[1]
            first.set()
            await tasks[0]

    asyncio.run(both())
    trace.close()
    events = read(tmp_path / "trace.json")
    names = {row: [event["name"] for event in found] for row, found in spans(events).items()}
    assert names == {
        "groups": ["a0 waits", "a0", "a1 waits", "a1", "a2 waits", "a2"],
        "groups 2": ["b0 waits", "b0", "b1 waits", "b1", "b2 waits", "b2"],
    }
    assert_nested(events)


def test_a_span_that_was_measured_elsewhere_takes_a_free_row(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", "run")
    for name, began, ended in (("a", 1.0, 3.0), ("b", 2.0, 4.0), ("c", 3.0, 5.0), ("d", 2.5, 6.0)):
        trace.add("rewards", name, began, ended, {})
    trace.close()
    found = spans(read(tmp_path / "trace.json"))
    assert {row: [event["name"] for event in each] for row, each in found.items()} == {
        "rewards": ["a", "c"],
        "rewards 2": ["b"],
        "rewards 3": ["d"],
    }


def test_many_threads_write_whole_lines(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", "run")

    def work(name: str) -> None:
        for index in range(200):
            with trace.span("sampler", name, {"step": index}), trace.span("sampler", "inside", {}):
                pass

    threads = [threading.Thread(target=work, args=(f"t{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()
    events = read(tmp_path / "trace.json")
    assert Counter(event["name"] for event in events if event["ph"] == "X")["inside"] == 800
    assert_nested(events)


def test_an_error_ends_the_span_and_frees_the_row(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", "run")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), trace.span("loop", "learn", {}):
            raise ZeroDivisionError
    trace.close()
    assert {row: len(found) for row, found in spans(read(tmp_path / "trace.json")).items()} == {"loop": 2}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_killed_run_leaves_a_file_that_lacks_its_bracket_and_a_resumed_one_goes_on(
    tmp_path: Path, cut: int
) -> None:
    """A line that was written in part, as at a full disk, is removed when the file goes on."""
    path = tmp_path / "trace.json"
    killed = Trace(path, "run")
    for step in range(3):
        killed.add("learner", f"learn {step}", float(step), step + 0.5, {"step": step})
    # what a kill leaves: all of it is on disk already
    whole = json.loads(path.read_text() + "]")
    assert len(whole) == 6
    killed._file.close()
    # at every moment, since a line is written in one piece
    for end, byte in enumerate(path.read_bytes()):
        if byte == ord("\n") and end > 2:
            json.loads(path.read_text()[:end].rstrip(",") + "]")
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = Trace(path, "again")
    resumed.add("learner", "learn 2", 9.0, 9.5, {})
    resumed.close()
    events = read(path)
    kept = len(whole) - 1
    assert events[:kept] == whole[:kept]
    assert [event["name"] for event in events[kept:]] == [
        "process_name",
        "thread_name",
        "thread_sort_index",
        "learn 2",
    ]


@pytest.mark.parametrize("left", ["", "[", "[\n", "[\n]\n", '[\n{"name": "x", "ph', "nonsense"])
def test_a_file_without_a_whole_event_is_begun_again(tmp_path: Path, left: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(left)
    Trace(path, "run").close()
    assert read(path) == []


def test_a_closed_file_goes_on_behind_its_events(tmp_path: Path) -> None:
    for _ in range(3):
        trace = Trace(tmp_path / "trace.json", "run")
        trace.add("loop", "a [1]", 1.0, 2.0, {"group": "]"})
        trace.close()
        trace.close()
        # a thread that ends late
        trace.add("loop", "late", 1.0, 2.0, {})
    assert Counter(event["name"] for event in read(tmp_path / "trace.json"))["a [1]"] == 3


def test_a_file_that_gets_no_event_stays_as_it_is(tmp_path: Path) -> None:
    """As where a finished run is resumed."""
    path = tmp_path / "trace.json"
    trace = Trace(path, "run")
    trace.add("loop", "evaluate", 1.0, 2.0, {})
    trace.close()
    before = path.read_bytes()
    Trace(path, "again").close()
    assert path.read_bytes() == before


def test_a_clock_without_a_trace_only_counts() -> None:
    clock = Clock()
    with clock.span("loop", "wait"):
        clock.spent("learner", "learn", 0.0)
    clock.step_ended(1)
    clock.close()
    assert {*clock.take()} == {"learn", "total"}


def test_the_time_between_two_items_is_waited_for(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", "run")

    async def stream() -> Any:
        for item in range(3):
            yield item

    async def taken() -> list[int]:
        return [item async for item in Waiting(stream(), Clock(trace))]

    assert asyncio.run(taken()) == [0, 1, 2]
    trace.close()
    # the last one finds the end of the stream
    assert len(spans(read(tmp_path / "trace.json"))["loop"]) == 4


SETTINGS: dict[str, Any] = {
    "steps": 4,
    "prompts_per_step": 3,
    "save_every": 2,
    "eval_every": 2,
    "evals__accuracy": {"problems": 3},
    "rewards__verifier": {},
}


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_shows_each_part_by_step_and_group(tiny_run: Callable[..., Any], max_staleness: int) -> None:
    done = tiny_run("vopd", **SETTINGS, trace=True, max_staleness=max_staleness)
    events = read(done.dir / "trace.json")
    assert_nested(events)
    found: dict[str, list[Event]] = {}
    for row, each in spans(events).items():
        found.setdefault(row.split()[0], []).extend(each)
    assert {*found} <= {*TRACKS}

    def steps(track: str, name: str) -> Counter[int]:
        return Counter(event["args"].get("step") for event in found[track] if event["name"] == name)

    # the steps follow each other
    assert "steps 2" not in spans(events)
    every = dict.fromkeys(range(1, 5), 1)
    assert Counter(event["args"]["step"] for event in found["steps"]) == every
    assert steps("learner", "learn") == every
    assert steps("sampler", "sample") == every
    assert steps("loop", "publish") == {0: 1, **every}
    assert steps("loop", "evaluate") == dict.fromkeys((0, 2, 4), 1)
    assert steps("loop", "checkpoint") == dict.fromkeys((2, 4), 1)
    assert steps("loop", "wait for attempts")[None] == 5
    for name in ("group", "sample", "reward", "teach"):
        assert steps("groups", name) == dict.fromkeys(range(1, 5), 3)
    assert len({(e["args"]["step"], e["args"]["group"]) for e in found["groups"]}) == 12
    assert Counter(event["name"] for event in found["teachers"])["main"] >= 4
    assert len([event for event in found["rewards"] if event["name"] == "reward"]) >= 12
    # the attempts of a step are complete before it is learnt
    for step in range(1, 5):
        ends = [e["ts"] + e["dur"] for e in found["groups"] if e["args"]["step"] == step]
        (begins,) = (e["ts"] for e in found["learner"] if e["args"].get("step") == step)
        assert max(ends) <= begins


def test_environments_have_spans(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run(
        "vopd", steps=1, prompts_per_step=2, trace=True, task={"kind": "outside:Chat", "replies": 1}
    )
    rows = spans(read(done.dir / "trace.json"))
    assert all(event["args"]["group"] for row in rows if row.startswith("env") for event in rows[row])
    assert any(row.startswith("environments") for row in rows)


def test_a_trace_changes_nothing_and_is_not_written_unasked(tiny_run: Callable[..., Any]) -> None:
    plain, traced = (tiny_run("vopd", **SETTINGS, trace=trace) for trace in (False, True))
    assert same(plain.state, traced.state)
    assert plain.summary["config_hash"] == traced.summary["config_hash"]
    assert not (plain.dir / "trace.json").exists()


def test_a_resumed_run_goes_on_in_the_same_file(tiny_run: Callable[..., Any]) -> None:
    first = tiny_run("vopd", **SETTINGS | {"steps": 2}, trace=True)
    before = read(first.dir / "trace.json")
    tiny_run("vopd", **SETTINGS, trace=True, out=first.dir, resume=True)
    events = read(first.dir / "trace.json")
    assert events[: len(before)] == before
    assert sorted(event["args"]["step"] for event in spans(events)["steps"]) == [1, 2, 3, 4]
    assert_nested(events)


def test_a_second_process_does_not_touch_the_file(student: str, teacher: str, tmp_path: Path) -> None:
    from reflux import checks

    cfg = tiny.config("vopd", student, teacher, **SETTINGS, trace=True)
    run = Run.open(cfg, checks.join(cfg), Options(tmp_path / "run"))
    before = (tmp_path / "run" / "trace.json").read_bytes()
    with pytest.raises(RunError, match="another process"):
        asyncio.run(train(cfg, Options(tmp_path / "run", resume=True)))
    assert (tmp_path / "run" / "trace.json").read_bytes() == before
    run.close()
