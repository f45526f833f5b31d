"""The seam for jumps, with a part from outside: asked when, told what, saved and restored."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import outside
import tiny
from laws.test_resume import stop_after, told
from reflux.config.step_context import seed_of
from reflux.errors import ConfigError, DataError, RunError
from reflux.extrapolation.extrapolate_engine import OpenExtrapolate
from reflux.extrapolation.score import Scorer, different
from reflux.loop import train
from reflux.models.rng import row_key
from reflux.runtime.watch import Silent
from reflux.tasks.word_problems import WordProblems
from reflux.training import Options
from reflux.types import Prompt, Reward
from tiny import same

PLAIN: dict[str, Any] = {"steps": 4, "task": {"kind": "outside:Chat"}}


@pytest.fixture(autouse=True)
def empty() -> None:
    outside.HEARD.clear()


def jump(**fields: Any) -> dict[str, Any]:
    return {"extrapolation": {"kind": "outside:Jump", **fields}}


def test_it_is_told_of_the_start_and_asked_after_every_step(
    tiny_run: Callable[..., Any], student: str
) -> None:
    done = tiny_run("opd", **PLAIN, **jump(at=2))
    assert [entry[0] for entry in outside.HEARD] == ["start", "jump"]
    weights = AutoModelForCausalLM.from_pretrained(student).state_dict()
    assert outside.HEARD[0][1] == pytest.approx(
        sum(float(value.double().sum()) for value in weights.values()), rel=1e-6
    )
    _, step, before, after = outside.HEARD[1]
    assert (step, 0 <= before <= 1, 0 <= after <= 1) == (2, True, True)
    from reflux.storage import checkpoints

    state = checkpoints.read(checkpoints.of_step(done.dir / "checkpoints", 4) / "extrapolation")
    assert (state["calls"], state["trace"].tolist()) == (4, [4.0])


def test_a_jump_moves_the_student_and_everyone_learns_of_it(tiny_run: Callable[..., Any]) -> None:
    """Attempts of the next step are the jumped student's: sampled anew, they have its log-probs."""
    done = tiny_run("opd", **PLAIN, **jump(at=2, by=0.2))
    assert not same(done.weights, tiny_run("opd", **PLAIN).weights)
    pairs: dict[Any, dict[str, Any]] = {}
    for row in done.rows("attempts"):
        pairs.setdefault((row["step"], row["prompt"]), {}).update(row)
    gaps = [
        abs(now - then)
        for row in pairs.values()
        for now, then in zip(row["student_logp"], row["logp"], strict=True)
    ]
    assert max(gaps) < 1e-3
    assert [row["staleness_max"] for row in done.rows("metrics")] == [0, 0, 0, 0]


def test_a_jump_is_no_optimiser_step(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("opd", **PLAIN, **jump(at=2))
    # other weights have another version
    assert (done.state["updates"], done.state["version"]) == (4, 5)
    assert len(done.rows("metrics")) == 4


@pytest.mark.parametrize("step", [1, 2, 3])
def test_its_state_is_restored_and_the_run_goes_on_bit_for_bit(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path, step: int
) -> None:
    settings = {**PLAIN, **jump(at=3, by=0.1)}
    whole = tiny_run("opd", **settings)
    start = outside.HEARD[0][1]
    stop_after(step, tmp_path / "stopped", tiny.config("opd", student, teacher, **settings))
    outside.HEARD.clear()
    resumed = tiny_run("opd", **settings, out=tmp_path / "stopped", resume=True)
    assert outside.HEARD[0] == ("load", step, start, [float(step)])
    assert ("start",) not in [entry[:1] for entry in outside.HEARD]
    assert same(whole.state, resumed.state)
    assert told(whole) == told(resumed)


def test_scores_use_the_weights_of_the_moment(student: str, teacher: str, tmp_path: Path) -> None:
    """The score's prompts are fixed; two candidates meet the same random numbers, so equal weights have equal
    scores.
    """
    cfg = tiny.config(
        "opd",
        student,
        teacher,
        **PLAIN,
        extrapolation={"kind": "outside:Jump", "at": 2, "by": 0.0, "prompts": 5, "samples": 3},
    )
    asyncio.run(train(cfg, Options(tmp_path / "run")))
    assert outside.HEARD[1][2] == outside.HEARD[1][3]


# --- the shipped one, in runs

EXTRA: dict[str, Any] = {"kind": "extrapolate", "prompts": 4}


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], list[int]]:
    """`scores([0.5, 0.6, 0.1])`: what each scoring says after it was really made, the last one for ever.
    Returns the step of each.
    """

    def script(values: list[float]) -> list[int]:
        asked: list[int] = []
        real = Scorer.__call__

        async def behaviour(self: Scorer, evaluation: Any, rng: int = 0) -> float:
            await real(self, evaluation, rng)
            asked.append(evaluation.step)
            return values[min(len(asked), len(values)) - 1]

        monkeypatch.setattr(Scorer, "__call__", behaviour)
        return asked

    return script


