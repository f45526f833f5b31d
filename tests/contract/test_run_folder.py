"""The run directory: where it cannot be, a full disk, and a run that goes on from another working folder."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import stat
import tomllib
from pathlib import Path
from typing import Any

import pytest

from reflux.cli.evaluate import evaluate_model
from reflux.cli.main import main
from reflux.cli.run import run_recipe
from reflux.config.recipe import load_recipe
from reflux.config.requirements import Requirements
from reflux.errors import RunError
from reflux.loop import train
from reflux.runtime.watch import Silent
from reflux.storage import files, recipe_paths, run_dir
from reflux.training import Options, Run

SMALL = (
    "steps=1",
    "prompts_per_step=2",
    "save_every=1",
    "threads=1",
    "sampler.max_tokens=4",
    "learner.lr=1e-3",
)
NO_EVALS = tuple(f"evals.{name}=none" for name in load_recipe("vopd").evals)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("file", "file is a file"),
        ("file/run", "file is a file"),
        ("file/a/b", "file is a file"),
        ("dangling", "dangling is a link to something that does not exist"),
        ("dangling/run", "dangling is a link to something that does not exist"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_place_where_no_folder_can_be_is_refused(place: Path, out: str, why: str, resume: bool) -> None:
    before = sorted(place.rglob("*"))
    for path in (Path(out), place / out):
        for start in (run_recipe, opened):
            with pytest.raises(
                RunError, match=rf"cannot be the output folder: .*{why}\. Choose another .* --out"
            ):
                start("opd", ["steps=1"], path, resume)
    assert sorted(place.rglob("*")) == before


def opened(recipe: str, overrides: list[str], out: Path, resume: bool) -> None:
    Run.open(load_recipe(recipe, overrides), Requirements(), Options(out, resume)).close()


@pytest.mark.parametrize("out", ["new", "new/a/b", "folder", "folder/a", "link", "link/a"])
def test_other_places_are_taken(place: Path, out: str) -> None:
    opened("opd", ["steps=1"], Path(out), False)
    assert (place / out / "config.toml").is_file()


def test_a_folder_without_rights_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The user of the tests may be root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place / "folder")
    for out in ("folder", "folder/a"):
        with pytest.raises(RunError, match=r"there is no permission to write to .*folder\. Choose another"):
            opened("opd", ["steps=1"], place / out, False)

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(RunError, match=r"new cannot be the output folder: Permission denied\. Choose"):
        opened("opd", ["steps=1"], place / "new", False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this machine")
@pytest.mark.parametrize("name", ["attempts.jsonl", "metrics.jsonl"])
def test_a_full_disk_ends_in_a_sentence_and_the_run_goes_on_afterwards(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command = ["reflux", "run", "vopd", *SMALL, *NO_EVALS, "--out", "folder"]
    append = files.append_lines

    def full(path: Path, rows: list[dict[str, Any]]) -> None:
        append(Path("/dev/full") if path.name == name else path, rows)

    with monkeypatch.context() as patch:
        patch.setattr(files, "append_lines", full)
        patch.setattr("sys.argv", command)
        with pytest.raises(SystemExit, match="2"):
            main()
    assert "the disk is full. What was saved before is intact. Free some" in capsys.readouterr().err
    run_recipe("vopd", [*SMALL, *NO_EVALS], place / "folder", True)
    assert steps_of(place / "folder") == [1]


def steps_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def start(student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with models and prompts in it."""
    folder = tmp_path / "start" / "here"
    shutil.copytree(student, folder.parent / "student")
    shutil.copytree(teacher, folder / "models" / "teacher")
    rows = [{"prompt": f"{k}+1?", "answer": k + 1} for k in range(9)]
    for name in ("own", "held"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    return folder


def named(**changes: str) -> list[str]:
    names = {
        "learner.model": "../student",
        "teachers.main.model": "models/teacher",
        "task.kind": "jsonl",
        "task.path": "own.jsonl",
        "task.validation": "./held.jsonl",
    }
    return [*SMALL, *NO_EVALS, *(f"{key}={value}" for key, value in (names | changes).items())]


def test_a_run_with_relative_paths_goes_on_and_is_evaluated_elsewhere(
    start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start / "run"
    run_recipe("opd", named(), Path("run"), False)
    saved = tomllib.loads((run / "config.toml").read_text())
    assert saved["learner"]["model"] == str(start.parent / "student")
    assert saved["teachers"]["main"]["model"] == str(start / "models" / "teacher")
    assert (saved["task"]["path"], saved["task"]["validation"]) == (
        str(start / "own.jsonl"),
        str(start / "held.jsonl"),
    )
    run_recipe("opd", [*named(), "steps=2"], Path("run"), True)
    monkeypatch.chdir(start.parents[1] / "elsewhere")
    run_recipe("opd", [*named(), "steps=3"], run, True)
    whole = {"learner.model": str(start.parent / "student"), "task.path": str(start / "own.jsonl")}
    run_recipe("opd", [*named(**whole), "steps=4"], run, True)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
    ]
    capsys.readouterr()
    evaluate_model(str(run), None, 3, 0, 4, [])
    assert "accuracy" in capsys.readouterr().out


def test_another_file_of_that_name_is_another_recipe(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened("opd", named(), start / "run", False)
    elsewhere = start.parents[1] / "elsewhere"
    shutil.copy(start / "own.jsonl", elsewhere / "own.jsonl")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(RunError, match=r"task\.path: was '.*here/own\.jsonl', is '.*elsewhere/own\.jsonl'"):
        run_recipe("opd", named(), start / "run", True)


def test_a_data_file_that_has_changed_is_refused(start: Path) -> None:
    opened("opd", named(), start / "run", False)
    kept = ["learner.model", "task.path", "task.validation", "teachers.main.model"]
    assert sorted(json.loads((start / "run" / "data.json").read_text())) == kept
    whole = (start / "own.jsonl").read_text()
    (start / "own.jsonl").write_text(whole + '{"prompt": "new?", "answer": 1}\n')
    with pytest.raises(RunError, match=r"the content of task\.path has changed since the run in .*run was"):
        opened("opd", named(), start / "run", True)
    (start / "own.jsonl").write_text(whole)
    opened("opd", named(), start / "run", True)


@pytest.mark.parametrize(
    ("key", "file"), [("task.path", "folder/train.jsonl"), ("teachers.main.model", "models/teacher/{}")]
)
def test_a_folder_of_data_or_a_template_that_has_changed_is_refused(start: Path, key: str, file: str) -> None:
    (start / "folder").mkdir()
    for split in ("train", "test"):
        row = {"question": "1+1?", "answer": "1+1=2\n#### 2"}
        (start / "folder" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(40)))
    changes = {"task.kind": "gsm8k", "task.path": "folder"}
    recipe = [entry for entry in named(**changes) if not entry.startswith("task.validation")]
    template = start / "models" / "teacher" / "chat_template.jinja"
    changed = template if template.exists() else template.with_name("tokenizer_config.json")
    changed = start / file.format(changed.name)
    opened("opd", recipe, start / "run", False)
    (start / "folder" / "notes.md").write_text("notes are no data")
    (start / "models" / "teacher" / "README.md").write_text("nor are they a template")
    opened("opd", recipe, start / "run", True)
    changed.write_text(changed.read_text() + "\n")
    with pytest.raises(RunError, match=rf"the content of {re.escape(key)} has changed since the run in"):
        opened("opd", recipe, start / "run", True)


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def test_a_network_file_system_without_locks_rights_and_folder_syncs_is_enough(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def no_rights(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    fsync = os.fsync

    def only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(run_dir.fcntl, "flock", no_locks)
    monkeypatch.setattr(Path, "chmod", no_rights)
    monkeypatch.setattr(os, "fsync", only_files)
    notes = Notes()
    cfg = load_recipe("vopd", [*SMALL, *NO_EVALS])
    asyncio.run(train(cfg, Options(place / "folder", watch=notes)))
    assert [text for text in notes.texts if "without file locks (No locks available)" in text]
    assert (place / "folder" / "student" / "config.json").is_file()

    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_folder(place)


def test_names_that_are_no_files_stay_as_they_are(start: Path) -> None:
    (start / "math").write_text("a file with the name of a grader")
    changes = {"learner.model": "org/name", "task.path": "none.jsonl", "task.grader": "math"}
    table = recipe_paths.absolute(load_recipe("opd", named(**changes)))
    assert table["learner"]["model"] == "org/name"
    assert (table["task"]["path"], table["task"]["grader"]) == ("none.jsonl", "math")
    (start / "validation").mkdir()
    hub = {"task": {"kind": "jsonl", "dataset": "a/b", "validation": "validation"}}
    assert recipe_paths.absolute(load_recipe("opd", hub))["task"]["validation"] == "validation"


def test_parts_in_parts_and_lists_are_found(start: Path) -> None:
    own = {"kind": "jsonl", "path": "own.jsonl"}
    mixed = load_recipe("opd", {"task": {"kind": "mix", "parts": {"a.b": own}}})
    table = recipe_paths.absolute(mixed)
    assert table["task"]["parts"]["a.b"]["path"] == str(start / "own.jsonl")
    merge = {"learner.merge": {"models": ["models/teacher", "org/name"]}, "learner.lora": "none"}
    table = recipe_paths.absolute(load_recipe("flow", merge))
    assert table["learner"]["merge"]["models"] == [str(start / "models" / "teacher"), "org/name"]


def test_resume_without_a_folder_leaves_out_runs_that_made_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, made in (("full", "metrics.jsonl"), ("full-2", None)):
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text("")
        if made:
            (folder / made).write_text("")
    assert run_dir.choose_folder("full", None, resume=True) == Path("runs/full")
    assert run_dir.choose_folder("full", None, resume=False) == Path("runs/full-3")
