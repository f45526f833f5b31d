"""Data files of every kind that users have, and a sentence for each fault of one."""

from __future__ import annotations

import bz2
import gzip
import json
import sys
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from reflux.config.recipe import load_recipe
from reflux.errors import DataError
from reflux.tasks.jsonl import Jsonl
from reflux.types import Prompt

ROWS = [{"id": f"q{k}", "prompt": f"{k}+1?", "answer": str(k + 1)} for k in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path: Path | str, **fields: Any) -> list[Prompt]:
    """All prompts of a file, by id."""
    fields = {"validation": 0.0, **fields}
    stream = Jsonl(str(path), **fields).prompts("train", 0)
    first = next(stream)
    found = {first.id: first}
    for prompt in islice(stream, 100):
        found[prompt.id] = prompt
    return [found[name] for name in sorted(found)]


def refusal(path: Path | str, **fields: Any) -> str:
    with pytest.raises(DataError, match="nothing was written") as refused:
        read(path, **fields)
    return str(refused.value)


def saved(folder: Path, content: Any, name: str = "own.jsonl") -> Path:
    path = folder / name
    if not isinstance(content, bytes):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    path.write_bytes(content)
    return path


def table(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "lines.json": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "two.jsonl.gz": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.csv": b"\xef\xbb\xbfid,prompt,answer\r\n"
    + b"".join(f"q{k},{k}+1?,{k + 1}\r\n".encode() for k in range(3)),
    "a.tsv": b"id\tprompt\tanswer\n" + b"".join(f"q{k}\t{k}+1?\t{k + 1}\n".encode() for k in range(3)),
    "A.PARQUET": table(ROWS),
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "mac.jsonl": LINES.replace(b"\n", b"\r"),
    "uncut.jsonl": LINES.rstrip(b"\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    asked = [({"role": "user", "content": f"{k}+1?"},) for k in range(3)]
    expected = [Prompt(f"q{k}", asked[k], answer=str(k + 1)) for k in range(3)]
    assert read(saved(tmp_path, FILES[name], name)) == expected


@pytest.mark.parametrize(("codec", "ending"), [("zstd", "zst"), ("lz4", "lz4")])
def test_zstandard_and_lz4_are_read(tmp_path: Path, codec: str, ending: str) -> None:
    path = tmp_path / f"a.jsonl.{ending}"
    with pyarrow.output_stream(str(path), compression=codec) as stream:
        stream.write(LINES)
    assert [prompt.answer for prompt in read(path)] == ["1", "2", "3"]
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot read" in refusal(path)


FAULTS: dict[str, tuple[bytes, str]] = {
    "a.arrow": (b"ARROW1", "ends in .arrow, which is not read"),
    "a.jsonl.xz": (b"", "ends in .xz, which is not read"),
    "a.jsonl.gz": (gzip.compress(LINES * 50)[:-30], "cannot read"),
    "plain.jsonl.gz": (LINES, "cannot read"),
    "a.parquet": (table(ROWS)[:-10], "is no whole Parquet file"),
    "empty.parquet": (table(ROWS)[:4], "is no whole Parquet file"),
    "none.csv": (b"id,prompt\n", "is empty"),
    "none.json": (b"[]", "is empty"),
    "wide.csv": (b"id,prompt\n1,a\n2,b,c\n", "row 2 has more cells than the first line"),
    "latin.csv": (b"id,prompt\n1,caf\xe9\n", "is not UTF-8 (byte 15)"),
    "long.csv": (b"prompt\n" + b"a" * 200_000 + b"\n", "is not CSV (field larger than field limit"),
    "open.csv": (b'prompt,answer\n"a,1\nb,2\n', "is not CSV (unexpected end of data)"),
    "columns.csv": (b"prompt,answer,prompt\na,1,b\n", "has the column 'prompt' twice"),
    "deep.json": (b'[{"prompt": "a"}, 3]', "entry 2 is not an object"),
    "cut.json": (b'[{"prompt": "a"}, {"pro', "The file may be cut off."),
    "cut.jsonl": (LINES + b'{"prompt": "9+', "line 4 is not JSON"),
    "also cut.jsonl": (LINES + b'{"prompt": "9+', "It is the last line, and the file may be cut off there."),
    "twice.jsonl": (b'{"prompt": "a", "answer": "1", "answer": "2"}\n', "line 1 has the key 'answer' twice"),
    "nan.jsonl": (b'{"prompt": "a", "answer": NaN}\n', "no finite number in its field 'answer'"),
    "huge.jsonl": (b'{"prompt": "a", "answer": 1e999}\n', "no finite number in its field 'answer'"),
    "half.jsonl": (b'{"prompt": "a\\ud83d"}\n', "half of a character"),
    "half chat.jsonl": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n', "half of a character"),
    "blank.jsonl": (b'{"messages": [{"role": "user", "content": " "}]}\n', "a user message without text"),
    "no parts.jsonl": (b'{"messages": [{"role": "user", "content": []}]}\n', "has no list of"),
    "route.jsonl": (b'{"prompt": "a", "route": ["x"]}\n', "neither text nor a number in its field 'route'"),
    "null.jsonl": (b'{"messages": [{"role": "user", "content": null}]}\n', "has no list of"),
    "digits.jsonl": (b'{"prompt": "a", "id": 7}\n{"prompt": "b", "id": "7"}\n', "has the id '7' of line 1"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_a_sentence(tmp_path: Path, name: str) -> None:
    content, words = FAULTS[name]
    assert words in refusal(saved(tmp_path, content, name))


def test_a_line_separator_in_a_text_splits_no_line(tmp_path: Path) -> None:
    texts = ["a\u2028b\u2029c", "d\x0be\x0cf\x1cg\x85h", "x" * 300_000]
    content = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    found = read(
        saved(
            tmp_path,
            content.replace(b"\x0b", b"\\u000b").replace(b"\x0c", b"\\f").replace(b"\x1c", b"\\u001c"),
        )
    )
    assert [prompt.messages[0]["content"] for prompt in found] == texts


# --- columns


def test_a_column_that_no_line_has_is_refused_with_the_columns_there(tmp_path: Path) -> None:
    rows = [
        {"question": "1+1?", "answer": 2, "info": {"level": 3, "empty": None}},
        {"question": "?", "x": None},
    ]
    path = saved(tmp_path, rows)
    for key in ("answer", "references", "route", "id"):
        said = refusal(path, keys={"prompt": "question", key: "anwser"})
        assert f"task.keys.{key} names the column 'anwser', in which no line has a value" in said
        assert "did you mean 'answer'?" in said
        assert said.endswith("Columns with values: answer, info.level, question.")
    for empty in ("x", "info.empty", "info.none", "question.a"):
        assert f"names the column '{empty}'" in refusal(path, keys={"prompt": "question", "answer": empty})
    assert "task.keys.prompt names the column 'prompts'" in refusal(path, keys={"prompt": "prompts"})


def test_held_out_lines_need_neither_references_nor_routes(tmp_path: Path) -> None:
    keys = {"references": "solution", "route": "source", "answer": "target"}
    train = saved(tmp_path, [{"prompt": "a", "solution": "b", "source": "c", "target": "d"}])
    test = saved(tmp_path, [{"prompt": "a", "target": "d"}], "test.jsonl")
    task = Jsonl(str(train), keys=keys, validation=str(test))
    assert next(task.prompts("validation", 0)).answer == "d"
    saved(tmp_path, [{"prompt": "a", "solution": "b", "source": "c"}], "test.jsonl")
    with pytest.raises(DataError, match=r"task\.keys\.answer names the column 'target'"):
        task.prompts("validation", 0)


@pytest.mark.parametrize("name", ["own.jsonl", "own.parquet"])
def test_the_layouts_of_other_libraries_are_read(tmp_path: Path, name: str) -> None:
    """TRL: messages as prompt and completion. verl: messages as prompt, the answer in a nested column."""
    chat = [{"role": "system", "content": "short"}, {"role": "user", "content": "1+1?"}]
    row = {
        "prompt": chat,
        "completion": [{"role": "assistant", "content": "2"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 5},
    }
    path = saved(tmp_path, table([row]) if name.endswith("parquet") else [row], name)
    keys = {"references": "completion", "answer": "reward_model.ground_truth", "id": "extra_info.index"}
    assert read(path, keys=keys) == [Prompt("5", tuple(chat), answer="2", references=("2",))]
    assert read(path, keys={"messages": "prompt"})[0].messages == tuple(chat)


def test_a_table_gives_no_message_keys_without_a_value(tmp_path: Path) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]
    expected = ({"role": "user", "content": "2+3?"}, {"content": None, **chat[1]}, chat[2])
    for name, content in (("a.parquet", table([{"messages": chat}])), ("a.jsonl", [{"messages": chat}])):
        assert read(saved(tmp_path, content, name))[0].messages == expected


def test_the_thinking_of_earlier_turns_is_kept_for_templates_that_read_it(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for key in ("reasoning_content", "reasoning", "thinking", "tool_plan"):
        messages = (chat[0], {**chat[1], key: "because"}, chat[0])
        path = saved(tmp_path, [{"messages": [{**message, "weight": 1} for message in messages]}])
        assert read(path)[0].messages == messages


def test_an_answer_of_a_table_may_be_an_exact_decimal(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": Decimal("1.50")}]
    assert read(saved(tmp_path, table(rows), "a.parquet"))[0].answer == "1.50"


def test_a_column_of_tools_is_not_read_and_said_so(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    for value, count in ((tools, 1), ([], 0), (None, 0)):
        task = Jsonl(str(saved(tmp_path, [{"prompt": "a", "tools": value}])))
        said = list(task.advice("task", load_recipe("opd", {"base": "hub"})))
        assert len([text for text in said if "the column 'tools' of" in text]) == count


def test_a_content_of_text_parts_is_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "2+3"}, {"type": "text", "text": "?"}]
    path = saved(tmp_path, [{"messages": [{"role": "user", "content": parts}]}])
    assert read(path)[0].messages == ({"role": "user", "content": "2+3?"},)
    for other in ({"type": "image", "text": "a"}, {"type": "text"}, "text"):
        path = saved(tmp_path, [{"messages": [{"role": "user", "content": [*parts, other]}]}])
        assert "has no list of" in refusal(path)


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        (" blue", (" blue",)),
        ([" blue", "red"], (" blue", "red")),
        ([], ()),
        ([{"role": "assistant", "content": "blue"}], ("blue",)),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "it has user and assistant",
        ),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "exactly one assistant message"),
        ([{"role": "assistant"}], "has no list of"),
        ([{"role": "assistant", "content": "b", "tool_calls": None, "thinking": ""}], ("b",)),
        *(
            ([{"role": "assistant", "content": "b", key: value}], f"an assistant message with '{key}'")
            for key, value in (("tool_calls", [{}]), ("reasoning_content", "a"), ("thinking", "a"))
        ),
        ("", "no list of texts in its field 'completion'"),
        (3, "no list of texts in its field 'completion'"),
    ],
)
def test_a_completion_is_a_reference(tmp_path: Path, completion: Any, found: Any) -> None:
    rows = [{"prompt": "The sky is", "completion": completion}, {"prompt": "a", "completion": "b"}]
    path, keys = saved(tmp_path, rows), {"references": "completion"}
    if isinstance(found, tuple):
        assert read(path, keys=keys)[0].references == found
    else:
        assert found in refusal(path, keys=keys)


def test_a_column_with_a_dot_in_its_name_comes_before_a_nested_one(tmp_path: Path) -> None:
    row = {"prompt": "a", "a.b": "outer", "a": {"b": "inner"}}
    assert read(saved(tmp_path, [row]), keys={"answer": "a.b"})[0].answer == "outer"


def test_a_damaged_folder_of_data_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dataset` may be a folder of files. The library that reads it has errors of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    saved(tmp_path / "data", b'{"prompt": "a"}\n{"prompt": \n', "train.jsonl")
    task = Jsonl(dataset=str(tmp_path / "data"), validation=0.0)
    with pytest.raises(
        DataError, match=r"cannot load split 'train' .*JSON parse error: .* in row 1.*nothing was"
    ):
        task.prompts("train", 0)
    saved(tmp_path / "data", ROWS, "train.jsonl")
    assert next(task.prompts("train", 0)).id in ("q0", "q1", "q2")


# --- graders


@pytest.mark.parametrize(
    ("source", "lacking"),
    [
        ("def judge(prompt, text):\n    return 1.0\n", False),
        ("from math import floor as judge\n", False),
        ("if True:\n    judge = print\n", False),
        ("from math import *\n", False),
        ("def __getattr__(name):\n    return print\n", False),
        ("def (\n", False),
        ("def judged(prompt, text):\n    return 1.0\n", True),
    ],
)
def test_a_grader_that_its_module_does_not_have_is_refused_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, lacking: bool
) -> None:
    name = f"grader_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    task = Jsonl(str(saved(tmp_path, ROWS)), grader=f"{name}:judge")
    said = list(task.refusals("task", load_recipe("opd", {"base": "hub"})))
    assert said == [f"task.grader: the module '{name}' has no function 'judge'."] * lacking
    assert name not in sys.modules