@pytest.mark.parametrize(
    "extrapolation",
    [{"kind": "outside:Jump", "by": 0.2, "score": "minus_kl"}, {**EXTRA, "score": "minus_kl"}],
)
def test_a_sampler_may_keep_weights_by_their_version(
    tiny_run: Callable[..., Any], extrapolation: dict[str, Any]
) -> None:
    """What a search tries has versions of its own, so nobody takes one candidate for another, or for the
    student.
    """
    settings = {**PLAIN, "extrapolation": extrapolation}
    plain = tiny_run("full", **settings)
    behaviour = [entry[2:] for entry in outside.HEARD if entry[0] == "jump"]
    outside.HEARD.clear()
    kept = tiny_run("full", **settings, sampler__kind="outside:KeepsVersions")
    assert [entry[2:] for entry in outside.HEARD if entry[0] == "jump"] == behaviour
    assert [row["tried"] for row in kept.rows("searches")] == [row["tried"] for row in plain.rows("searches")]
    assert same(kept.state, plain.state)
    versions = [entry[1] for entry in outside.HEARD if entry[0] == "published"]
    lent = [version for version in versions if version < 0]
    assert lent == sorted(set(lent), reverse=True)
    assert len(lent) >= 2
    drawn = {row["version"] for row in kept.rows("attempts") if row["kind"] == "attempt"}
    assert drawn <= set(versions) - set(lent)


def test_without_tries_and_where_nothing_is_accepted_the_run_is_the_plain_one(
    tiny_run: Callable[..., Any], scores: Any
) -> None:
    plain = tiny_run("full", **PLAIN)
    never = tiny_run("full", **PLAIN, extrapolation={**EXTRA, "tries": 0})
    assert same(plain.state, never.state)
    assert never.rows("searches") == []
    asked = scores([0.5])
    shut = tiny_run("full", **PLAIN, extrapolation=EXTRA)
    # W and one candidate after steps 1, 2 and 4
    assert asked == [0, 0, 1, 1, 3, 3]
    assert same(plain.state, shut.state)
    told_of = [[row for row in done.rows("attempts") if row["kind"] == "attempt"] for done in (plain, shut)]
    assert told_of[0] == told_of[1]


def test_searches_are_told_counted_and_on_disk(tiny_run: Callable[..., Any], scores: Any) -> None:
    plain = tiny_run("full", **PLAIN)
    scores([0.5, 0.6, 0.7, 0.1, 0.5, 0.4, 0.5, 0.4])
    done = tiny_run("full", **PLAIN, extrapolation={**EXTRA, "samples": 3})
    rows = done.rows("searches")
    assert [(row["step"], row["accepted"], len(row["tried"])) for row in rows] == [
        (1, 4, 3),
        (2, 0, 1),
        (4, 0, 1),
    ]
    assert not same(done.weights, plain.weights)
    metrics = done.rows("metrics")
    assert [row["tokens_scored"] for row in metrics] == [
        rows[0]["tokens"],
        rows[1]["tokens"],
        0,
        rows[2]["tokens"],
    ]
    assert rows[0]["tokens"] >= 4 * 4 * 3
    assert ["score" in row["seconds"] for row in metrics] == [True, True, False, True]
    assert "tokens_scored" not in plain.rows("metrics")[0]
    # the same attempts: the jump comes after them
    first, alone = metrics[0]["flops"], plain.rows("metrics")[0]["flops"]
    assert (first["learn"], first["teach"]) == (alone["learn"], alone["teach"])
    listed = done.rows("parts/extrapolation/score_prompts")
    read = rows[0]["tokens"] + 4 * 3 * sum(len(done_prompt(prompt)) for prompt in listed)
    parameters = alone["learn"] / 6 / (alone["teach"] / 2 / teacher_parameters(done)) if alone["teach"] else 0
    assert first["sample"] - alone["sample"] == pytest.approx(2 * parameters * read, rel=1e-6)


