"""report.html: complete, offline, and safe whatever the files of a run say. Its parts are in
test_report_parts.py.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from reflux.reports.page import write_report
from synthetic_run import attempt_rows, evals_row, metrics_row, summary, write_lines, write_run

KEYS = (
    "step",
    "kind",
    "prompt",
    "tokens",
    "mask",
    "seconds",
    "flops",
    "accuracy",
    "agreement",
    "accuracy_before",
    "health",
    "teachers",
)
FILES = (
    "config.toml",
    "metrics.jsonl",
    "evals.jsonl",
    "attempts.jsonl",
    "summary.json",
    "student/tokenizer.json",
)
HOSTILE = (
    "</script><script>document.documentElement.dataset.pwned=1</script>"
    '<img src=x onerror="document.documentElement.dataset.pwned=1">\'"`&amp;<!--]]></title></style>'
    "{{ 7 * 7 }}{% raw %}${7}\\u202e \u202e\u2066\u0007\ud800 end"
)
SEEN = (
    HOSTILE.replace("\u202e", "⟨U+202E⟩")
    .replace("\u2066", "⟨U+2066⟩")
    .replace("\u0007", "⟨U+0007⟩")
    .replace("\ud800", "⟨U+D800⟩")
)


class Page(HTMLParser):
    """What a browser would make of the page: its elements, their attributes, its words, its scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.classes: Counter[str] = Counter()
        self.words, self.scripts, self._inside = "", [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.classes.update((dict(attrs).get("class") or "").split())
        self._inside = tag
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1][1] += data
        elif self._inside != "style":
            self.words += data


def page_of(folder: Path) -> Page:
    return Page(write_report(folder))


