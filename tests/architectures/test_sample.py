"""A sample of docs/what_runs.md: a few types of each kind of architecture. `make test-models` tries all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from architectures import matrix, tiny_models
from architectures.outcome import REFUSED, RIGHT, UNTRIED, WRONG, Outcome, judged, outcome, told, trial
from architectures.page import PAGE, page, recorded
from architectures.parity import ALIVE, TOLERANCE
from reflux.errors import ModelError

# types that are neither right nor refused; there must be no other
FAULTS: set[str] = set()
SAMPLE = {
    "llama": "rotary positions",
    "gpt2": "learned positions",
    "falcon (alibi)": "biases by distance",
    "qwen3_moe": "a mixture of experts",
    "gemma2": "sliding windows, capped logits",
    "gemma3": "the text part of a model for images",
    "qwen3_next": "linear attention with full attention",
    "lfm2": "convolutions with full attention",
    "mamba2": "a state space",
    "phi3 (longrope)": "angles that depend on the length",
    "deepseek_v3": "latent attention",
    "cohere": "scaled logits, parallel blocks",
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_type_does_what_the_page_says(name: str, tmp_path: Path) -> None:
    assert outcome(name, tmp_path) == recorded()[name]


def test_the_page_has_one_row_for_each_type_and_is_written_as_now() -> None:
    rows = recorded()
    assert list(rows) == tiny_models.names()
    assert {name for name, row in rows.items() if row.fault} == FAULTS
    assert {row.lora for row in rows.values() if row.verdict == RIGHT} <= {RIGHT, REFUSED, WRONG}
    assert all(row.note for row in rows.values() if (row.verdict, row.lora) != (RIGHT, RIGHT))
    assert page(list(rows.values())) == PAGE.read_text()


def test_a_gap_is_wrong_and_a_model_without_a_past_is_not_tried() -> None:
    close = {"sampler": TOLERANCE, "loss": 0.0}
    assert judged({"first token": 1.0, **close}) == (RIGHT, "")
    assert judged({"first token": ALIVE / 2, **close})[0] == UNTRIED
    apart = {"sampler": 2 * TOLERANCE, "loss": float("nan")}
    assert judged({"first token": 1.0, **apart}) == (WRONG, "sampler 0.002, loss nan nats apart")


def test_only_a_refusal_before_the_first_step_counts_as_one(tmp_path: Path) -> None:
    def refuse(out: Path) -> dict[str, float]:
        raise ModelError("learner.model: no")

    def crash(out: Path) -> dict[str, float]:
        raise ValueError("shapes")

    assert trial(tmp_path, "run", refuse) == (REFUSED, "learner.model: no")
    assert trial(tmp_path, "run", crash) == (WRONG, "the check itself: ValueError: shapes")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    assert trial(tmp_path, "run", refuse) == (WRONG, "refused only after the first step: learner.model: no")


def test_a_note_is_one_sentence_without_what_differs_from_run_to_run(tmp_path: Path) -> None:
    said = f"learner.model: {tmp_path / 'student'} is 7.25 | 1e-05 off at position 3,\nsee {tmp_path}/run"
    assert told(ValueError(said), tmp_path) == (
        "learner.model: MODEL is N / N off at position N, see MODEL/run"
    )
    assert told(ValueError("{'b', 'a'} of qwen2.5, 3 layers. Do this."), tmp_path) == (
        "{'a', 'b'} of qwen2.5, 3 layers"
    )


def test_a_crash_and_a_hang_of_a_type_are_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def behave(name: str, folder: Path) -> Outcome:
        if name == "crash":
            os._exit(9)
        while name == "hang":
            time.sleep(0.1)
        return Outcome(name, RIGHT)

    monkeypatch.setattr(matrix, "outcome", behave)
    monkeypatch.setattr(matrix, "LIMIT_S", 2)
    rows = matrix.tried(["crash", "hang", "fine"], 2)
    assert [(row.name, row.verdict, row.note) for row in rows] == [
        ("crash", WRONG, "the process ended with 9"),
        ("hang", WRONG, "no end after 2 s"),
        ("fine", RIGHT, ""),
    ]


def test_a_changed_row_fails_and_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "what_runs.md")
    matrix.written(page([Outcome("llama", RIGHT), Outcome("gpt2", RIGHT)]))
    assert matrix.compared(page([Outcome("llama", RIGHT), Outcome("gpt2", RIGHT)])) == 0
    capsys.readouterr()
    assert matrix.compared(page([Outcome("llama", RIGHT), Outcome("gpt2", REFUSED, note="why")])) == 1
    assert "-| gpt2 | right |  |  |" in (shown := capsys.readouterr().out)
    assert "+| gpt2 | refused |  | why |" in shown