def done_prompt(listed: dict[str, Any]) -> list[int]:
    """A listed prompt as the student reads it."""
    from reflux.assets.characters import character_tokenizer
    from reflux.models.chat.renderer import Renderer

    return Renderer(character_tokenizer(), None, {}).ids(listed["messages"])


def teacher_parameters(done: Any) -> int:
    import tomllib

    from reflux.models.parameters import parameter_count

    table = tomllib.loads((done.dir / "config.toml").read_text())
    return parameter_count(AutoModelForCausalLM.from_pretrained(table["teachers"]["main"]["model"]))


def test_moments_schedule_and_counter_know_nothing_of_a_jump(
    tiny_run: Callable[..., Any], scores: Any
) -> None:
    settings = {**PLAIN, "steps": 1, "learner__lr": {"kind": "linear", "start": 1e-3, "stop": 0.0}}
    plain = tiny_run("full", **settings)
    scores([0.5, 0.6, 0.1])
    done = tiny_run("full", **settings, extrapolation=EXTRA)
    assert (done.state["version"], plain.state["version"]) == (2, 1)
    names = {
        name
        for name in done.state
        if name != "version"
        and not torch.equal(torch.as_tensor(done.state[name]), torch.as_tensor(plain.state[name]))
    }
    assert names
    assert all(
        name.startswith("weight/") and ("self_attn" in name or "mlp" in name) and "norm" not in name
        for name in names
    )
    assert done.rows("metrics")[0]["lr"] == plain.rows("metrics")[0]["lr"]


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_no_training_attempt_comes_from_a_candidate(
    tiny_run: Callable[..., Any], scores: Any, monkeypatch: pytest.MonkeyPatch, max_staleness: int
) -> None:
    """Weights attempts were sampled from, against those that were tried and rejected; the next ones come from
    where the search ended.
    """
    from reflux.extrapolation import extrapolate_engine
    from reflux.samplers.hf_engine import HFSampler

    name, tried, ended, sampled = "model.layers.0.mlp.up_proj.weight", [], [], []
    go, after, sample = extrapolate_engine._Path.go, OpenExtrapolate.after_step, HFSampler._groups

    def noted_go(self: Any, multiple: int) -> None:
        go(self, multiple)
        tried.append(mark(self.access.read([name])[name]))

    async def noted_after(self: Any, access: Any, *rest: Any) -> bool:
        jumped = await after(self, access, *rest)
        ended.append(mark(access.read([name])[name]))
        return jumped

    async def noted_sample(self: Any, requests: Any) -> Any:
        if requests[0][2].purpose == "train":
            sampled.append((requests[0][2].step, mark(self.model.net.state_dict()[name])))
            # the student has learnt before all that is in flight has landed
            await asyncio.sleep(0.2 if max_staleness else 0)
        return await sample(self, requests)

    monkeypatch.setattr(extrapolate_engine._Path, "go", noted_go)
    monkeypatch.setattr(OpenExtrapolate, "after_step", noted_after)
    monkeypatch.setattr(HFSampler, "_groups", noted_sample)
    scores([0.5, 0.6, 0.1, 0.5, 0.4, 0.5, 0.7, 0.8, 0.1])
    done = tiny_run("full", **(PLAIN | {"steps": 6}), max_staleness=max_staleness, extrapolation=EXTRA)
    assert [row["accepted"] for row in done.rows("searches")] == [2, 0, 4]
    assert len(set(tried) - set(ended)) >= 4
    assert not {weights for _, weights in sampled} & (set(tried) - set(ended))
    if not max_staleness:
        assert [weights for _, weights in sampled][1:] == ended[:-1]
    assert [row["step"] for row in done.rows("metrics")] == [1, 2, 3, 4, 5, 6]
    # a jump throws away what is in flight: after that of step 4 all are asked again
    assert done.rows("metrics")[4]["staleness_max"] == 0


