"""reflux answers: a teacher is asked once, and what it wrote is read by rewards and samplers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fake_chat import FakeChat, Reply, chatting, refused
from reflux import checks
from reflux.cli.fill_answers import fill_answers
from reflux.config.recipe import load_recipe
from reflux.config.registry import build
from reflux.errors import ConfigError, DataError, RunError, ServerError
from reflux.tasks.word_problems import WordProblems

NUMBERS = ("steps=2", "prompts_per_step=3", "group_size=4")


def settings(folder: Path, **more: str) -> list[str]:
    """Overrides that wrap the task of a recipe; the rule server answers."""
    changes = {
        "task": '{kind = "answered", of = {kind = "word_problems"}, teacher = {kind = "local"}}',
        "task.path": str(folder / "index.jsonl"),
        "rewards.rubric.teacher": "none",
        **more,
    }
    return [*NUMBERS, *(f"{key}={value}" for key, value in changes.items())]


def remote(fake: FakeChat, folder: Path, **more: str) -> list[str]:
    teacher = f'{{kind = "openai", url = "{fake.url}", model = "m", tries = 1}}'
    return settings(
        folder, **{"task.teacher": teacher, "task.answers": "1", "rewards.rubric.references": "1", **more}
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]


def test_the_file_has_the_answers_to_all_prompts_of_the_run(tmp_path: Path) -> None:
    fill_answers("rubric", settings(tmp_path), 0)
    prompts = list(islice(WordProblems().prompts("train", 0), 6))
    rows = {row["prompt_id"]: row for row in lines(tmp_path)}
    assert [*rows] == [prompt.id for prompt in prompts]
    for prompt in prompts:
        row = rows[prompt.id]
        assert len(set(row["answers"])) == 4
        assert sum(WordProblems().verify(prompt, answer) for answer in row["answers"]) >= 3
        assert row["teacher"]["kind"] == "local"
        assert (row["teacher"]["temperature"], row["teacher"]["max_tokens"]) == (1.0, 8192)
    cfg = load_recipe("rubric", settings(tmp_path))
    checks.inputs(cfg)
    read = list(islice(cfg.task.prompts("train", 0), 6))
    assert [list(prompt.references) for prompt in read] == [rows[prompt.id]["answers"] for prompt in prompts]
    assert [prompt.messages for prompt in read] == [prompt.messages for prompt in prompts]
    # Prompts of another split are those of the task itself.
    assert list(islice(cfg.task.prompts("test", 0), 3)) == list(islice(WordProblems().prompts("test", 0), 3))


def test_the_digest_is_that_of_the_messages(tmp_path: Path) -> None:
    import hashlib

    fill_answers("rubric", settings(tmp_path), 1)
    (row,) = lines(tmp_path)
    (prompt,) = islice(WordProblems().prompts("train", 0), 1)
    written = json.dumps(list(prompt.messages), sort_keys=True)
    assert row["prompt_sha256"] == hashlib.sha256(written.encode()).hexdigest()


def test_a_stopped_call_is_continued_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    with chatting() as fake:
        fill_answers("rubric", remote(fake, tmp_path), 2)
        assert len(fake.bodies) == 2
        whole = (tmp_path / "index.jsonl").read_text()
        # as a kill leaves it
        (tmp_path / "index.jsonl").write_text(whole + whole.splitlines()[0][:40])
        fill_answers("rubric", remote(fake, tmp_path), 0)
        assert len(fake.bodies) == 6
        fill_answers("rubric", remote(fake, tmp_path), 0)
        assert len(fake.bodies) == 6
    assert (tmp_path / "index.jsonl").read_text().startswith(whole)
    assert len({row["prompt_id"] for row in lines(tmp_path)}) == 6


def test_each_answer_has_its_own_seed(tmp_path: Path) -> None:
    with chatting() as fake:
        fill_answers("rubric", remote(fake, tmp_path, **{"task.answers": "3", "task.temperature": "0.5"}), 1)
    assert sorted(body["seed"] for body in fake.bodies) == [0, 1, 2]
    assert {body["temperature"] for body in fake.bodies} == {0.5}


def test_prompts_without_answers_are_counted_and_asked_again(tmp_path: Path) -> None:
    script = [Reply(), refused(500), Reply(), Reply(""), Reply("")]
    changes = {"task.teacher.concurrency": "1"}
    with chatting(*script) as fake:
        with pytest.raises(ServerError, match="2 prompts have no answers") as failed:
            fill_answers("rubric", remote(fake, tmp_path, **changes), 4)
        assert "status 500" in str(failed.value)
        assert len(lines(tmp_path)) == 2
        fill_answers("rubric", remote(fake, tmp_path, **changes), 4)
    assert len(lines(tmp_path)) == 4


CHANGES = {
    "temperature": {"task.temperature": "0.5"},
    "max_tokens": {"task.max_tokens": "99"},
    "model": {"task.teacher.model": "other"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_teacher_is_refused(change: str, tmp_path: Path) -> None:
    with chatting() as fake:
        fill_answers("rubric", remote(fake, tmp_path), 0)
        changed = remote(fake, tmp_path, **CHANGES[change])
        with pytest.raises(DataError, match=rf"line 1 has answers of another teacher \({change}: "):
            fill_answers("rubric", changed, 0)
        with pytest.raises(DataError, match=rf"line 1 has answers of another teacher \({change}: "):
            checks.inputs(load_recipe("rubric", changed))
        assert len(fake.bodies) == 6
        # What does not determine an answer may change.
        same = remote(fake, tmp_path, **{"task.timeout_s": "9", "task.teacher.tries": "2"})
        checks.inputs(load_recipe("rubric", same))


def spoilt(row: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**row, **changes}) + "\n"


def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path) -> None:
    fill_answers("rubric", settings(tmp_path), 0)
    path, rows = tmp_path / "index.jsonl", lines(tmp_path)
    good = [json.dumps(row) + "\n" for row in rows]
    cases = {
        "line 3 is no line of an index": "x\n",
        "line 3 is no line of an index ": spoilt(rows[2], answers="x"),
        "line 3 has an empty answer": spoilt(rows[2], answers=["a", "b", " ", "d"]),
        "line 3 has 3 answers, and 4 are needed": spoilt(rows[2], answers=["a", "b", "c"]),
        "line 3 repeats the prompt": good[0],
        "line 3 has answers of another teacher .no fingerprint": spoilt(rows[2], teacher=None),
        "has a line for other messages": spoilt(rows[2], prompt_sha256="0"),
        "has no line": "",
    }
    for words, line in cases.items():
        path.write_text("".join([*good[:2], line, *good[3:]]))
        with pytest.raises(DataError, match=words.strip()):
            checks.inputs(load_recipe("rubric", settings(tmp_path)))
    path.unlink()
    with pytest.raises(DataError, match="Fill it with `reflux answers`"):
        checks.inputs(load_recipe("rubric", settings(tmp_path)))


def test_more_answers_than_needed_are_left(tmp_path: Path) -> None:
    fill_answers("rubric", settings(tmp_path), 0)
    cfg = load_recipe("rubric", settings(tmp_path, **{"task.answers": "2", "rewards.rubric.references": "2"}))
    checks.inputs(cfg)
    assert [len(prompt.references) for prompt in islice(cfg.task.prompts("train", 0), 3)] == [2, 2, 2]
    more = settings(tmp_path, **{"rewards.rubric.references": "5"})
    with pytest.raises(DataError, match=r"rewards.rubric needs 5 answers .* has 4"):
        checks.inputs(load_recipe("rubric", more))


def test_what_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'task\.kind = "answered"'):
        fill_answers("rubric", [], 0)
    with pytest.raises(ConfigError, match="solves word_problems and chains only"):
        fill_answers("rubric", settings(tmp_path, **{"task.of": '{kind = "gsm8k"}'}), 0)
    import fcntl

    fill_answers("rubric", settings(tmp_path), 1)
    with (tmp_path / ".index.jsonl.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="written by another process"):
            fill_answers("rubric", settings(tmp_path), 2)


def test_the_reward_and_the_sampler_of_references_read_the_file(
    tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    fill_answers("rubric", settings(tmp_path), 0)
    task = {
        "kind": "answered",
        "of": {"kind": "word_problems"},
        "teacher": {"kind": "local"},
        "path": str(tmp_path / "index.jsonl"),
    }
    small = {"steps": 2, "prompts_per_step": 3, "evals": "none", "task": task}
    judged = tiny_run("rubric", **small, group_size=4, rewards__rubric__teacher="none")
    assert "teacher" not in judged.summary["chat"]
    assert judged.summary["chat"]["rubric"]["groups"] == 6
    tuned = tiny_run("sft", **small, group_size=4)
    texts: dict[str, list[str]] = {}
    for row in tuned.rows("attempts"):
        if row["kind"] == "attempt":
            texts.setdefault(row["prompt"], []).append(row["text"])
    assert texts == {row["prompt_id"]: row["answers"] for row in lines(tmp_path)}


def test_the_wrapped_task_answers_for_everything_else() -> None:
    table = {"kind": "answered", "teacher": {"kind": "local"}, "path": "x"}
    inner = WordProblems(operations=("add", "mul"), held_out=7)
    task = build(
        "tasks",
        {**table, "of": {"kind": "word_problems", "operations": ["add", "mul"], "held_out": 7}},
        "task",
    )
    for name in (
        "judges",
        "local",
        "ends",
        "patience",
        "multi_turn",
        "judge",
        "routes",
        "rollouts",
        "solves",
        "replays",
    ):
        assert getattr(task, name) == getattr(inner, name)
    prompt = next(inner.prompts("test", 0))
    assert task.verify(prompt, prompt.references[0]) == 1.0
    assert task.verify(prompt, "Answer: -3") == 0.0
    assert task.solve(prompt.messages[0]["content"]) == inner.solve(prompt.messages[0]["content"])
    assert (task.open_env(prompt, 0), task.part_of(prompt)) == (None, None)
