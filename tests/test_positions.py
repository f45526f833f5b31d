"""Where along an answer the KL lies, from the evaluations of a study's runs, and the figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

STUDIES = Path(__file__).parents[1] / "studies"
# scripts import their neighbours
sys.path.insert(0, str(STUDIES))

import positions  # noqa: E402
import reaching  # noqa: E402


def write(run, evaluations):
    """A finished run with the bins (position, tokens, KL) of each evaluation."""
    run.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "accuracy": {"accuracy": step / 10},
            "agreement": {
                "by_position": [
                    {"position": first, "width": 2, "tokens": count, "kl_nats": kl}
                    for first, count, kl in bins
                ]
            },
        }
        for step, bins in enumerate(evaluations)
    ]
    steps = [{"step": 1, "flops": {"learn": 1e12}, "seconds": {"total": 1}}]
    for name, lines in (("evals", rows), ("metrics", steps)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").write_text("{}")


@pytest.fixture
def study(tmp_path):
    write(tmp_path / "full" / "seed-0", [[(0, 8, 2.0), (2, 8, 1.0), (4, 4, 1.0)], [(0, 8, 0.5), (2, 8, 0.0)]])
    write(
        tmp_path / "full" / "seed-1", [[(0, 8, 4.0), (2, 8, 1.0), (4, 4, 1.0)], [(0, 8, 1.5), (4, 24, 0.25)]]
    )
    (tmp_path / "full" / "seed-2").mkdir()
    return tmp_path


def test_tokens_are_pooled_and_the_sum_is_counted_up(study, capsys):
    positions.main([str(study), "--width", "4"])
    # Before: 16 * 3 + 16 * 1 = 64 of 72 nats in the first four tokens. After: 16 of 22 nats.
    assert capsys.readouterr().out.splitlines() == [
        "| tokens | before: tokens | KL | of the sum | full: tokens | KL | of the sum |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 0 to 3 | 80.0% | 2.000 | 88.9% | 50.0% | 0.667 | 72.7% |",
        "| 4 to 7 | 20.0% | 1.000 | 100.0% | 50.0% | 0.250 | 100.0% |",
    ]


def test_an_arm_without_a_finished_run_is_named(study):
    with pytest.raises(SystemExit, match="no finished run of cap"):
        positions.main([str(study), "--arms", "full,cap"])


@pytest.mark.parametrize("script", [positions, reaching])
def test_a_figure_is_svg_with_its_words_and_is_the_same_each_time(study, script, capsys):
    paths = [study / "one.svg", study / "two.svg"]
    for path in paths:
        script.main([str(study), "--arms", "full", "--figure", str(path)])
    assert paths[0].read_bytes() == paths[1].read_bytes()
    texts = {element.text for element in ElementTree.parse(paths[0]).iter() if element.text}
    titles = {positions: "token of the answer", reaching: "TFLOP spent"}
    assert {titles[script], "full"} <= texts
