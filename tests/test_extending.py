"""The parts of docs/extending.md, which live in examples/my_lab: each does what its page says, and all run
together.
"""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import AsyncIterator, Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reflux
import tiny
from played import played
from reflux import checks
from reflux.cli.show import console, list_parts, show_plan
from reflux.config.citations import papers
from reflux.config.recipe import config_hash, from_table, load_recipe, to_table
from reflux.config.step_context import StepContext
from reflux.credit.base import share_credit
from reflux.errors import ConfigError
from reflux.evals.finding import Finding
from reflux.inspection.doctor import examine
from reflux.loss.outputs import FullLogits
from reflux.loss.term import Rows
from reflux.reports.diagnostics import own_charts
from reflux.reports.page import write_report
from reflux.reports.recorded import Recorded
from reflux.storage.model_card import model_card
from reflux.types import Attempt, SampledTarget, TeacherAnswer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As PYTHONPATH=examples does for a user."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def part(dotted: str, **fields: Any) -> Any:
    from reflux.config.registry import load

    return load(f"my_lab.{dotted}")(**fields)


def test_surprise_keeps_what_the_teacher_would_hardly_say() -> None:
    rule = part("credit:Surprise", least_nats=1.0, elsewhere=0.25)
    scored, unscored = (
        Attempt(tiny.rollout(4, mask=[True, True, False, True])),
        Attempt(tiny.rollout(4, sample=1)),
    )
    scored.answers["main"] = TeacherAnswer(
        target=SampledTarget(teacher="main", logp_T=np.array([-0.1, -1.0, -0.1, -5.0], dtype=np.float32))
    )
    share_credit([[scored, unscored]], {"surprise": rule}, StepContext(0, 0))
    assert scored.weight_T.tolist() == [0.25, 1.0, 0.0, 1.0]
    assert np.asarray(scored.credits["surprise"].weight_T).tolist() == [0.25, 1.0, 1.0, 1.0]
    assert scored.credits["surprise"].notes == {"surprising": pytest.approx(2 / 3)}
    assert unscored.weight_T.tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="elsewhere"):
        part("credit:Surprise", elsewhere=-1.0)


def test_jeffreys_is_half_the_sum_of_both_kls() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (student, teacher))
    expected = 0.5 * ((p - q) * (np.log(p) - np.log(q))).sum(-1)
    ids_N = torch.zeros(5, dtype=torch.int64)
    outputs = {
        name: FullLogits(torch.from_numpy(logits), ids_N)
        for name, logits in (("student", student), ("main", teacher))
    }
    rows = Rows(outputs["student"], {"main": outputs["main"]}, torch.zeros(5), torch.zeros(5))
    np.testing.assert_allclose(part("objectives:Jeffreys")(rows).numpy(), expected, rtol=1e-12)


def test_backwards_grades_and_never_repeats_a_training_word_when_it_tests() -> None:
    task = part("tasks:Backwards", letters=3, held_out=50)
    trained = {prompt.answer for seed in (0, 1) for prompt in islice(task.prompts("train", seed), 500)}
    held_out = list(task.prompts("test", 0))
    assert len(held_out) == 50
    assert trained.isdisjoint(prompt.answer for prompt in held_out)
    assert list(islice(task.prompts("train", 0, 7), 3)) == list(islice(task.prompts("train", 0), 7, 10))
    prompt = held_out[0]
    assert task.verify(prompt, f"It is {prompt.answer}") == 1.0
    assert task.verify(prompt, "") == task.verify(prompt, prompt.answer[::-1] + "x") == 0.0


def test_hints_answer_a_wrong_word_and_pay_less_for_each() -> None:
    import asyncio

    task = part("turns:Hinted", letters=3, hints=2)
    prompt = next(task.prompts("train", 0))

    async def played(*texts: str) -> list[tuple[str, bool, float | None]]:
        environment = task.open_env(prompt, 0)
        found = [await environment.step({"role": "assistant", "content": text}) for text in texts]
        await environment.close()
        return [
            ("".join(message["content"] for message in seen.messages), seen.done, seen.reward)
            for seen in found
        ]

    answer = prompt.answer or ""
    hints = [(f"No. It begins with {answer[:count]}.", False, None) for count in (1, 2)]
    assert asyncio.run(played(f"It is {answer}")) == [("", True, 1.0)]
    assert asyncio.run(played("", answer)) == [hints[0], ("", True, 0.5)]
    assert asyncio.run(played("no", "nor this", "nor that")) == [*hints, ("", True, 0.0)]
    assert task.verify(prompt, f"no\n{answer}") == 1.0
    with pytest.raises(ValueError, match="hints"):
        part("turns:Hinted", hints=0)


