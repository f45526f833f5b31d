"""Half of a surrogate pair, which JSON can spell: it reaches no tokenizer, no file and no terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reflux.models.chat.ends import end_ids
from reflux.models.chat.renderer import Renderer
from reflux.models.chat.surrogates import whole_characters
from reflux.storage.files import append_lines, read_lines, write_text
from tokenizer_kinds import KINDS, MARKED

HALF = "a\ud800b"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (HALF, "a\ufffdb"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("é😀", "é😀"),
        ("x\ud83d", "x\ufffd"),
    ],
)
def test_halves_are_replaced_and_pairs_are_joined(text: str, whole: str) -> None:
    assert whole_characters(text) == whole


@given(st.text(st.characters(codec=None, categories=None)))
def test_every_text_can_be_written(text: str) -> None:
    whole = whole_characters(text)
    assert whole.encode().decode() == whole
    assert whole_characters(whole) is whole


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_answers_are_tokenised(kind: str) -> None:
    tokenizer = KINDS[kind](MARKED)
    renderer, ends = Renderer(tokenizer), end_ids(tokenizer, None)
    given_, plain = ([{"role": "user", "content": text}] for text in (HALF, "a\ufffdb"))
    assert renderer.ids(given_) == renderer.ids(plain)
    assert renderer.answer_ids(given_, HALF, ends) == renderer.answer_ids(plain, "a\ufffdb", ends)


def test_files_take_it(tmp_path: Path) -> None:
    for _ in range(2):
        write_text(tmp_path / "page.html", HALF)
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "a\ufffdb"
    append_lines(tmp_path / "rows.jsonl", [{"text": HALF}])
    assert list(read_lines(tmp_path / "rows.jsonl")) == [{"text": HALF}]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_without_a_character_gets_its_code(encoding: str) -> None:
    """Whatever a model or a data file wrote, the command goes on."""
    told = f"from reflux.cli.main import app, main; app.command('x')(lambda: print({HALF + 'λ'!a})); main()"
    done = subprocess.run(
        [sys.executable, "-c", told, "x"],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    shown = "λ" if encoding == "utf-8" else "\\u03bb"
    assert done.stdout.decode(encoding).strip() == f"a\\ud800b{shown}"
