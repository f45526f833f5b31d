"""The report of a run of images: what was drawn before, after and by the teacher, step by step, and nothing
that a file smuggles in.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from reflux.models.images import picture_of, png, to_text
from reflux.reports.attempts import ShownAttempt, read_attempts
from reflux.reports.curves import kl_chart, position_chart
from reflux.reports.evals import read_evals
from reflux.reports.metrics import read_metrics
from reflux.reports.page import write_report
from reflux.reports.reading import rows
from reflux.reports.splits import split_charts
from reflux.reports.strips import picture_in, read_strips
from reflux.reports.trajectories import RATIO, trajectory
from reflux.reports.words import PICTURES, TEXTS, words_for
from synthetic_images import PROMPTS, attempt_rows, evals_row, write_picture_run
from synthetic_run import evals_row as text_evals
from synthetic_run import summary, write_lines, write_run
from test_report import HOSTILE, SEEN, Page

GREY = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)


class Gallery(Page):
    """A page, and the attributes of its img elements."""

    def __init__(self, path: Path) -> None:
        self.shown: list[dict[str, str | None]] = []
        super().__init__(path)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        self.shown += [dict(attrs)] * (tag == "img")


def gallery(folder: Path) -> Gallery:
    return Gallery(write_report(folder))


def pixels(source: str) -> np.ndarray:
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    return picture_of(base64.b64decode(data, validate=True))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return gallery(write_picture_run(tmp_path_factory.mktemp("run") / "r", steps=30))


# --- one image


def test_a_small_picture_is_enlarged_by_a_whole_number_and_keeps_its_pixels() -> None:
    found = picture_in(to_text(GREY))
    assert found is not None
    assert (found.width, found.height, found.enlarged) == (144, 144, True)
    np.testing.assert_array_equal(pixels(found.source), GREY)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((96, 48, 3), (48, 96)),
        ((80, 80), (80, 80)),
        ((72, 10), (20, 144)),
        ((1, 1), (144, 144)),
        ((300, 200), (64, 96)),
    ],
)
def test_every_picture_has_a_fair_size_on_the_page(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    found = picture_in(base64.b64encode(png(np.zeros(shape, np.uint8))).decode())
    assert found is not None
    assert (found.width, found.height) == size
    assert found.enlarged == (max(shape) <= 72)


def test_a_picture_is_written_anew_so_nothing_else_in_its_file_gets_in() -> None:
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    notes, file = PngInfo(), io.BytesIO()
    notes.add_text("Comment", "<script>smuggled</script>")
    Image.fromarray(GREY).save(file, "PNG", pnginfo=notes)
    data = file.getvalue() + b"<script>behind</script>"
    found = picture_in(base64.b64encode(data).decode())
    assert found is not None
    again = base64.b64decode(found.source.partition(",")[2])
    assert b"smuggled" in data
    assert b"script" not in again
    np.testing.assert_array_equal(picture_of(again), GREY)


@pytest.mark.parametrize(
    "value",
    [None, 3, [], "", "x", '"><script>alert(1)</script>', "data:image/svg+xml;base64,AAAA", "AAAA", HOSTILE],
)
def test_what_is_no_picture_is_none(value: object) -> None:
    assert picture_in(value) is None


# --- before, after, teacher


def test_each_prompt_has_its_pictures_side_by_side_with_verdicts() -> None:
    moments = read_evals([evals_row(step, 30) for step in (0, 15, 30)])
    strips = read_strips(moments)
    assert [strip.prompt for strip in strips] == [prompt.messages[-1]["content"] for prompt in PROMPTS]
    assert [[drawn.who for drawn in strip.drawn] for strip in strips] == [["Before", "After", "Teacher"]] * 8
    assert [drawn.when for drawn in strips[0].drawn] == ["step 0", "step 30", ""]
    assert [drawn.verdict for drawn in strips[0].drawn] == ["wrong", "right", "right"]
    assert [drawn.verdict for drawn in strips[3].drawn] == ["wrong", "wrong", "wrong"]
    assert [drawn.verdict for drawn in strips[5].drawn] == ["not graded", "right", "right"]
    assert strips[0].drawn[2].parts == ["quality 0.90"]
    assert strips[0].drawn[1].alt == f"{strips[0].prompt}: after, step 30, right"
    told = [evals_row(0, 30)["accuracy"], evals_row(30, 30)["accuracy"], evals_row(0, 30)["teacher_accuracy"]]
    for place in range(8):
        for drawn, row in zip(strips[place].drawn, told, strict=True):
            assert drawn.image is not None
            np.testing.assert_array_equal(
                pixels(drawn.image.source), picture_of(base64.b64decode(row["examples"][place]["image"]))
            )


def test_what_is_there_is_shown_without_what_is_not() -> None:
    first, last = evals_row(0, 30), evals_row(30, 30)
    alone = {key: value for key, value in first.items() if key != "teacher_accuracy"}
    assert [drawn.who for drawn in read_strips(read_evals([alone]))[0].drawn] == ["Before"]
    assert [drawn.who for drawn in read_strips(read_evals([last]))[0].drawn] == ["After"]
    assert [drawn.who for drawn in read_strips(read_evals([first]))[0].drawn] == ["Before", "Teacher"]
    assert read_strips(read_evals([])) == []
    # the teacher knows one of them
    first["teacher_accuracy"]["examples"] = first["teacher_accuracy"]["examples"][2:3]
    whom = [[drawn.who for drawn in strip.drawn] for strip in read_strips(read_evals([first, last]))]
    assert whom == [["Before", "After"]] * 2 + [["Before", "After", "Teacher"]] + [["Before", "After"]] * 5


def test_pictures_that_nobody_could_judge_are_shown_all_the_same() -> None:
    rows = [evals_row(step, 30) for step in (0, 30)]
    for row in rows:
        for example in (
            example
            for table in row.values()
            if isinstance(table, dict)
            for example in table.get("examples", [])
        ):
            example |= {"verdict": None, "parts": {}}
        for name in ("accuracy", "teacher_accuracy"):
            row[name] = (
                {"accuracy": None, "problems": 8, "examples": row[name]["examples"]} if name in row else None
            )
    (strip, *others) = read_strips(read_evals(rows))
    assert [(drawn.who, drawn.verdict, drawn.parts) for drawn in strip.drawn] == [
        (w, "not graded", []) for w in ("Before", "After", "Teacher")
    ]
    assert len(others) == 7


# --- curves


def test_routes_and_parts_have_curves_beside_their_teachers() -> None:
    moments = read_evals([evals_row(step, 30) for step in (0, 15, 30)])
    by_route, quality = split_charts(moments)
    lines = {line["name"]: line for line in by_route.spec["data"] if "name" in line}
    assert sorted(lines) == ["counts", "digits", "teacher: counts", "teacher: digits"]
    expected = [evals_row(step, 30)["accuracy"]["accuracy.digits"] for step in (0, 15, 30)]
    assert (lines["digits"]["x"], lines["digits"]["y"]) == ([0, 15, 30], expected)
    assert lines["teacher: counts"]["y"] == [pytest.approx(0.92)] * 2
    assert (
        lines["digits"]["line"]["color"]
        == lines["teacher: digits"]["line"]["color"]
        != lines["counts"]["line"]["color"]
    )
    lines = {line["name"]: line for line in quality.spec["data"] if "name" in line}
    assert lines["counts"]["y"] == [evals_row(step, 30)["accuracy"]["quality.counts"] for step in (0, 15, 30)]
    taught = evals_row(0, 30)["teacher_accuracy"]
    assert {name: line["y"] for name, line in lines.items() if name.startswith("teacher")} == {
        f"teacher: {route}": [taught[f"quality.{route}"]] * 2 for route in ("digits", "counts")
    }
    assert (quality.title, quality.header[2]) == ("Quality by step", "mean")
    assert quality.rows[0] == ("counts", "0", "0.540", "0.520 to 0.580")


def test_a_part_of_any_size_is_no_share_and_has_one_line_without_routes() -> None:
    lines = [
        {
            "step": s,
            "accuracy": {"accuracy": 0.5, "parts": ["pick", "gone", 3], "pick": 20.0 + s, "pick.low": None},
        }
        for s in (0, 5)
    ]
    (chart,) = split_charts(read_evals(lines))
    (line,) = [line for line in chart.spec["data"] if "name" in line]
    assert (line["name"], line["y"]) == ("student", [20.0, 25.0])
    assert chart.rows[0] == ("student", "0", "20.000", "–")
    assert "Dashed" not in chart.caption


def test_runs_without_routes_or_parts_have_no_such_chart() -> None:
    assert split_charts(read_evals([text_evals(0, 9), text_evals(9, 9)])) == []
    assert split_charts([]) == []
    strange = {
        "accuracy": 0.5,
        "parts": {"x": 1},
        "accuracy.a": "x",
        "accuracy.a.problems": 3,
        "accuracy..problems": 1,
    }
    assert split_charts(read_evals([{"step": 0, "accuracy": strange}])) == []


def test_the_splits_of_an_evaluation_are_read_by_name() -> None:
    (step_context,) = read_evals([evals_row(0, 30)])
    split = step_context.splits["accuracy"]
    assert astuple(split.routes["digits"])[:4] == pytest.approx((0.58, 0.53, 0.63, 160))
    assert astuple(split.parts["quality"][None]) == pytest.approx((0.55, 0.53, 0.57))
    assert sorted(map(str, split.parts["quality"])) == ["None", "counts", "digits"]
    assert step_context.teacher_split.routes["counts"].accuracy == pytest.approx(0.92)
    assert len(step_context.teacher_examples) == 8


def test_positions_of_pictures_are_denoising_steps_and_those_of_texts_tokens() -> None:
    moments = read_evals([evals_row(step, 30) for step in (0, 30)])
    chart = position_chart(moments, PICTURES)
    assert chart.title == "Distance to the teacher by denoising step"
    assert chart.header == ("", "denoising step", "nats", "95 % interval", "denoising steps")
    assert chart.rows[0][4] == "64"
    assert chart.spec["data"][1]["x"] == list(range(9))
    assert position_chart(read_evals([text_evals(0, 9)]), TEXTS).header[4] == "tokens"
    metrics = read_metrics([{"step": 1, "kl_nats": 0.5}])
    assert kl_chart(metrics, [], PICTURES).header[2] == "nats per denoising step"
    assert kl_chart(metrics, [], TEXTS).header[2] == "nats per token"


# --- attempts


def test_every_step_of_an_attempt_has_its_numbers() -> None:
    acted, learned = attempt_rows(30, 0, 30)
    found = trajectory(ShownAttempt(acted, learned))
    assert found.header == ["step", "time", RATIO, "KL, nats", "weight"]
    assert len(found.steps) == 10
    for place, step in enumerate(found.steps[:-1]):
        ratio = learned["teacher_logp"]["main"][place] - learned["student_logp"][place]
        assert step.cells[RATIO] == f"{'−' if ratio < 0 else '+'}{abs(ratio):.2f}"
        depth = sum(abs(ratio) >= edge for edge in (0.1, 0.3, 1, 3))
        assert step.css == f"{'n' if ratio < 0 and depth else 'p'}{depth}"
        assert (step.cells["step"], step.cells["time"]) == (str(place), f"{1 - place / 10:.3f}")
        assert step.cells["KL, nats"] == f"{learned['kl'][place]:.3f}"
    assert (found.steps[-1].css, found.steps[-1].cells[RATIO]) == ("given", "not trained on")
    assert (found.verdict, found.parts) == ("right", ["quality 0.80"])
    assert found.facts == [
        "10 denoising steps, 9 to train on",
        "reward 1",
        "noise level 0.7",
        "finish: stop",
        "policy version 29",
    ]
    assert found.missing == ""


def test_what_is_not_known_of_an_attempt_is_left_out_and_why() -> None:
    acted, learned = attempt_rows(1, 0, 30)
    fresh = trajectory(ShownAttempt(acted))
    assert "was not trained on this attempt yet" in fresh.missing
    assert fresh.header == ["step", "time", RATIO]
    assert {step.css for step in fresh.steps} == {"unknown", "given"}
    unheard = trajectory(
        ShownAttempt({**acted, "reward": None, "guidance": 4.5}, {**learned, "teacher_logp": {}})
    )
    assert "No teacher was asked about this attempt, or its weight was zero, so its steps" in unheard.missing
    assert unheard.verdict == ""
    assert "guidance 4.5" in unheard.facts
    shifted = trajectory(ShownAttempt(acted, {**learned, "advantage_offset": [0.25] * 10}))
    assert shifted.steps[0].cells["advantage offset, nats"] == "+0.250"
    # numbers at the last step, too
    whole = {**learned, "teacher_logp": {"main": [0.0] * 10}, "student_logp": [-9.0] * 10}
    assert (
        trajectory(ShownAttempt(acted, whole)).steps[9].css,
        trajectory(ShownAttempt(acted, whole)).steps[9].cells[RATIO],
    ) == ("given", "not trained on")
    long = trajectory(ShownAttempt({**acted, "mask": [1] * 500}, learned))
    assert (len(long.steps), long.left_out) == (200, 300)
    assert trajectory(ShownAttempt({"image": "x"})).steps == []


# --- the page


def test_the_page_shows_every_picture_with_words_for_those_who_cannot_see(page: Gallery) -> None:
    assert len(page.shown) == 8 * 3 + 10
    assert all(
        image["class"] == "pixels" and image["alt"] and image["width"] == image["height"] == "144"
        for image in page.shown
    )
    assert page.shown[0]["alt"] == f"{PROMPTS[0].messages[0]['content']}: before, step 0, wrong"
    assert all(pixels(image["src"] or "").shape == (16, 16) for image in page.shown)
    assert page.classes["strip"] == 8
    assert page.classes["walk"] == 10
    assert "generated by the student before and after training, and by the teacher" in page.words
    assert page.classes["plot"] == 8
    assert "image-rendering: pixelated" in page.source


def test_words_of_texts_are_nowhere_in_a_run_of_pictures(page: Gallery) -> None:
    shown = page.words.split("Configuration")[0]
    assert not re.search("token|the answer|Problem", shown)
    for words in (
        "Log-ratio of teacher and student at each denoising step",
        "denoising steps sampled",
        "of the sampled states",
    ):
        assert words in shown
    charts = "".join(
        text for attributes, text in page.scripts if attributes.get("type") == "application/json"
    )
    assert "nats per denoising step" in charts
    assert "token" not in charts


def test_images_may_come_from_the_page_alone(page: Gallery) -> None:
    (policy,) = [
        value for name, value in page.attributes if name == "content" and value and "default-src" in value
    ]
    rules = {part.split()[0]: part.split()[1:] for part in policy.split(";")}
    assert rules["default-src"] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    assert all(
        (value or "").startswith("data:image/png;base64,") for name, value in page.attributes if name == "src"
    )
    assert "url(" not in page.source.split("</style>")[0]


def hostile_pictures(folder: Path) -> Path:
    """Every text of a run of images is an attack, and half of its images are."""
    write_picture_run(folder, steps=4)
    acted, learned = attempt_rows(1, 0, 4)
    attack = {
        "prompt": HOSTILE,
        "question": HOSTILE,
        "finish": HOSTILE,
        "version": HOSTILE,
        "parts": {HOSTILE: 0.5},
    }
    lines = [
        {**acted, **attack},
        {**learned, "prompt": HOSTILE},
        {**acted, **attack, "sample": 1, "image": HOSTILE},
    ]
    write_lines(folder / "attempts.jsonl", lines)
    moments = [evals_row(0, 4), evals_row(4, 4)]
    for row in moments:
        for name, table in list(row.items()):
            if isinstance(table, dict) and "examples" in table:
                some = [
                    {**table["examples"][0], "id": f"{HOSTILE}{n}", "prompt": HOSTILE, "answer": HOSTILE}
                    for n in range(2)
                ]
                some[1]["image"] = '" onerror="document.documentElement.dataset.pwned=1" src="x'
                some[0]["parts"] = {HOSTILE: 0.5}
                by = {
                    f"accuracy.{HOSTILE}": 0.5,
                    f"accuracy.{HOSTILE}.problems": 3,
                    HOSTILE: 0.5,
                    "parts": [HOSTILE],
                }
                row[name] = {**table, **by, "examples": some}
    write_lines(folder / "evals.jsonl", moments)
    (folder / "summary.json").write_text(json.dumps(summary(4) | {"recipe": HOSTILE}))
    return folder


def test_nothing_a_model_made_becomes_markup(tmp_path: Path) -> None:
    found = gallery(hostile_pictures(tmp_path / "hostile"))
    # the page's own, the library, and the data of each chart
    assert found.tags["script"] == 2 + found.classes["plot"]
    assert (found.tags["style"], found.tags["title"]) == (1, 1)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert len(found.shown) == 3 + 1
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in found.shown)
    assert found.words.count("No image that can be read.") == 3 + 1
    assert found.words.count(SEEN) >= 8
    assert any(SEEN in (image["alt"] or "") for image in found.shown)
    assert not set(found.source) & set("\u202e\u2066\u0007")
    assert all(
        json.loads(text) for attributes, text in found.scripts if attributes.get("type") == "application/json"
    )


DAMAGED = (
    "image",
    "mask",
    "t",
    "parts",
    "kl",
    "weight",
    "teacher_logp",
    "examples",
    "verdict",
    "by_position",
    "noise_level",
)


@pytest.mark.parametrize("value", [None, "x", [[]], -1e300, {"a": []}])
def test_fields_of_another_type_cost_themselves_alone(tmp_path: Path, value: object) -> None:
    """All at once on the page, and one by one in what the page is made of."""
    folder = write_picture_run(tmp_path / "r", steps=2, per_step=1)
    damage(folder, DAMAGED, value)
    assert "Images of the same prompts" in gallery(folder).words
    for key in DAMAGED:
        alone = write_picture_run(tmp_path / key, steps=1, per_step=1)
        damage(alone, (key,), value)
        moments = read_evals(rows(alone / "evals.jsonl", []))
        (shown,) = read_attempts(alone / "attempts.jsonl", [])
        assert read_strips(moments) is not None
        assert split_charts(moments) is not None
        assert trajectory(shown).title


def damage(folder: Path, keys: tuple[str, ...], value: object) -> None:
    """Every field of these names, wherever it stands, says `value`."""
    for name in ("evals.jsonl", "attempts.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for row in lines:
            inner = [table for table in row.values() if isinstance(table, dict)]
            listed = [example for table in inner for example in table.get("examples", [])]
            for table in (row, *inner, *listed):
                table.update({key: value for key in keys if key in table})
        write_lines(folder / name, lines)


def test_a_run_says_pictures_before_it_has_drawn_any(tmp_path: Path) -> None:
    folder = write_picture_run(tmp_path / "r", steps=2)
    for name in ("metrics.jsonl", "evals.jsonl", "attempts.jsonl", "summary.json"):
        (folder / name).unlink()
    words = gallery(folder).words
    assert "evals.jsonl holds none" in words
    assert "each denoising step" in words
    assert words_for({}, [], []) == TEXTS
    # what is on disk goes before what was meant
    assert words_for({"learner": {"kind": "flow"}}, [{"tokens": [1]}], []) == TEXTS
    assert words_for({}, [{"image": "x"}], []) == PICTURES
    assert words_for({}, [], read_evals([evals_row(0, 2)])) == PICTURES


def test_a_run_of_texts_has_no_pictures(tmp_path: Path) -> None:
    found = gallery(write_run(tmp_path / "r", steps=6))
    assert not found.tags["img"]
    assert "Images" not in found.words
    assert "The same problems, before and after" in found.words


@pytest.mark.browser
def test_in_a_real_browser_pictures_are_seen_and_nothing_hostile_runs(tmp_path: Path) -> None:
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
    page = write_report(hostile_pictures(tmp_path / "r"))
    dom = dump(browser, page, tmp_path)
    assert dom.count('class="main-svg"') >= 6
    assert " data-pwned" not in dom.split("<body")[0]


def dump(browser: str, page: Path, scratch: Path) -> str:
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
        f"--user-data-dir={scratch / 'profile'}",
        "--virtual-time-budget=8000",
    ]
    command = [browser, *flags, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