def test_rates_reply_by_the_step_and_judge_by_what_was_told() -> None:
    task = part("rates:Rates", drift_every=2)
    prompt = next(task.prompts("train", 0))
    amount, code = prompt.messages[0]["content"].split()[2:4]
    rollout = played(task, prompt, ["well", f"rate({code})", "Answer: 1"], 5)
    told = [message["content"] for message in rollout.messages if message["role"] == "user"][1:]
    assert told[0] == "Ask rate(CODE)."
    assert 2 <= int(told[1]) <= 9
    turns = [{"role": "assistant", "content": text} for text in ("well", f"rate({code})")]
    replayed = [[reply[0]["content"] for reply in task.replay(prompt, turns, step)] for step in range(9)]
    assert replayed[4] == replayed[5] == told
    assert len({replies[1] for replies in replayed}) > 1

    def verdict(*texts: str) -> float:
        return task.verify(prompt, task.evidence(played(task, prompt, texts, 5)))

    right = f"So Answer: {int(amount) * int(told[1])}"
    assert verdict(f"rate({code})", right) == verdict("well", f"rate({code})", right) == 1.0
    assert verdict(right) == verdict(f"rate({code})", "Answer: 0") == 0.0
    train, test = (
        {one.messages[0]["content"] for one in islice(task.prompts(split, 0), 300)}
        for split in ("train", "test")
    )
    assert not train & test


