"""`reflux signal`: values of signals from their definition, files that are whole, calls that go on."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tiny
from reflux.cli.rank_signals import PARTIAL, rank_signals
from reflux.config.recipe import load_recipe
from reflux.config.step_context import SamplingParams
from reflux.credit.margin import Margin
from reflux.errors import ConfigError, DataError, ModelError, RunError, ServerError
from reflux.evals import attempt_signals
from reflux.evals.attempt_signals import described, measured
from reflux.evals.signal_summary import summarised
from reflux.reports.signal_page import write_signal_page
from reflux.rewards.base import judge
from reflux.types import Attempt, Group, Prompt, Reward, SampledTarget, TeacherAnswer
from test_report import HOSTILE, SEEN, Page

# --- values


class Given:
    """A sampler, a reward and teachers that give what they were made with."""

    def __init__(self, group: Group, targets: dict[str, list[TeacherAnswer]], rewards: list[Reward]):
        self.group, self.targets, self.rewards = group, targets, rewards
        self.tables = {f"table of {name}": name for name in targets}

    async def sample(self, asked: Prompt, n: int, draw: SamplingParams) -> Group:
        return self.group

    async def judge_attempts(self, task: Any, attempts: Any) -> list[Reward]:
        return [Reward(1.0), Reward(0.49), Reward(None, error="no idea")]

    async def score(self, group: Any, step_context: Any = None) -> Any:
        if step_context is None:
            return self.rewards
        # Teachers come after the rewards, which their contexts may show.
        assert [attempt.reward for attempt in self.group] == self.rewards
        for name, answers in self.targets.items():
            for attempt, answer in zip(self.group, answers, strict=True):
                attempt.answers[name] = answer
        return None


def answer(length: int, seed: int, **changed: float) -> TeacherAnswer:
    logp_T = np.random.default_rng(seed).uniform(-3, 0, length).astype(np.float32)
    for place, value in changed.items():
        logp_T[int(place[1:])] = value
    return TeacherAnswer(target=SampledTarget(teacher="main", logp_T=logp_T), table="main")


def rows_of(given: Given, rewards: Any) -> list[dict[str, Any]]:
    asked = tiny.evaluation(given, given if given.targets else None, graders=given)

    async def collect() -> list[dict[str, Any]]:
        prompt = given.group[0].rollout.prompt
        draw = SamplingParams(0, "train", 9)
        opened: Any = SimpleNamespace(parts=rewards, judge=partial(judge, given if rewards else None))
        chunks = measured(asked, opened, [prompt], 3, draw)
        return [row async for chunk in chunks for rows in chunk.values() for row in rows]

    return asyncio.run(collect())


def test_every_value_is_that_of_its_definition() -> None:
    """Position 1 was not chosen by the student; position 3 of the second attempt has no finite log-prob under
    the teacher, and the third attempt has no answer.
    """
    mask = [True, False, True, True, True]
    group = [Attempt(tiny.rollout(5, sample=0, mask=mask)), Attempt(tiny.rollout(5, sample=1))]
    group.append(Attempt(tiny.rollout(2, sample=2, finish="length")))
    answers = [answer(5, 1), answer(5, 2, _3=-math.inf), TeacherAnswer(error="out of reach")]
    rewards = load_recipe("rl", ['rewards.other={kind="outside:Brief", weight=2.0}']).rewards
    summed = [Reward(5.0, {"verifier": 1.0, "other": 2.0}), Reward(7.0, {"verifier": 1.0, "other": 3.0})]
    summed.append(Reward(None, {"verifier": 1.0}, error="rewards.other: it gave up"))
    rows = rows_of(Given(group, {"main": answers}, summed), rewards)

    def mean(of: Callable[[Any, Any], Any], index: int, places: list[int]) -> float:
        target, rollout = answers[index].target, group[index].rollout
        assert isinstance(target, SampledTarget)
        numbers = [of(float(target.logp_T[t]), float(rollout.logp_T[t])) for t in places]
        return sum(numbers) / len(numbers)

    for index, places in enumerate(([0, 2, 3, 4], [0, 1, 2, 4])):
        signals = rows[index]["signals"]
        assert signals["teacher_logp.main"] == pytest.approx(mean(lambda q, p: q, index, places), abs=1e-12)
        assert signals["return.main"] == pytest.approx(mean(lambda q, p: q - p, index, places), abs=1e-12)
    own = group[1].rollout.logp_T
    assert rows[1]["signals"]["student_logp"] == pytest.approx(sum(map(float, own)) / 5, abs=1e-12)
    assert [row["signals"]["length"] for row in rows] == [row["tokens"] for row in rows] == [4, 5, 2]
    assert [row["signals"]["rewards.other"] for row in rows] == [2.0, 3.0, None]
    assert [row["signals"]["weighted_sum"] for row in rows] == [5.0, 7.0, None]
    assert rows[2]["signals"]["teacher_logp.main"] is rows[2]["signals"]["return.main"] is None
    assert rows[2]["missing"] == {"main": "out of reach", "rewards": "rewards.other: it gave up"}
    assert [(row["truth"], row["verdict"], row.get("error")) for row in rows] == [
        (True, 1.0, None),
        (False, 0.49, None),
        (None, None, "no idea"),
    ]
    assert [(row["prompt"], row["sample"], row["finish"]) for row in rows] == [
        ("p0", 0, "stop"),
        ("p0", 1, "stop"),
        ("p0", 2, "length"),
    ]
    assert list(rows[0]["signals"]) == list(described(rewards, ["main"]))


def test_the_return_is_the_one_by_which_margins_compare() -> None:
    group = [Attempt(tiny.rollout(6, sample=0, mask=[1, 1, 0, 1, 1, 1])), Attempt(tiny.rollout(4, sample=1))]
    answers = [answer(6, 3), answer(4, 4, _0=-math.inf)]
    rewards = load_recipe("rl", ["rewards.verifier=none", "rewards.other.kind=outside:Brief"]).rewards
    group.append(Attempt(tiny.rollout(3, sample=2, finish="error")))
    given = Given(group, {"main": [*answers, TeacherAnswer()]}, [Reward(1.0), Reward(0.0), Reward(None)])
    rows = rows_of(given, rewards)
    credit = Margin()(group, tiny.evaluation(None).step_context)
    assert rows[0]["signals"]["return.main"] == credit[0].notes["return_correct"]
    assert rows[1]["signals"]["return.main"] == credit[1].notes["return_wrong"]
    assert "weighted_sum" not in rows[0]["signals"]
    assert rows[0]["signals"]["rewards.other"] == 1.0


def test_log_probs_are_those_of_the_policy_at_temperature_1() -> None:
    from dataclasses import replace

    rollout = tiny.rollout(3)
    group = [Attempt(replace(rollout, logp_raw_T=rollout.logp_T * 2)) for _ in range(3)]
    rows = rows_of(Given(group, {}, []), {})
    assert rows[0]["signals"]["student_logp"] == pytest.approx(2 * float(np.mean(rollout.logp_T)), abs=1e-6)
    assert set(rows[0]["signals"]) == {"student_logp", "length"}


# --- the summary


def row(prompt: str, truth: bool | None, **signals: float | None) -> dict[str, Any]:
    why = {"error": "it took too long"} if truth is None else {}
    return {"prompt": prompt, "truth": truth, "signals": signals, **why}


def test_attempts_without_a_verdict_are_left_out_counted_and_said() -> None:
    rows = [row("a", True, x=1.0), row("a", False, x=0.0), row("b", None, x=-5.0), row("b", True, x=None)]
    rows[3]["missing"] = {"rewards": "busy"}
    found = summarised(rows, {"x": "a number", "y": "none has it"}, ["x"], 0)
    assert [found[key] for key in ("prompts", "attempts", "judged", "right", "mixed")] == [2, 4, 3, 2, 1]
    assert (
        found["signals"]["x"] | {"auc": 1.0, "pairs": 1, "what": "a number", "truth": True}
        == (found["signals"]["x"])
    )
    assert found["signals"]["x"]["missing"] == pytest.approx(1 / 3)
    assert (found["signals"]["y"]["auc"], found["signals"]["y"]["missing"]) == (None, 1.0)
    assert not found["signals"]["y"]["truth"]
    first, second = found["notes"]
    assert first == (
        "1 of 4 attempts could not be judged by the verifier. They are left out: 1 x it took too long."
    )
    assert "x 33.3 %, y 100.0 %: 1 x busy." in second


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row("a", True, x=1.0), row("b", True, x=2.0)], "is right, so no ranking is defined"),
        ([row("a", False, x=1.0), row("b", False, x=2.0)], "is wrong, so no ranking is defined"),
        ([row("a", False, x=1.0), row("b", True, x=2.0)], "No prompt has both a right and a wrong attempt"),
        ([row("a", None, x=1.0)], "1 of 1 attempts could not be judged"),
    ],
)
def test_what_is_not_defined_is_a_sentence_and_no_number(rows: list[Any], words: str, tmp_path: Path) -> None:
    found = summarised(rows, {"x": "a number"}, [], 0)
    assert len(found["notes"]) == 1
    assert words in found["notes"][0]
    assert found["signals"]["x"].get("pairwise") is None
    text = json.dumps({"recipe": "r", **found})
    assert "NaN" not in text
    (tmp_path / "signal.json").write_text(text)
    page = Page(write_signal_page(tmp_path))
    assert words in page.words
    assert ("no ranking is defined" in page.words.lower()) == (found["signals"]["x"].get("auc") is None)


# --- the command


def numbers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "signal.json").read_text())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]


def enumerated(rows: list[dict[str, Any]], name: str) -> tuple[float, float]:
    """AUC and the accuracy within prompts, over all pairs of known attempts."""
    known = [row for row in rows if row["truth"] is not None and row["signals"][name] is not None]
    pairs = [
        (a["prompt"] == b["prompt"], (np.sign(a["signals"][name] - b["signals"][name]) + 1) / 2)
        for a in known
        for b in known
        if a["truth"] and not b["truth"]
    ]
    return float(np.mean([share for _, share in pairs])), float(np.mean([x for same, x in pairs if same]))


def test_rubrics_of_the_rule_server_rank_attempts_by_their_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Judged over HTTP, by rubrics and by scores. Files and terminal have the numbers of enumeration."""
    changes = ["threads=1", "rewards.score.kind=judge", "rewards.score.judge.kind=local"]
    rank_signals("rubric", changes, None, 8, tmp_path / "out")
    found, rows = numbers(tmp_path / "out"), lines(tmp_path / "out")
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (rows[8 * group]["prompt"], sample) for group in range(8) for sample in range(8)
    ]
    assert [found[key] for key in ("prompts", "attempts", "judged")] == [8, 64, 64]
    assert found["mixed"] >= 1
    signals = found["signals"]
    assert list(signals) == ["rewards.rubric", "rewards.score", "weighted_sum", "student_logp", "length"]
    assert signals["rewards.rubric"]["auc"] > 0.95
    assert signals["rewards.rubric"]["pairwise"] > 0.95
    for name, ranks in signals.items():
        assert (ranks["auc"], ranks["pairwise"]) == pytest.approx(enumerated(rows, name), abs=1e-12)
        assert ranks["auc_low"] <= ranks["auc"] <= ranks["auc_high"]
        assert not ranks["truth"]
    assert all(
        one["signals"]["weighted_sum"] == one["signals"]["rewards.rubric"] + one["signals"]["rewards.score"]
        for one in rows
    )
    assert found["settings"]["samples"] == 8
    assert found["chat"]["rubric"]["requests"] == 8
    said = capsys.readouterr().out
    assert "64 attempts at 8 prompts were judged" in said
    assert "chat, rubric: " in said
    assert "8 requests" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "attempts.jsonl",
        "parts",
        "signal.html",
        "signal.json",
    ]
    with pytest.raises(RunError, match="already contains signals"):
        rank_signals("rubric", changes, None, 8, tmp_path / "out")


