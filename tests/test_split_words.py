"""Problems are called by the split that a row records: training problems are nowhere called held out, or test
problems.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tiny
from reflux.cli import run as command
from reflux.cli.progress import Progress
from reflux.reports.asked import problems_of, sentence, split_of
from reflux.reports.curves import kl_chart, position_chart
from reflux.reports.evals import read_evals
from reflux.reports.metrics import read_metrics
from reflux.reports.page import write_report
from reflux.reports.tables import before_after_text
from synthetic_images import write_picture_run
from synthetic_run import write_lines, write_run

WORDS = {"train": "training", "validation": "validation", "test": "test"}


def test_the_words_of_a_split() -> None:
    assert [problems_of([split]) for split in WORDS] == [
        "training problems",
        "validation problems",
        "test problems",
    ]
    assert problems_of(["test", "train", "test"]) == "training and test problems"
    assert problems_of(["test", None]) == problems_of([]) == "problems"
    assert sentence(["train"], "prompts") == "Training prompts"
    assert [split_of(value) for value in ("test", "dev", None, 3)] == ["test", None, None, None]


def of_split(folder: Path, split: str) -> Path:
    for path in (folder / "evals.jsonl", folder / "summary.json"):
        path.write_text(path.read_text().replace('"split": "test"', f'"split": "{split}"'))
    return folder


def words_of(page: Path) -> str:
    """Without styles and scripts; the numbers of charts are kept, for they have names."""
    text = re.sub(
        r"<style>.*?</style>|<script>.*?</script>|<script type=\"text/plain\".*?</script>",
        "",
        page.read_text(),
        flags=re.DOTALL,
    )
    return text.split("config.toml, as resolved")[0]


@pytest.mark.parametrize("split", WORDS)
@pytest.mark.parametrize("write", [write_run, write_picture_run], ids=["texts", "images"])
def test_the_page_calls_problems_by_their_split(tmp_path: Path, split: str, write: Any) -> None:
    words = words_of(write_report(of_split(write(tmp_path / "run"), split)))
    assert f"{WORDS[split].capitalize()} problems; the band" in words
    assert f'"name":"{WORDS[split]} problems"' in words.replace('": ', '":')
    assert re.search(rf"<td>\d+ {WORDS[split]}</td>", words)
    others = [word for other, word in WORDS.items() if other != split]
    assert not re.search(rf"held.out|({'|'.join(others)}) (problems|prompts)", words, re.IGNORECASE)


def test_a_run_that_records_no_split_speaks_of_problems() -> None:
    moments = read_evals(
        [
            {
                "step": 0,
                "agreement": {"kl_nats": 0.5, "by_position": [{"position": 0, "width": 1, "kl_nats": 0.5}]},
            }
        ]
    )
    assert position_chart(moments).caption.startswith("Problems; the band")
    assert kl_chart(read_metrics([]), moments).rows == [("problems", "0", "0.5000")]


def test_ends_of_intervals_that_are_not_known_are_left_out_of_the_page(tmp_path: Path) -> None:
    bins = [
        {"position": at, "width": 1, "kl_nats": 0.5, "low": low, "high": low}
        for at, low in enumerate((0.4, None))
    ]
    row = {
        "step": 0,
        "agreement": {"kl_nats": 0.5, "low": None, "high": None, "split": "train", "by_position": bins},
    }
    parts = {"parts": ["style"], "style": 1.0, "style.low": None, "style.high": None}
    row["accuracy"] = {"accuracy": 0.0, "low": None, "high": None, "problems": 3, "split": "train", **parts}
    chart = position_chart(read_evals([row]))
    assert [line[3] for line in chart.rows] == ["0.4000 to 0.4000", "–"]
    write_lines(tmp_path / "evals.jsonl", [row])
    assert "3 training" in words_of(write_report(tmp_path))


@pytest.mark.parametrize("split", WORDS)
def test_the_terminal_calls_problems_by_their_split(
    tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = {"accuracy": 0.25, "low": 0.1, "high": 0.4, "problems": 12, "split": split}
    assert f"12 {WORDS[split]}" in before_after_text(
        {"accuracy_before": score, "accuracy_after": score, "teacher_accuracy": score}
    )
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    shown = Progress(console, tiny.config("opd", "reflux:student", "reflux:teacher"))
    shown.evaluated({"step": 0, "accuracy": score})  # type: ignore[arg-type]
    assert printed.getvalue() == f"step    0  accuracy  25.0%  (10.0% to 40.0%, 12 {WORDS[split]} problems)\n"
    monkeypatch.setattr(command, "console", console)
    example = {"prompt": "2+3?", "answer": "5", "text": "5", "verdict": 1.0}
    write_lines(
        tmp_path / "evals.jsonl",
        [{"step": step, "accuracy": {**score, "examples": [example]}} for step in (0, 9)],
    )
    command._show_problem(tmp_path)
    assert f"One {WORDS[split]} problem\n" in printed.getvalue()
    assert "held-out" not in printed.getvalue()


def test_the_rows_and_the_summary_of_a_run_record_the_split(tiny_run: Any) -> None:
    asked = {"kind": "accuracy", "problems": 2, "examples": 0, "split": "train"}
    sizes = {
        "evals__accuracy": asked,
        "evals__agreement": {"kind": "agreement", "prompts": 2, "split": "validation"},
    }
    done = tiny_run(
        "opd",
        steps=1,
        **sizes,
        evals__teacher_accuracy={"kind": "teacher_accuracy", "problems": 2, "split": "train"},
    )
    first = done.rows("evals")[0]
    assert {name: first[name]["split"] for name in ("accuracy", "agreement", "teacher_accuracy")} == {
        "accuracy": "train", "agreement": "validation", "teacher_accuracy": "train",
    }  # fmt: skip
    assert {
        done.summary[name]["split"] for name in ("accuracy_before", "accuracy_after", "teacher_accuracy")
    } == {"train"}
