"""Tasks: the same prompts from any position, splits that do not meet, and a sentence for every bad line."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reflux.config.registry import part
from reflux.errors import DataError
from reflux.rewards.oracle.rule_server import RuleServer
from reflux.tasks import TASKS
from reflux.tasks.answered import Answered
from reflux.tasks.glyphs import Glyphs
from reflux.tasks.gsm8k import Gsm8k
from reflux.tasks.jsonl import Jsonl
from reflux.tasks.mix import BLOCK, Mix
from reflux.types import Prompt

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not SHARED.is_dir(), reason="the GSM8K files are not beside the repository")


def write(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def numbered(path: Path, n: int = 40) -> str:
    return write(path, *({"prompt": f"{k}+1?", "answer": k + 1} for k in range(n)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "gsm").mkdir()
    for name, n in (("train", 60), ("test", 5)):
        write(
            tmp_path / "gsm" / f"{name}.jsonl",
            *({"question": f"{name} {k}?", "answer": f"So it is {k}.\n#### {k}"} for k in range(n)),
        )
    return tmp_path


@pytest.fixture
def tasks(folder: Path) -> dict[str, Any]:
    """One of every registered task, small."""
    small = {
        "word_problems": part("tasks", "word_problems")(held_out=7),
        "chains": part("tasks", "chains")(held_out=7),
        **{kind: part("tasks", kind)(held_out=7) for kind in TOOLS},
        "gsm8k": Gsm8k(str(folder / "gsm"), validation=0.2),
        "jsonl": Jsonl(numbered(folder / "own.jsonl"), validation=0.3),
        "glyphs": Glyphs(held_out=16),
    }
    mix = Mix(
        {
            "easy": small["word_problems"],
            "own": Jsonl(numbered(folder / "other.jsonl"), validation=0.3, weight=3.0),
        }
    )
    answered = Answered(small["gsm8k"], RuleServer(), str(folder / "index.jsonl"), answers=1)
    stored, asked = answered.stored_answers, take(small["gsm8k"], "train", 100)
    by_id = {prompt.id: stored.line(prompt, [f"It is {prompt.answer}."]) for prompt in asked}
    write(stored.path, *by_id.values())
    return {**small, "mix": mix, "answered": answered}


# needs a package of its own: test_verifiers.py
HERE = [kind for kind in TASKS if kind != "verifiers"]
# images: test_glyphs.py; all splits ask the same few questions
TEXTS = [kind for kind in HERE if kind != "glyphs"]
# several turns: test_tools.py
TOOLS = ("shopping", "calculator", "ledger")
SINGLE = [kind for kind in TEXTS if kind not in TOOLS]


def take(task: Any, split: Any, n: int, start: int = 0, seed: int = 0) -> list[Prompt]:
    return list(itertools.islice(task.prompts(split, seed, start), n))


@pytest.mark.parametrize("kind", HERE)
def test_a_run_resumes_by_position_alone(tasks: dict[str, Any], kind: str) -> None:
    whole = take(tasks[kind], "train", 150)
    assert len(whole) == 150
    for start in (0, 1, 39, 77, 149):
        assert take(tasks[kind], "train", 150 - start, start) == whole[start:]
    for split in ("validation", "test"):
        held_out = list(tasks[kind].prompts(split, 0))
        assert held_out
        assert list(tasks[kind].prompts(split, 0, 3)) == held_out[3:]


# The question of a ledger does not tell its problem: test_tools.py.
@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "ledger"])
def test_the_splits_do_not_meet_and_ids_name_one_problem(tasks: dict[str, Any], kind: str) -> None:
    asked = {
        split: {prompt.messages for prompt in map(frozen, take(tasks[kind], split, 200))}
        for split in ("train", "validation", "test")
    }
    assert not asked["train"] & asked["validation"]
    assert not asked["train"] & asked["test"]
    by_id: dict[str, Prompt] = {}
    for split in ("train", "validation", "test"):
        for prompt in take(tasks[kind], split, 200):
            assert by_id.setdefault(prompt.id, prompt) == prompt


def frozen(prompt: Prompt) -> Any:
    """Messages that can be put into a set."""
    return type("Asked", (), {"messages": tuple(tuple(message.items()) for message in prompt.messages)})


@pytest.mark.parametrize("kind", SINGLE)
def test_the_stored_answer_is_right_another_wrong_and_the_reply_silence(
    tasks: dict[str, Any], kind: str
) -> None:
    prompts = take(tasks[kind], "test", 4)
    for prompt in prompts:
        assert tasks[kind].verify(prompt, f"I think. Answer: {prompt.answer}") == 1.0
        assert tasks[kind].verify(prompt, f"I think. Answer: {int(prompt.answer or 0) + 1}") == 0.0
        assert tasks[kind].open_env(prompt, 0) is None
    unanswered = Prompt(id=prompts[0].id, messages=())
    with pytest.raises(ValueError, match="no answer"):
        tasks[kind].verify(unanswered, "5")


@pytest.mark.parametrize("kind", HERE)
def test_weight_must_be_positive(tasks: dict[str, Any], kind: str) -> None:
    fields: dict[str, Any] = {"path": "x"} if kind == "jsonl" else {}
    fields |= {"parts": {"a": tasks["gsm8k"]}} if kind == "mix" else {}
    fields |= {"of": tasks["gsm8k"], "teacher": RuleServer(), "path": "x"} if kind == "answered" else {}
    assert tasks[kind].weight == 1.0
    with pytest.raises(ValueError, match="weight"):
        part("tasks", kind)(**fields, weight=0.0)


def test_every_epoch_has_every_line_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    task = Jsonl(numbered(tmp_path / "own.jsonl", 20), validation=0.0)
    ids = [prompt.id for prompt in take(task, "train", 60)]
    epochs = [ids[:20], ids[20:40], ids[40:]]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [prompt.id for prompt in take(task, "train", 20, seed=1)] != epochs[0]


def test_the_validation_share_is_about_right_and_does_not_move_when_lines_are_added(tmp_path: Path) -> None:
    few = {
        prompt.id
        for prompt in Jsonl(numbered(tmp_path / "a.jsonl", 1000), validation=0.2).prompts("validation", 0)
    }
    more = {
        prompt.id
        for prompt in Jsonl(numbered(tmp_path / "b.jsonl", 1500), validation=0.2).prompts("validation", 1)
    }
    assert 150 < len(few) < 250
    assert few < more
    assert all(int(number.removeprefix("train/")) > 1000 for number in more - few)


def test_jsonl_reads_all_fields(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    path = write(
        tmp_path / "own.jsonl",
        {"prompt": "one?", "answer": 1.5, "references": ["well, 1.5"], "route": "a", "id": 7, "other": [1]},
        "",
        {"messages": chat, "answer": None},
    )
    first, second = sorted(
        take(Jsonl(path, validation=0.0, instruction="Go.", route="b"), "train", 2),
        key=lambda prompt: prompt.id,
    )
    asked = ({"role": "user", "content": "one?\n\nGo."},)
    assert first == Prompt(id="7", messages=asked, answer="1.5", references=("well, 1.5",), route="a")
    assert second == Prompt(
        id="train/3", messages=(chat[0], {"role": "user", "content": "hi\n\nGo."}), route="b"
    )


def test_jsonl_keeps_tool_calls_and_their_answers(tmp_path: Path) -> None:
    call = {"type": "function", "id": "c", "function": {"name": "add", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "2+3?", "other": 1},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c", "name": "add"},
    ]
    (prompt,) = take(Jsonl(write(tmp_path / "own.jsonl", {"messages": chat}), validation=0.0), "train", 1)
    assert prompt.messages == ({"role": "user", "content": "2+3?"}, {"content": None, **chat[1]}, chat[2])


def test_jsonl_takes_other_columns_and_files_of_their_own(tmp_path: Path) -> None:
    train, validation, test = (
        write(tmp_path / f"{name}.jsonl", {"question": name}) for name in ("train", "validation", "test")
    )
    task = Jsonl(train, keys={"prompt": "question"}, validation=validation, test=test)
    for split in ("train", "validation", "test"):
        (prompt,) = take(task, split, 1)
        assert (prompt.id, prompt.messages[0]["content"]) == (f"{split}/1", split)
    without = Jsonl(train, keys={"prompt": "question"}, validation=validation)
    assert list(without.prompts("test", 0)) == list(without.prompts("validation", 0))


def test_jsonl_graders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_grader.py").write_text(
        "def half(prompt, text):\n    return 0.5 * len(text) + len(prompt.answer)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prompt = Prompt(id="p", messages=(), answer="to be")
    assert Jsonl("x", grader="exact").verify(prompt, " to\n be ") == 1.0
    assert Jsonl("x", grader="exact").verify(prompt, "Answer: to be") == 1.0
    assert Jsonl("x", grader="exact").verify(prompt, "or not to be") == 0.0
    assert Jsonl("x", grader="my_grader:half").verify(prompt, "abc") == 6.5
    with pytest.raises(ValueError, match="grader = none"):
        Jsonl("x", grader="none").verify(prompt, "to be")
    sys.modules.pop("my_grader")


BAD_LINES = [
    ("not json", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[1]", "is JSON but not an object"),
    ({"answer": "1"}, "has no field 'prompt' or 'messages'"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "has both 'prompt' and 'messages'"),
    ({"prompt": ""}, "needs a non-empty string in the field 'prompt'"),
    ({"prompt": 3}, "needs a non-empty string in the field 'prompt', got 3"),
    ({"messages": []}, "has no list of"),
    ({"messages": "a"}, "has no list of"),
    ({"messages": [{"role": "user"}]}, "has no list of"),
    ({"messages": [{"role": "user", "content": [1]}]}, "has no list of"),
    ({"messages": [{"role": "user", "content": None, "tool_calls": [{}]}]}, "has no list of"),
    (
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": []},
                {"role": "user", "content": "a"},
            ]
        },
        "has no list of",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "Move it to 'references'",
    ),
    ({"prompt": "a", "answer": ["1"]}, "field 'answer'"),
    ({"prompt": "a", "answer": " "}, "field 'answer'"),
    ({"prompt": "a", "answer": True}, "field 'answer'"),
    ({"prompt": "a", "references": {"a": "b"}}, "no list of texts in its field 'references'"),
    ({"prompt": "a", "id": "first"}, "has the id 'first' of line 1"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(tmp_path: Path, line: Any, words: str) -> None:
    path = write(tmp_path / "own.jsonl", {"prompt": "fine", "id": "first"}, "", line)
    with pytest.raises(DataError, match="nothing was written") as refused:
        Jsonl(path).prompts("train", 0)
    assert str(refused.value).startswith(f"task jsonl: {path} line 3 ")
    assert words in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    for name, words in (
        ("latin.jsonl", "line 1 is not UTF-8"),
        ("none.jsonl", "No such file"),
        ("", "Is a directory"),
    ):
        with pytest.raises(DataError, match=words):
            Jsonl(str(tmp_path / name)).prompts("train", 0)
    for text in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"empty\.jsonl is empty; nothing was written"):
            Jsonl(str(tmp_path / "empty.jsonl")).prompts("train", 0)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert (
        len({prompt.id for prompt in take(Jsonl(str(tmp_path / "own.jsonl"), validation=0.0), "train", 2)})
        == 2
    )


@pytest.mark.parametrize(("validation", "split"), [(0.0, "validation"), (0.0, "test"), (0.999999, "train")])
def test_an_empty_split_is_explained(folder: Path, validation: float, split: Any) -> None:
    own = Jsonl(numbered(folder / "own.jsonl", 3), validation=validation)
    with pytest.raises(DataError, match=f"split '{split}' at validation = .*separate file"):
        own.prompts(split, 0)
    if split != "test":
        with pytest.raises(DataError, match=f"split '{split}' at validation"):
            Gsm8k(str(folder / "gsm"), validation=validation).prompts(split, 0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "set exactly one of path"),
        ({"path": "a", "dataset": "b"}, "set exactly one of path"),
        ({"path": "a", "keys": {"promt": "q"}}, "did you mean 'prompt'"),
        ({"path": "a", "validation": 1.0}, "0 <= validation < 1"),
        ({"path": "a", "grader": "maths"}, "did you mean 'math'"),
    ],
)
def test_jsonl_refuses_what_cannot_work(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Jsonl(**fields)


def test_gsm8k_reads_question_solution_and_answer(folder: Path) -> None:
    first = take(Gsm8k(str(folder / "gsm"), instruction="Be brief.", route="maths"), "test", 1)[0]
    asked = ({"role": "user", "content": "test 0?\n\nBe brief."},)
    assert first == Prompt(
        id="gsm8k/test/1", messages=asked, answer="0", references=("So it is 0.\n#### 0",), route="maths"
    )
    assert take(Gsm8k(str(folder / "gsm"), instruction=""), "test", 1)[0].messages[0]["content"] == "test 0?"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"question": "a"}, "has no field 'answer'"),
        ({"answer": "#### 1"}, "has no field 'question'"),
        ({"question": "a", "answer": 4}, "needs a non-empty string in the field 'answer', got 4"),
        ({"question": "a", "answer": "4"}, "has no final answer"),
        ({"question": "a", "answer": "4 #### "}, "has no final answer"),
    ],
)
def test_gsm8k_names_a_bad_line(folder: Path, line: Any, words: str) -> None:
    path = folder / "gsm" / "train.jsonl"
    write(path, {"question": "a", "answer": "#### 1"}, line)
    with pytest.raises(DataError) as refused:
        Gsm8k(str(folder / "gsm")).prompts("train", 0)
    assert str(refused.value).startswith(f"task gsm8k: {path} line 2 {words}")
    assert str(refused.value).endswith("; nothing was written.")


def test_gsm8k_explains_a_missing_folder_or_file(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder nowhere.*train\.jsonl and test\.jsonl"):
        Gsm8k("nowhere").prompts("train", 0)
    (folder / "gsm" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"cannot read .*test\.jsonl: No such file"):
        Gsm8k(str(folder / "gsm")).prompts("test", 0)


@pytest.mark.parametrize("task", [Gsm8k(), Jsonl(dataset="nobody/nothing")])
def test_an_unreachable_hub_is_explained(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(name: str, config: str | None, split: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"Couldn't reach.*set `path` to a local copy"):
        task.prompts("train", 0)


def test_hub_rows_are_read_like_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"q": f"{split} {k}", "n": k} for k in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = Jsonl(
        dataset="me/mine",
        dataset_config="c",
        keys={"prompt": "q", "answer": "n"},
        validation="dev",
        test="final",
    )
    assert {prompt.id: prompt.answer for prompt in take(task, "train", 3)} == {
        f"train/{k + 1}": str(k) for k in range(3)
    }
    assert [prompt.messages[0]["content"] for prompt in task.prompts("test", 0)] == [
        "final 0",
        "final 1",
        "final 2",
    ]
    list(task.prompts("validation", 0))
    assert asked == [("me/mine", "c", split) for split in ("train", "final", "dev")]


@needs_gsm8k
def test_the_real_gsm8k() -> None:
    task = Gsm8k(str(SHARED))
    test, validation = (list(task.prompts(split, 0)) for split in ("test", "validation"))
    train = {prompt.id for prompt in take(task, "train", 7473 - len(validation))}
    assert (len(test), len(train) + len(validation)) == (1319, 7473)
    assert 0.04 < len(validation) / 7473 < 0.06
    assert not train & {prompt.id for prompt in validation}
    assert all(task.verify(prompt, prompt.references[0]) == 1.0 for prompt in test)
    wrong = [
        task.verify(prompt, other.references[0])
        for prompt, other in itertools.pairwise(test)
        if prompt.answer != other.answer
    ]
    # two may be equal as numbers and differ as texts
    assert sum(wrong) <= 2


def test_a_mix_keeps_its_shares_and_each_part_its_own_order(tasks: dict[str, Any]) -> None:
    mix = tasks["mix"]
    prompts = take(mix, "train", 3 * BLOCK)
    for start in range(0, 3 * BLOCK, BLOCK):
        assert Counter(mix.part_of(prompt) for prompt in prompts[start : start + BLOCK]) == {
            "easy": 250,
            "own": 750,
        }
    orders = [tuple(mix.part_of(prompt) for prompt in prompts[start : start + BLOCK]) for start in (0, BLOCK)]
    assert orders[0] != orders[1]
    assert orders[0] != tuple(sorted(orders[0]))
    own = [prompt.id for prompt in prompts if mix.part_of(prompt) == "own"]
    size = len(set(own))
    # no line twice before all were asked
    assert all(len(set(own[start : start + size])) == size for start in range(0, 5 * size, size))
    for start in (BLOCK - 1, BLOCK, 2 * BLOCK + 17):
        assert take(mix, "train", 50, start) == prompts[start : start + 50]


def test_a_mix_of_thirds_leaves_nothing_out(tasks: dict[str, Any]) -> None:
    mix = Mix(dict.fromkeys("abc", tasks["jsonl"]))
    prompts = take(mix, "train", 2 * BLOCK)
    assert sorted(Counter(mix.part_of(prompt) for prompt in prompts[:BLOCK]).values()) == [333, 333, 334]
    assert take(mix, "train", BLOCK, BLOCK) == prompts[BLOCK:]


def test_held_out_problems_of_a_mix_are_all_of_them_by_turns(tasks: dict[str, Any]) -> None:
    mix = tasks["mix"]
    prompts = list(mix.prompts("test", 0))
    sizes = Counter(mix.part_of(prompt) for prompt in prompts)
    assert sizes == {"easy": 7, "own": len(list(mix.parts["own"].prompts("test", 0)))}
    first = Counter(mix.part_of(prompt) for prompt in prompts[:10])
    assert first == {"easy": 5, "own": 5}
    assert len({prompt.id for prompt in prompts}) == len(prompts)


def test_a_mix_sends_each_answer_to_its_own_part(tmp_path: Path) -> None:
    parts = {
        "maths": Jsonl(numbered(tmp_path / "a.jsonl"), validation=0.5),
        "words": Jsonl("b", grader="exact"),
    }
    mix = Mix({"inner": Mix(parts), "maths": parts["maths"]})
    half = Prompt(id="inner/maths/train/1", messages=(), answer="0.5")
    assert mix.verify(half, r"\boxed{1/2}") == 1.0
    assert mix.verify(Prompt(id="inner/words/train/1", messages=(), answer="0.5"), "0.50") == 0.0
    assert mix.verify(Prompt(id="maths/train/1", messages=(), answer="0.5"), "0.50") == 1.0
    for stranger in ("words/train/1", "maths", "inner"):
        with pytest.raises(ValueError, match="belongs to no part of this mix"):
            mix.verify(Prompt(id=stranger, messages=(), answer="1"), "1")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "at least one part"),
        ({"a/b": Jsonl("x")}, "contains a slash"),
        ({"a": Jsonl("x"), "b": Jsonl("x", weight=1e-4)}, "less than 1 in 1000"),
    ],
)
def test_a_mix_refuses_what_cannot_work(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Mix(parts)