def test_groups_that_a_judge_cannot_judge_are_missing(tmp_path: Path) -> None:
    faults = ["rewards.rubric.judge.faults.cut_json=0.3", "rewards.rubric.max_failed_share=0.0"]
    rank_signals("rubric", ["threads=1", "sampler.max_tokens=40", *faults], 2, 12, tmp_path / "out")
    found, rows = numbers(tmp_path / "out"), lines(tmp_path / "out")
    missing = sum(one["signals"]["rewards.rubric"] is None for one in rows) / len(rows)
    assert 0 < missing < 1
    assert found["signals"]["rewards.rubric"]["missing"] == pytest.approx(missing)
    assert found["signals"]["length"]["missing"] == 0
    assert any("the group was not judged" in note for note in found["notes"])


def test_a_judge_that_judges_nothing_ends_the_call(tmp_path: Path) -> None:
    """It could be repeated, once the judge is mended."""
    changes = ["threads=1", "sampler.max_tokens=9", "rewards.rubric.judge.faults.cut_json=1.0"]
    with pytest.raises(ServerError, match="none of the 4 attempts at these 2 prompts got a reward") as ended:
        rank_signals("rubric", changes, 2, 2, tmp_path / "out")
    assert "4 x the group was not judged: the answer of rules cannot be used" in str(ended.value)
    assert not (tmp_path / "out" / "signal.json").exists()