def hostile_run(folder: Path) -> Path:
    """A run in which every text that a person, a file or a model supplies is an attack."""
    write_run(folder, steps=6)
    acted, learned = attempt_rows(0, 0, 6)
    attack = {"prompt": HOSTILE, "question": HOSTILE, "text": HOSTILE, "finish": HOSTILE, "version": HOSTILE}
    tokens = {"tokens": [60, 61] * 5}
    write_lines(folder / "attempts.jsonl", [{**acted, **attack, **tokens}, {**learned, "prompt": HOSTILE}])
    moments = [evals_row(step, 6) for step in (0, 6)]
    for step_context in moments:
        step_context["accuracy"]["examples"] = [
            {"prompt": HOSTILE, "question": HOSTILE, "answer": HOSTILE, "text": HOSTILE, "right": 0.0}
        ]
        step_context[HOSTILE] = {"accuracy": 0.5}
    write_lines(folder / "evals.jsonl", moments)
    table = summary(6) | dict.fromkeys(("recipe", "method", "commit", "config_hash", "seed"), HOSTILE)
    (folder / "summary.json").write_text(json.dumps(table))
    # TOML's basic strings are JSON's, but hold no lone surrogates
    written = json.dumps(HOSTILE.replace("\ud800", ""))
    (folder / "config.toml").write_text(
        f"[learner]\nmodel = {written}\n[teachers.{written}]\nmodel = {written}\n"
    )
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    write_lines(folder / "metrics.jsonl", [{**row, "health": [HOSTILE]} for row in metrics])
    tokenizer = json.loads((folder / "student" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][HOSTILE.replace("\ud800", "")] = 200
    (folder / "student" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(write_run(tmp_path_factory.mktemp("run") / "r"))


def test_a_finished_run_has_every_section(run_page: Page):
    for words in (
        "In 60 steps (1 min 27 s) the student's accuracy went from 19.0\u00a0% to 81.7\u00a0%; "
        "the teacher's accuracy is 98.6\u00a0%.",
        "4f1c2ab",
        "9d0e7c",
    ):
        assert words in run_page.words
    assert run_page.classes["plot"] == 6
    assert run_page.classes["attempt"] == 10
    assert run_page.classes["answer"] == 8
    assert "Expected answer: 16" in run_page.words
    assert "unfinished" not in run_page.words
    assert run_page.classes["right"] == 3
    assert run_page.classes["wrong"] == 4
    assert run_page.classes["not-graded"] == 1


def test_every_token_of_the_shown_attempts_has_a_colour_and_its_numbers(run_page: Page):
    titles = [value for name, value in run_page.attributes if name == "title"]
    assert len(titles) == 10 * 40
    assert all("log q − log p" in title and "nats" in title for title in titles if title)
    # the legend has the nine colours
    assert run_page.classes["t"] == 10 * 40 + 9


def test_the_page_asks_for_nothing_from_outside(run_page: Page):
    assert not [pair for pair in run_page.attributes if pair[0] in ("src", "srcset", "data", "action")]
    assert all(value and value.startswith("#") for name, value in run_page.attributes if name == "href")
    assert "url(" not in run_page.source.split("</style>")[0]
    assert not run_page.tags["link"]


def test_the_policy_admits_the_two_scripts_of_the_page_and_no_other(run_page: Page):
    (policy,) = [
        value for name, value in run_page.attributes if name == "content" and value and "default-src" in value
    ]
    own = [text for attributes, text in run_page.scripts if "type" not in attributes]
    packed = [text for attributes, text in run_page.scripts if attributes.get("id") == "library"]
    allowed = [*own, *(gzip.decompress(base64.b64decode(text)).decode() for text in packed)]
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in allowed
    }
    (sources,) = [part.split()[1:] for part in policy.split(";") if part.split()[0] == "script-src"]
    assert len(hashes) == 2
    assert set(sources) == hashes
    assert "default-src 'none'" in policy


def test_hostile_text_stays_text(tmp_path: Path):
    page, plain = page_of(hostile_run(tmp_path / "hostile")), page_of(write_run(tmp_path / "plain", steps=6))
    assert page.tags["script"] == plain.tags["script"]
    assert page.tags["style"] == 1
    assert page.tags["title"] == 1
    assert not page.tags["img"]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    # recipe (twice), method, commit, hash, seed, alarm, attempt (5), example (4) and its pair
    assert page.words.count(SEEN) >= 13
    assert not set(page.source) & set("\u202e\u2066\u0007")
    assert all(
        json.loads(text) for attributes, text in page.scripts if attributes.get("type") == "application/json"
    )


def test_hostile_vocabulary_stays_text(tmp_path: Path):
    folder = hostile_run(tmp_path / "r")
    acted, learned = attempt_rows(0, 0, 6)
    write_lines(folder / "attempts.jsonl", [{**acted, "tokens": [200]}, learned])
    page = page_of(folder)
    expected = SEEN.replace("⟨U+D800⟩", "")
    assert expected in page.words
    assert any(name == "title" and value and expected in value for name, value in page.attributes)


@pytest.mark.parametrize("missing", FILES)
@pytest.mark.parametrize("how", ["absent", "nonsense", "wrong types"])
def test_any_file_may_be_missing_or_damaged(tmp_path: Path, missing: str, how: str):
    path = write_run(tmp_path / "r", steps=3) / missing
    contents = {"nonsense": "\x00{]", "wrong types": json.dumps({key: [1, {}, None] for key in KEYS}) + "\n"}
    path.unlink()
    if how != "absent":
        path.write_text(contents[how])
    page = page_of(tmp_path / "r")
    assert page.classes["absent"] + page.classes["notes"] + page.classes["banner"] > 0


@pytest.mark.parametrize("value", [None, "x", [[]], -1e300])
@pytest.mark.parametrize(
    "key", ["seconds", "kl_nats", "tokens", "teacher_logp", "accuracy", "by_position", "examples", "reward"]
)
def test_a_field_of_another_type_is_left_out(tmp_path: Path, key: str, value: object):
    folder = write_run(tmp_path / "r", steps=2, per_step=1)
    for name in ("metrics.jsonl", "evals.jsonl", "attempts.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in lines:
            for table in (row, *[inner for inner in row.values() if isinstance(inner, dict)]):
                table.update({key: value} if key in table else {})
        write_lines(folder / name, lines)
    assert "Reflux run report" in page_of(folder).words


@pytest.mark.parametrize("files", [(), FILES])
def test_a_run_killed_at_once_has_a_page_that_says_so(tmp_path: Path, files: tuple[str, ...]):
    (tmp_path / "student").mkdir()
    for name in files:
        (tmp_path / name).write_text("")
    page = page_of(tmp_path)
    assert "unfinished: step 0" in page.words
    assert "No accuracy was measured" in page.words
    assert "holds no attempt" in page.words
    assert page.classes["plot"] == 0
    assert len(page.source) < 100_000


def test_an_unfinished_run_says_where_it_stands(tmp_path: Path):
    page = page_of(write_run(tmp_path / "r", steps=30, planned=200))
    assert "unfinished: step 30 of 200" in page.words
    assert "student at step 30" in page.words
    assert "not measured yet" in page.words


def test_a_line_cut_by_a_kill_costs_one_line_and_is_told(tmp_path: Path):
    folder = write_run(tmp_path / "r", steps=12)
    for name in ("metrics.jsonl", "evals.jsonl", "attempts.jsonl"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-20])
    page = page_of(folder)
    assert page.words.count("the last line is cut off") == 3
    assert page.classes["attempt"] == 10
    assert page.classes["plot"] == 6


def test_numbers_that_are_not_finite_are_left_out_of_the_charts(tmp_path: Path):
    folder = write_run(tmp_path / "r", steps=4)
    lines = [
        metrics_row(step, 4) | {"kl_nats": bad}
        for step, bad in enumerate([0.5, float("nan"), float("inf"), 0.2], 1)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    page = page_of(folder)
    charts = {
        attributes["id"]: json.loads(text, parse_constant=pytest.fail)
        for attributes, text in page.scripts
        if "type" in attributes and text[0] == "{"
    }
    training = charts["progress-2"]["data"][0]
    assert (training["x"], training["y"]) == ([1, 4], [0.5, 0.2])
    assert "2 number(s) are not finite" in page.words


def test_what_only_some_runs_report_has_a_chart_where_it_was_reported(tmp_path: Path):
    folder = write_run(tmp_path / "r", steps=4)

    def drawn(**columns: list[float | None]) -> dict[str, Any]:
        rows = [
            metrics_row(step, 4) | {name: column[step - 1] for name, column in columns.items()}
            for step in range(1, 5)
        ]
        write_lines(folder / "metrics.jsonl", rows)
        page = page_of(folder)
        assert ("below 1 the baseline helps" in page.words) == ("gradient_variance_ratio" in columns)
        charts = {attributes.get("id"): text for attributes, text in page.scripts}
        return {
            name: json.loads(charts[name])["data"][0]["y"]
            for name in ("progress-4", "progress-5")
            if name in charts
        }

    assert drawn() == drawn(ratio_outside_share=[0.0] * 4) == {}
    assert drawn(gradient_variance_ratio=[0.9, None, 0.5, 0.7]) == {"progress-4": [0.9, 0.5, 0.7]}
    assert drawn(ratio_outside_share=[0.0, 0.25, 0.0, 0.0]) == {"progress-4": [0.0, 0.25, 0.0, 0.0]}
    both = drawn(gradient_variance_ratio=[1.0] * 4, ratio_outside_share=[0.5] * 4)
    assert both == {"progress-4": [1.0] * 4, "progress-5": [0.5] * 4}


def test_the_old_page_stays_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (write_run(tmp_path / "r", steps=2) / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path / "r")
    assert (tmp_path / "r" / "report.html").read_text() == "old"


def test_a_page_depends_on_the_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_run(tmp_path / "r", steps=3)
    first = write_report(folder).read_bytes()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert write_report(folder).read_bytes() == first


def test_kl_by_position_is_drawn_at_the_first_and_at_the_last_evaluation(tmp_path: Path):
    page = page_of(write_run(tmp_path / "r", steps=12))
    (chart,) = [json.loads(text) for attributes, text in page.scripts if attributes.get("id") == "progress-3"]
    lines = {trace["name"]: trace["y"] for trace in chart["data"] if "name" in trace}
    expected = {"before (step 0)": evals_row(0, 12), "after step 12": evals_row(12, 12)}
    assert lines == {
        name: [entry["kl_nats"] for entry in row["agreement"]["by_position"]]
        for name, row in expected.items()
    }


def test_an_attempt_without_colours_says_why(tmp_path: Path):
    folder = write_run(tmp_path / "r", steps=2)
    acted, learned = attempt_rows(1, 0, 2)
    gone = [None] * len(acted["tokens"])
    for second, reason in (
        ([], "was not trained on this attempt yet"),
        (
            [{**learned, "teacher_logp": {}}],
            "No teacher was asked about this attempt, or its weight was zero",
        ),
        ([{**learned, "teacher_logp": {"main": gone}}], "are not finite"),
    ):
        write_lines(folder / "attempts.jsonl", [acted, *second])
        assert reason in page_of(folder).words


def test_a_folder_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a run directory"):
        write_report(tmp_path / "nowhere")


def test_the_report_needs_no_torch(tmp_path: Path):
    write_run(tmp_path / "r", steps=2)
    code = (
        "import sys, pathlib; from reflux.reports.page import write_report; "
        "write_report(pathlib.Path(sys.argv[1])); "
        "sys.exit(str({'torch', 'transformers'} & set(sys.modules) or ''))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "r")], check=False, capture_output=True
        ).stderr
        == b"\n"
    )


@pytest.mark.browser
def test_in_a_real_browser_the_charts_are_drawn_and_nothing_hostile_runs(tmp_path: Path):
    browser = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    page = write_report(hostile_run(tmp_path / "r"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=8000",
        "--dump-dom",
    ]
    dom = subprocess.run(
        [browser, *flags, page.as_uri()], capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert dom.count('class="main-svg"') >= 6
    assert " data-pwned" not in dom.split("<body")[0]
