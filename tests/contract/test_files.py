"""Files are whole or absent, and lines are cut back exactly."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from reflux.storage import files


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_text(path, "old")
    monkeypatch.setattr(files.os, "fsync", _fail)
    with pytest.raises(OSError, match="disk"):
        files.write_text(path, "new")
    assert path.read_text() == "old"


def test_a_folder_keeps_its_old_content_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "model"
    files.write_folder(path, lambda scratch: (scratch / "a").write_text("1") and None)

    def half(scratch: Path) -> None:
        (scratch / "a").write_text("2")
        _fail()

    with pytest.raises(OSError, match="disk"):
        files.write_folder(path, half)
    assert (path / "a").read_text() == "1"
    files.write_folder(path, lambda scratch: (scratch / "b").write_text("3") and None)
    assert sorted(entry.name for entry in path.iterdir()) == ["b"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model"]


def _fail(*_: object) -> None:
    raise OSError("the disk is full")


def test_lines_survive_whatever_a_model_writes(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    rows = [{"step": 1, "text": 'ä\n"\u2028\x85 \\ é'}, {"step": 2, "text": "🜁"}]
    files.append_lines(path, rows)
    assert list(files.read_lines(path)) == rows
    assert len(path.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_last_line_cut_anywhere_is_passed_over(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "lines.jsonl"
    files.append_lines(path, [{"step": 1, "text": "é"}])
    whole = path.read_bytes()
    line = (json.dumps({"step": 2, "text": "ééé 🜁🜁 ä"}, ensure_ascii=False) + "\n").encode()
    path.write_bytes(whole + line[: min(cut, len(line) - 1)])
    assert [row["step"] for row in files.read_lines(path)] == [1]
    files.keep_lines(path, lambda row: True)
    assert path.read_bytes() == whole


def test_cutting_back_keeps_the_bytes_of_what_stays(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    files.append_lines(path, [{"step": step, "x": 1 / 3, "text": "é"} for step in range(5)])
    whole = path.read_bytes().splitlines(keepends=True)
    files.keep_lines(path, lambda row: row["step"] <= 2)
    assert path.read_bytes().splitlines(keepends=True) == whole[:3]
    before = path.stat().st_mtime_ns
    files.keep_lines(path, lambda row: row["step"] <= 2)
    assert path.stat().st_mtime_ns == before
    files.keep_lines(tmp_path / "absent.jsonl", lambda row: True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["lines.jsonl"]


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    files.append_lines(tmp_path / "a.jsonl", [{"a": float("nan"), "b": {"c": [float("inf"), 1.5]}}])
    assert (tmp_path / "a.jsonl").read_text() == '{"a":null,"b":{"c":[null,1.5]}}\n'


def test_a_full_disk_is_said_as_one_and_leaves_the_old_folder(tmp_path: Path) -> None:
    def fill(scratch: Path) -> None:
        (scratch / "half").write_text("x")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    files.write_folder(tmp_path / "kept", lambda scratch: (scratch / "a").write_text("old") and None)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_folder(tmp_path / "kept", fill)
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "a").read_text() == "old"