def test_a_task_with_turns_runs_from_its_recipe(tmp_path: Path) -> None:
    changes = {"steps": 1, "prompts_per_step": 2, "group_size": 4, "threads": 1, "evals.accuracy": "none"}
    reflux.run(EXAMPLES / "my_lab" / "hinted.toml", changes, out=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "attempts.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "attempt"]
    several = [row for row in rows if not all(row["mask"])]
    assert several
    for row in several:
        assert row["text"].count("\n") >= 1
        assert [logp != 0 for logp, chosen in zip(row["logp"], row["mask"], strict=True) if not chosen] == [
            False
        ] * row["mask"].count(0)
    for row in rows:
        assert (row["reward"] is None) == (row["finish"] == "length")
        assert row["reward"] in (None, 0.0, 1 / 3, 0.5, 1.0)


@pytest.mark.parametrize(("share", "expected"), [(0.0, {True}), (1.0, {False}), (0.5, {True, False})])
def test_mixed_takes_stored_answers_at_the_other_steps(
    tiny_run: Callable[..., Any], share: float, expected: set[bool]
) -> None:
    """A step is stored or the student's own as a whole."""
    sampler = {"kind": "my_lab.samplers:Mixed", "share": share, "generate": {"kind": "hf", "max_tokens": 12}}
    done = tiny_run("full", sampler=sampler, task={"kind": "my_lab.tasks:Backwards"}, steps=5)
    seen = set()
    for step in range(1, 6):
        rows = [row for row in done.rows("attempts") if row["kind"] == "attempt" and row["step"] == step]
        # nobody drew these tokens, so nobody gave them a probability
        stored = {not any(row["logp"]) for row in rows}
        assert len(rows) == 4
        assert len(stored) == 1
        if stored == {True}:
            assert all(row["text"] == row["question"].split()[1][::-1] for row in rows)
        seen |= stored
    assert seen == expected


def test_all_of_them_run_together_from_the_recipe(tmp_path: Path) -> None:
    recipe = EXAMPLES / "my_lab" / "recipe.toml"
    cfg = load_recipe(recipe)
    assert config_hash(from_table(to_table(cfg))) == config_hash(cfg)
    off = {f"evals.{name}": "none" for name in cfg.evals}
    summary = reflux.run(
        recipe,
        {"steps": 2, "prompts_per_step": 4, "threads": 1, "sampler.share": 1.0, **off},
        out=tmp_path / "run",
    )
    assert summary["method"] == "my_lab.objectives:Jeffreys + my_lab.credit:Surprise"
    metrics, attempts = (
        [json.loads(line) for line in (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "attempts")
    )
    learned = [row for row in attempts if row["kind"] == "learned" and row["step"] == 1]
    shares = [np.mean(np.array(row["teacher_logp"]["main"]) <= -0.5) for row in learned]
    assert metrics[0]["credit"]["surprise"]["surprising"] == pytest.approx(np.mean(shares))
    assert 0 < np.mean(shares) < 1


# --- what the library knows of them from the recipe alone

RECIPE = str(EXAMPLES / "my_lab" / "recipe.toml")


def planned(*arguments: str) -> str:
    """What the command line prints, with nothing wrapped."""
    with console.capture() as captured:
        show_plan(RECIPE, list(arguments))
    return captured.get()


def test_list_shows_the_parts_of_a_package(capsys: pytest.CaptureFixture[str]) -> None:
    with console.capture() as captured:
        list_parts("", "my_lab")
    lines = captured.get().splitlines()
    groups = [line for line in lines if not line.startswith(" ")]
    assert groups == ["samplers", "objectives", "credit", "tasks"]
    assert [line.split()[0] for line in lines if line.startswith(" ")] == [
        "my_lab.samplers:Mixed",
        "my_lab.objectives:Jeffreys",
        "my_lab.credit:Surprise",
        "my_lab.rates:Rates",
        "my_lab.tasks:Backwards",
        "my_lab.turns:Hinted",
    ]
    assert "Weight 1 where the sampled token is unlikely under the teacher" in captured.get()
    with console.capture() as captured:
        list_parts("tasks", "my_lab.tasks")
    assert captured.get().splitlines()[0] == "tasks"


def test_list_refuses_what_is_no_package_of_parts() -> None:
    with pytest.raises(ConfigError, match=r"cannot import 'my_lag'.*PYTHONPATH"):
        list_parts("", "my_lag")
    with pytest.raises(ConfigError, match="'json' defines no part"):
        list_parts("", "json")


def test_a_kind_of_another_group_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"credit.mine: 'my_lab.tasks:Backwards' is not a part of the group credit.*CreditPart",
    ):
        load_recipe(RECIPE, {"credit.mine": {"kind": "my_lab.tasks:Backwards"}})
    with pytest.raises(ConfigError, match="is not a part of the group credit"):
        load_recipe(RECIPE, {"credit.mine": {"kind": "os:system"}})


def test_its_problems_refuse_and_its_advice_is_printed() -> None:
    assert checks.warnings(load_recipe(RECIPE)) == []
    assert "without the rule" in planned("credit.surprise.elsewhere=1.0")
    with pytest.raises(
        ConfigError, match=r"credit.surprise.teacher: there is no teacher 'nobody'. Known: main"
    ):
        planned("credit.surprise.teacher=nobody")


def test_the_doctor_says_what_it_advises() -> None:
    async def first(findings: AsyncIterator[Finding]) -> list[Finding]:
        found = [await anext(findings), await anext(findings)]
        await findings.aclose()  # type: ignore[attr-defined]
        return found

    fits, advice = asyncio.run(first(examine(load_recipe(RECIPE, {"credit.surprise.elsewhere": 1.0}))))
    assert (fits.verdict, advice.verdict) == ("ok", "warning")
    assert advice.text.startswith("credit.surprise.elsewhere = 1 gives every position weight 1")


def test_its_papers_are_cited() -> None:
    found = {paper.key: paper.bibtex for paper in papers(load_recipe(RECIPE))}
    assert "Not All Tokens Are What You Need" in found["rho_1"]
    cfg = load_recipe(RECIPE)
    assert "rho_1" in model_card(cfg, 3, papers(cfg))
    assert "rho_1" not in {paper.key for paper in papers(load_recipe(RECIPE, {"credit.surprise": "none"}))}


def test_a_model_card_tells_what_ends_every_prompt() -> None:
    assert "every prompt ends with" not in model_card(load_recipe("opd"), 3, [])
    assert "- every prompt ends with: `'<think>\\n'`\n" in model_card(
        load_recipe("opd", {"learner.prompt_suffix": "<think>\n"}), 3, []
    )


def test_the_report_draws_what_its_parts_show_and_the_notes_of_its_rule(tmp_path: Path) -> None:
    off = {f"evals.{name}": "none" for name in load_recipe(RECIPE).evals}
    reflux.run(
        RECIPE,
        {"steps": 3, "prompts_per_step": 2, "threads": 1, "sampler.share": 0.5, **off},
        out=tmp_path / "run",
    )
    notes: list[str] = []
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    charts = {chart.title: chart for chart in own_charts(config, Recorded(tmp_path / "run"), notes)}
    assert set(charts) == {"Answers sampled by the student, by step", "credit.surprise: its notes by step"}
    assert notes == []
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = {
        name: [row["credit"]["surprise"][name] for row in metrics] for name in ("weight_mean", "surprising")
    }
    expected = {
        (name, str(step), f"{value:.3g}")
        for name, values in told.items()
        for step, value in enumerate(values, 1)
    }
    assert set(charts["credit.surprise: its notes by step"].rows) == expected
    shares = {share for _, _, share in charts["Answers sampled by the student, by step"].rows}
    assert shares == {"0", "1"}
    page = write_report(tmp_path / "run").read_text()
    assert "credit.surprise: its notes by step" in page


def test_a_part_that_is_gone_costs_a_note_and_not_the_page(tmp_path: Path) -> None:
    notes: list[str] = []
    config = {
        "credit": {
            "mine": {"kind": "no_such_lab.credit:Rule"},
            "surprise": {"kind": "my_lab.credit:Surprise"},
        }
    }
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "credit": {"surprise": {"surprising": 0.5}, "mine": {"kept": 1}}}\n'
    )
    (chart,) = own_charts(config, Recorded(tmp_path), notes)
    assert chart.rows == [("surprising", "1", "0.5")]
    assert [note.partition(":")[0] for note in notes] == ["credit.mine"]