def mark(weights: torch.Tensor) -> bytes:
    return weights.detach().cpu().numpy().tobytes()


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4.0}])
def test_a_run_with_searches_resumes_bit_for_bit(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path, step: int, lora: Any
) -> None:
    settings = {
        **PLAIN,
        "learner__lora": lora,
        "learner__lr": 0.003,
        "extrapolation": {**EXTRA, "score": "minus_kl", "samples": 8},
    }
    whole = tiny_run("full", **settings)
    assert any(row["accepted"] for row in whole.rows("searches"))
    stop_after(step, tmp_path / "stopped", tiny.config("full", student, teacher, **settings))
    resumed = tiny_run("full", **settings, out=tmp_path / "stopped", resume=True)
    assert same(whole.state, resumed.state)
    assert told(whole) == told(resumed)
    assert (whole.dir / "student" / "model.safetensors").read_bytes() == (
        resumed.dir / "student" / "model.safetensors"
    ).read_bytes()


def test_an_accelerator_cannot_be_switched_on_half_way(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("full", **PLAIN)
    with pytest.raises(RunError, match="extrapolation: was None"):
        tiny_run("full", **(PLAIN | {"steps": 6}), extrapolation=EXTRA, out=done.dir, resume=True)


def test_names_that_match_nothing_are_refused_before_training(
    tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="matches no parameter"):
        tiny_run("full", **PLAIN, extrapolation={**EXTRA, "include": ["attnn"]}, out=tmp_path / "run")
    assert not (tmp_path / "run" / "attempts.jsonl").exists()


# --- the score


def test_the_prompts_are_different_ones_of_the_training_split_and_listed(
    tiny_run: Callable[..., Any],
) -> None:
    done, again = (tiny_run("full", steps=1, extrapolation={**EXTRA, "prompts": 30}) for _ in range(2))
    rows = done.rows("parts/extrapolation/score_prompts")
    assert rows == again.rows("parts/extrapolation/score_prompts")
    assert len({row["id"] for row in rows}) == 30
    assert all(row["id"].startswith("train-") and row["answer"] is not None for row in rows)
    assert rows != tiny_run("full", steps=1, seed=1, extrapolation={**EXTRA, "prompts": 30}).rows(
        "parts/extrapolation/score_prompts"
    )
    held_out = {prompt.messages[0]["content"] for prompt in WordProblems().prompts("test", 0)}
    assert not held_out & {row["messages"][0]["content"] for row in rows}


def test_fewer_prompts_than_asked_for_are_all_used_and_that_is_said(
    student: str, teacher: str, tmp_path: Path
) -> None:
    task = lines(tmp_path, [{"id": f"l{i}", "prompt": f"what is {i}?", "answer": str(i)} for i in range(7)])
    behaviour = Noted()
    cfg = tiny.config(
        "full",
        student,
        teacher,
        **(PLAIN | {"steps": 2, "task": task}),
        extrapolation={**EXTRA, "prompts": 50},
    )
    asyncio.run(train(cfg, Options(tmp_path / "run", watch=behaviour)))
    path = tmp_path / "run" / "parts" / "extrapolation" / "score_prompts.jsonl"
    listed = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert sorted(listed) == [f"l{i}" for i in range(7)]
    assert (
        "extrapolation scores on all 7 training prompts, because fewer than the 50 that were asked for exist"
        in behaviour.texts
    )


def test_a_stream_that_recurs_is_read_until_nothing_new_comes() -> None:
    def stream(period: int) -> Any:
        return (
            Prompt(f"p{i % period}", ({"role": "user", "content": f"{i % period}"},))
            for i in itertools.count()
        )

    assert [prompt.id for prompt in different(stream(5), 3)] == ["p0", "p1", "p2"]
    assert [prompt.id for prompt in different(stream(3), 5)] == ["p0", "p1", "p2"]
    assert [prompt.id for prompt in different(iter([]), 5)] == []


def test_copies_of_one_question_are_one_question(tmp_path: Path) -> None:
    """`reflux difficulty` repeats prompts as `id#2`; two other prompts may well have a '#' in their names."""
    names = ["a", *(f"a#{copy}" for copy in range(2, 9)), "b#1", "b#2"]
    prompts = [
        Prompt(name, ({"role": "user", "content": "a" if name[0] == "a" else name},)) for name in names
    ]
    assert [prompt.id for prompt in different(itertools.cycle(prompts), 3)] == ["a", "b#1", "b#2"]
    assert [prompt.id for prompt in different(itertools.cycle(prompts), 4)] == ["a", "b#1", "b#2"]


@pytest.mark.parametrize(
    ("values", "score", "ungraded"),
    [([1.0, None, None, 0.5], 0.375, 2), ([None] * 4, math.nan, 4), ([0.0, 1.0, 1.0, 1.0], 0.75, 0)],
)
def test_an_answer_that_could_not_be_judged_counts_as_wrong(
    tiny_run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    values: list[float | None],
    score: float,
    ungraded: int,
) -> None:
    """Else weights whose answers time out would win. Where nothing was judged there is no score."""
    behaviour: list[float] = []
    real = Scorer.__call__

    async def judge(self: Any, task: Any, attempts: Any) -> list[Reward]:
        return [Reward(value) for value in values]

    async def objective_teachers(self: Scorer, *rest: Any) -> float:
        behaviour.append(await real(self, *rest))
        return behaviour[-1] if math.isfinite(behaviour[-1]) else 0.0

    monkeypatch.setattr("reflux.grading.graders.Graders.judge_attempts", judge)
    monkeypatch.setattr(Scorer, "__call__", objective_teachers)
    done = tiny_run("full", **(PLAIN | {"steps": 1}), extrapolation=EXTRA)
    assert behaviour == pytest.approx([score, score], nan_ok=True)
    assert [row["ungraded"] for row in done.rows("searches")] == [2 * ungraded]


def test_accuracy_without_answers_is_refused_and_minus_kl_needs_none(
    tiny_run: Callable[..., Any], tmp_path: Path
) -> None:
    task = lines(tmp_path, [{"id": f"l{i}", "prompt": f"what is {i}?"} for i in range(9)])
    settings = PLAIN | {"steps": 2, "task": task}
    with pytest.raises(
        DataError, match=r"judges answers, but 4 of its 4 training prompts have no reference answer.*minus_kl"
    ):
        tiny_run("full", **settings, extrapolation=EXTRA)
    done = tiny_run("full", **settings, extrapolation={**EXTRA, "score": "minus_kl"})
    assert [row["score"] for row in done.rows("searches")] == ["minus_kl"] * 2
    assert all(row["here"] < 0 for row in done.rows("searches"))


def test_minus_kl_is_minus_the_kl_to_the_teacher_on_own_samples(tiny_run: Callable[..., Any]) -> None:
    """Many samples against the exact KL of student and teacher. The teacher's tokens are counted."""
    settings = {"steps": 1, "learner__lr": 1e-7, "prompts_per_step": 100}
    table = {**EXTRA, "score": "minus_kl", "prompts": 100, "samples": 4, "tries": 1}
    done = tiny_run("full", **settings, extrapolation=table)
    (row,) = done.rows("searches")
    # of the step's own attempts, the whole vocabulary
    exact = done.rows("metrics")[0]["kl_nats_trained"]
    assert row["here"] == pytest.approx(-exact, rel=0.1)
    alone = tiny_run("full", **settings).rows("metrics")[0]["flops"]
    flops = done.rows("metrics")[0]["flops"]
    assert flops["teach"] > 5 * alone["teach"]
    assert flops["learn"] == alone["learn"]


def test_a_scored_answer_has_a_limit_of_its_own(tiny_run: Callable[..., Any], scores: Any) -> None:
    """That of the sampler's longest answer, or what is said; never a cap of training."""
    cap = {"kind": "linear", "start": 1, "increment": 0.25}
    for limit, longest in ((None, 12), (20, 20)):
        scores([0.5])
        done = tiny_run(
            "full",
            **PLAIN,
            sampler__train_max_tokens=cap,
            extrapolation={**EXTRA, "prompts": 40, "max_tokens": limit},
        )
        (first, *_) = done.rows("searches")
        assert 40 * 2 * 1.5 < first["tokens"] <= 40 * 2 * longest
    assert (
        max(
            len(row["tokens"])
            for row in done.rows("attempts")
            if row["kind"] == "attempt" and row["step"] == 1
        )
        == 1
    )


def test_fresh_dice_are_other_dice_of_the_same_prompts(student: str, teacher: str, tmp_path: Path) -> None:
    from contextlib import closing
    from functools import partial

    from reflux import checks
    from reflux.config.recipe import part_context
    from reflux.evals.evaluation import Evaluation
    from reflux.extrapolation.score import scorer
    from reflux.loop import open_parts
    from reflux.runtime.services import Services

    cfg = tiny.config("full", student, teacher, **PLAIN, extrapolation={**EXTRA, "prompts": 12, "samples": 4})

    async def script() -> list[float]:
        context = partial(part_context, cfg, checks.join(cfg), run_folder=tmp_path / "run")
        with closing(Services(cfg.learner.student)) as services:
            async with open_parts(cfg, context, services) as (learner, sampler, _, teachers, _):
                await sampler.publish(learner.publish(), 0)
                asked = Evaluation(context("sampler"), services, cfg.sampler, sampler, teachers)
                found = scorer(cfg.extrapolation, context, services)
                assert found is not None
                return [await found(asked, rng) for rng in (0, 0, 1, 1, 2)]

    one, again, fresh, fresh_again, third = asyncio.run(script())
    assert (one, fresh) == (again, fresh_again)
    assert len({one, fresh, third}) > 1


def test_fresh_dice_leave_the_prompts_as_the_task_knows_them(
    tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, scores: Any
) -> None:
    """`open_env` of a task may look its prompt up by id."""
    asked: list[str] = []
    open_env = outside.Chat.open_env

    def objective_teachers(self: Any, prompt: Prompt, *rest: Any) -> Any:
        asked.append(prompt.id)
        return open_env(self, prompt, *rest)

    monkeypatch.setattr(outside.Chat, "open_env", objective_teachers)
    # accepted, so that a second comparison follows with random numbers of its own
    scores([0.5, 0.6, 0.5, 0.4])
    done = tiny_run(
        "full", **(PLAIN | {"steps": 1}), extrapolation={**EXTRA, "rescore_incumbent": True, "samples": 4}
    )
    assert [len(row["tried"]) for row in done.rows("searches")] == [2]
    assert asked
    assert all(name.removeprefix("train-").isdigit() for name in asked)


def test_dice_of_0_add_nothing_to_the_key() -> None:
    """Runs without extrapolation draw what they would draw if there were none."""
    assert (
        row_key(1, "train", 2, "p", 3, 4)
        == row_key(1, "train", 2, "p", 3, 4, 0)
        == seed_of(1, "train", 2, "p", 3, 4)
    )
    assert len({row_key(1, "score", 2, "p", 3, 4, rng) for rng in range(5)}) == 5


def test_attempts_that_a_jump_throws_away_are_counted(tiny_run: Callable[..., Any], scores: Any) -> None:
    """Their lines stay in attempts.jsonl, and the step that asked again says what they cost."""
    scores([0.5, 0.6, 0.1, 0.5, 0.4, 0.5, 0.7, 0.8, 0.1])
    done = tiny_run("full", **(PLAIN | {"steps": 6}), max_staleness=2, extrapolation=EXTRA)
    metrics = {row["step"]: row for row in done.rows("metrics")}
    written = Counter(
        row["step"] for row in done.rows("attempts") if row["kind"] == "attempt" for _ in row["tokens"]
    )
    assert {step: row["tokens_sampled"] + row["tokens_discarded"] for step, row in metrics.items()} == written
    assert [row["accepted"] for row in done.rows("searches")] == [2, 0, 4]
    assert {step for step, row in metrics.items() if row["tokens_discarded"]} == {2, 3, 5, 6}
    plain = tiny_run("full", **(PLAIN | {"steps": 6}), max_staleness=2)
    assert "tokens_discarded" not in plain.rows("metrics")[0]
    prompts = itertools.islice(outside.Chat().prompts("train", 0), 40)
    asked = {prompt.id: len(done_prompt({"messages": prompt.messages})) for prompt in prompts}
    for row in (metrics[3], metrics[6]):
        # no search after these, so their FLOP are their attempts' and the discarded ones'
        acted = [
            line
            for line in done.rows("attempts")
            if line["kind"] == "attempt" and line["step"] == row["step"]
        ]
        read = sum(asked[line["prompt"]] + len(line["tokens"]) for line in acted)
        assert row["flops"]["sample"] == pytest.approx(2 * student_parameters(done) * read)


def student_parameters(done: Any) -> int:
    from reflux.models.parameters import parameter_count

    return parameter_count(AutoModelForCausalLM.from_pretrained(done.dir / "student"))


class Noted(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def noted(self, text: str) -> None:
        self.texts.append(text)


def lines(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "jsonl", "path": str(folder / "lines.jsonl")}