@pytest.fixture
def call(student: str, teacher: str, tmp_path: Path) -> Any:
    """`call("opd", "out", ...)`: the command on 9 prompts with tiny models. The prompt q3 is not judged."""
    rows = [
        {"prompt": f"{k}" * (k % 3 + 1), "answer": "a", "references": ["a"], "id": f"q{k}"} for k in range(9)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = [f"learner.model={student}", "task.kind=jsonl", "threads=1"]
    changes += [f"task.path={tmp_path / 'data.jsonl'}", "task.grader=judges:moody", "task.validation=0.0"]

    def run(recipe: str, out: str, *more: str, samples: int | None = 4, prompts: int = 9) -> Path:
        limit = "sampler.generate.max_tokens=6" if recipe == "sft" else "sampler.max_tokens=6"
        taught = [] if recipe in ("rl", "sft") else [f"teachers.main.model={teacher}"]
        rank_signals(recipe, [*changes, limit, *taught, *more], samples, prompts, tmp_path / out)
        return tmp_path / out

    return run


def test_a_teacher_that_is_the_student_has_a_return_of_zero(call: Any, student: str) -> None:
    out = call("opd", "out", f"teachers.main.model={student}")
    rows = lines(out)
    assert len(rows) == 36
    assert [row["truth"] for row in rows if row["prompt"] == "q3"] == [None] * 4
    assert all(abs(row["signals"]["return.main"]) < 1e-5 for row in rows)
    assert all(
        row["signals"]["teacher_logp.main"] == pytest.approx(row["signals"]["student_logp"], abs=1e-5)
        for row in rows
    )
    note = numbers(out)["notes"][0]
    assert note.startswith("4 of 36 attempts could not be judged by the verifier.")
    assert "no verdict on this one" in note


@pytest.mark.parametrize("recipe", ["opd", "vopd", "quickstart", "topk", "rl_opd"])
def test_recipes_with_a_teacher(recipe: str, call: Any) -> None:
    out = call(recipe, "out", samples=None, prompts=4)
    found, rows = numbers(out), lines(out)
    sampled = 4 if recipe == "rl_opd" else 8
    assert len(rows) == 4 * sampled == 4 * found["settings"]["samples"]
    known = {"teacher_logp.main", "return.main", "student_logp", "length"}
    assert {*found["signals"]} == known | ({"rewards.verifier"} if recipe == "rl_opd" else set())
    assert all(
        value is not None for row in rows if row["truth"] is not None for value in row["signals"].values()
    )
    values = {row["signals"]["return.main"] for row in rows}
    assert len(values) > 4


def test_each_prompt_has_the_teacher_of_its_route(
    student: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher of the route `mul` is the student, so its returns are 0, and those of the other are not."""
    changes = [f"learner.model={student}", f"teachers.main.model={teacher}", "threads=1"]
    changes += [f"teachers.times.model={student}", "sampler.max_tokens=6"]
    rank_signals("uni_opd", changes, 2, 6, tmp_path / "out")
    by_route = {
        route: [r for r in lines(tmp_path / "out") if r["route"] == route] for route in ("add", "mul")
    }
    assert all(abs(one["signals"]["return.main"]) < 1e-5 for one in by_route["mul"])
    assert all(abs(one["signals"]["return.main"]) > 1e-3 for one in by_route["add"])
    assert len(by_route["add"]) + len(by_route["mul"]) == 12
    assert all(by_route.values())


def test_the_verdicts_themselves_are_marked_and_perfect(call: Any, capsys: Any) -> None:
    found = numbers(call("rl", "out", samples=None))
    assert found["settings"]["samples"] == load_recipe("rl").group_size == 8
    truth = found["signals"]["rewards.verifier"]
    assert (truth["truth"], truth["auc"], truth["pairwise"]) == (True, 1.0, 1.0)
    assert "(truth)" in capsys.readouterr().out
    assert "chat" not in found


def test_answers_of_the_student_where_training_takes_others(call: Any) -> None:
    """`sft` trains on references; the signals are about the student's own attempts."""
    rows = lines(call("sft", "out", samples=2))
    assert len({row["tokens"] for row in rows}) > 1
    assert all(row["signals"]["student_logp"] < 0 for row in rows)


def test_a_killed_call_goes_on_to_the_same_files(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = call("opd", "whole")
    real, seen = attempt_signals.measured, []

    async def interrupted(*words: Any) -> Any:
        seen.append(len(words[2]))
        async for chunk in real(*words, at_once=4):
            yield chunk
            if len(seen) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr("reflux.cli.rank_signals.measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("opd", "killed")
    killed = whole.parent / "killed"
    assert sorted(path.name for path in killed.iterdir()) == [PARTIAL]
    with (killed / PARTIAL).open("a") as file:
        file.write('{"id": "q')
    with pytest.raises(RunError, match=r"holds signals made with other settings \(samples\)"):
        call("opd", "killed", samples=3)
    with pytest.raises(RunError, match=r"made with other settings \(config_hash, seed\)"):
        call("opd", "killed", "seed=5")
    call("opd", "killed")
    assert seen == [9, 5]
    assert {path.name for path in killed.iterdir()} == {"attempts.jsonl", "signal.html", "signal.json"}
    # Batches of other sizes round in another way.
    for one, other in zip(lines(whole), lines(killed), strict=True):
        assert one.pop("signals") == pytest.approx(other.pop("signals"), abs=1e-5)
        assert one == other


def test_requests_of_a_killed_call_count_and_are_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = attempt_signals.measured, []

    async def interrupted(*words: Any) -> Any:
        calls.append(words)
        async for chunk in real(*words, at_once=1):
            yield chunk
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr("reflux.cli.rank_signals.measured", interrupted)
    asked = ("rubric", ["threads=1", "sampler.max_tokens=20"], 2, 3, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        rank_signals(*asked)
    rank_signals(*asked)
    assert numbers(tmp_path / "out")["chat"]["rubric"]["requests"] == 3
    assert numbers(tmp_path / "out")["chat"]["teacher"]["requests"] == 12


def test_fewer_prompts_than_asked_are_said(call: Any, capsys: Any) -> None:
    found = numbers(call("rl", "out", prompts=50, samples=2))
    assert found["prompts"] == 9
    assert "The task has 9 different training prompts, and all were used." in found["notes"]
    assert "note: The task has 9 different" in capsys.readouterr().out


def test_the_verdicts_of_all_attempts_may_agree(call: Any, capsys: Any) -> None:
    found = numbers(call("opd", "out", "task.grader=judges:content"))
    assert found["right"] == found["judged"] == 36
    assert all(ranks["auc"] is ranks["pairwise"] is None for ranks in found["signals"].values())
    said = " ".join(capsys.readouterr().out.split())
    assert "Every attempt that was judged is right, so no ranking is defined." in said
    assert "nan" not in said.lower()


# --- what is refused


def test_a_task_that_judges_nothing_is_refused(call: Any) -> None:
    with pytest.raises(ConfigError, match=r'with the grader "none" nothing is ever judged\. Use a grader'):
        call("opd", "out", "task.grader=none", "evals=none")


def test_a_task_whose_environment_alone_judges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only the environment of this task judges"):
        rank_signals("opd", ["task.kind=outside:Unjudged", "evals=none"], 2, 2, tmp_path / "out")


def test_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the attempts of this recipe are images"):
        rank_signals("flow", [], 2, 2, tmp_path / "out")


@pytest.mark.parametrize(
    ("recipe", "changes", "error", "words"),
    [
        ("rubrik", [], ConfigError, "rubric"),
        ("rubric", ["rewards.rubric.judge.faults.wrong_verdict=0.1"], ConfigError, "wrong_verdicts"),
        ("rubric", ["rewards.rubric.rubric_prompt=nowhere.txt"], DataError, "nowhere.txt"),
        ("opd", ["task.kind=jsonl", "task.path=nowhere.jsonl"], DataError, "nowhere.jsonl"),
        ("opd", ["learner.model=./nowhere"], ModelError, r"learner\.model"),
        ("opd", ["teachers.main.model=./nowhere"], ModelError, r"teachers\.main\.model"),
    ],
)
def test_mistakes_are_refused_before_the_folder_is_made(
    recipe: str, changes: list[str], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        rank_signals(recipe, changes, 2, 2, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_prompts_is_said(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reflux.cli.rank_signals.training_prompts", lambda *_: ([], False))
    with pytest.raises(DataError, match="no training prompts"):
        call("opd", "out")


# --- the page


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    whole = {"auc": 0.5, "auc_low": 0.4, "auc_high": 0.6, "pairwise": 0.7, "pairs": 3, "prompts": 2}
    named = {HOSTILE: {**whole, "what": HOSTILE, "missing": 0.0}, "x": {"what": "x"}}
    found = {"recipe": HOSTILE, "notes": [HOSTILE], "signals": named, "settings": {HOSTILE: HOSTILE}}
    (tmp_path / "signal.json").write_text(json.dumps({**found, "chat": {HOSTILE: {HOSTILE: 1}}}))
    page = Page(write_signal_page(tmp_path))
    assert page.words.count(SEEN) >= 6
    assert [page.tags[name] for name in ("title", "style", "img")] == [1, 1, 0]
    # the figure, the library and the page's own
    assert page.tags["script"] == 3
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not [pair for pair in page.attributes if pair[0] in ("src", "href")]
    figure = next(text for attributes, text in page.scripts if attributes.get("type") == "application/json")
    assert "<" not in json.loads(figure)["layout"]["yaxis"]["ticktext"][0]


def test_the_picture_has_each_number_with_its_interval(tmp_path: Path) -> None:
    ends = {"auc": 0.9, "auc_low": 0.8, "auc_high": 0.95, "pairwise": 0.7, "pairwise_low": None}
    signals = {
        "good": ends,
        "unknown": {"auc": None},
        "other": {"auc": 0.25, "auc_low": 0.2, "auc_high": 0.5},
    }
    (tmp_path / "signal.json").write_text(json.dumps({"recipe": "mine", "signals": signals}))
    page = Page(write_signal_page(tmp_path))
    figure = json.loads(next(text for tag, text in page.scripts if tag.get("type") == "application/json"))
    auc, pairwise = figure["data"]
    assert figure["layout"]["yaxis"]["ticktext"] == ["good", "unknown", "other"]
    assert auc["x"] == [0.9, 0.25]
    assert [round(place) for place in auc["y"]] == [0, 2]
    assert auc["error_x"]["array"] == pytest.approx([0.05, 0.25])
    assert auc["error_x"]["arrayminus"] == pytest.approx([0.1, 0.05])
    assert (pairwise["x"], pairwise["error_x"]["array"]) == ([0.7], [0.0])
    (line,) = figure["layout"]["shapes"]
    assert line["x0"] == line["x1"] == 0.5
    assert "0.900 (0.800 to 0.950)" in page.words


def test_a_page_needs_its_numbers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"signal\.json"):
        write_signal_page(tmp_path)
