"""What the preflight warns about templates, on opened models."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from reflux.loop import train
from reflux.training import Options

ON: dict[str, Any] = {"task": {"kind": "outside:Chat"}, "steps": 0, "skip_checks": []}


def template_of(folder: Path, change: Callable[[str], str]) -> None:
    """Rewrite the chat template in the files of a tokenizer."""
    file = folder / "chat_template.jinja"
    if file.exists():
        file.write_text(change(file.read_text()))
        return
    config = folder / "tokenizer_config.json"
    table = json.loads(config.read_text())
    config.write_text(json.dumps({**table, "chat_template": change(table["chat_template"])}))


def warned(student: str, teacher: str, out: Path, **more: Any) -> list[str]:
    heard = tiny.Heard()
    cfg = tiny.config("full", student, teacher, **ON, **more)
    asyncio.run(train(cfg, Options(out, watch=heard)))
    return [note for note in heard.notes if note.startswith("preflight: template: ")]


def copied(model: str, folder: Path, change: Callable[[str], str]) -> str:
    shutil.copytree(model, folder)
    template_of(folder, change)
    return str(folder)


def test_models_of_one_template_that_end_their_answers_give_no_warning(
    student: str, teacher: str, tmp_path: Path
) -> None:
    assert warned(student, teacher, tmp_path / "run") == []


def test_a_template_that_prints_the_clock(student: str, teacher: str, tmp_path: Path) -> None:
    dated = copied(student, tmp_path / "dated", lambda text: "{{ strftime_now('%H') }}" + text)
    found = warned(dated, teacher, tmp_path / "run")
    assert any("writes the time into the prompt" in text for text in found)
    assert any("teacher 'main' renders the same messages in another way" in text for text in found)


def test_a_template_argument_that_nothing_reads(student: str, teacher: str, tmp_path: Path) -> None:
    found = warned(student, teacher, tmp_path / "run", learner__template={"enable_thinking": True})
    assert found == [
        "preflight: template: the chat template does not read enable_thinking of learner.template"
    ]


@pytest.mark.parametrize(("lift", "count"), [(-30.0, 1), (2.0, 0)])
def test_a_student_that_never_gives_the_end_token(
    teacher: str, tmp_path: Path, lift: float, count: int
) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    student = tiny.save(tiny.net(1, lift=lift), folder)
    found = [text for text in warned(student, teacher, tmp_path / "run") if "almost" in text or "end" in text]
    assert len(found) == count
    assert all("gives the template's end token '<end>' a probability of at most" in text for text in found)
