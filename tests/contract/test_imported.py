"""Sampler `imported`: attempts that were made elsewhere are checked, and then trained on as any others."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from conftest import Done
from reflux import checks
from reflux.assets.characters import character_tokenizer
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.errors import ConfigError, DataError, RunError
from reflux.models.chat.renderer import Renderer
from reflux.objectives.ratio import truncated_ratio
from reflux.runtime.weights import InMemory
from reflux.tasks.jsonl import Jsonl
from reflux.tasks.word_problems import WordProblems
from reflux.types import Attempt, Prompt, TokenRollout
from tiny import END, same

TOKENIZER = character_tokenizer()
RENDERER = Renderer(TOKENIZER)
TASK = [{"id": f"q{k}", "prompt": f"{k}+1?", "answer": str(k + 1)} for k in range(4)]


def ids(text: str, end: bool = True) -> list[int]:
    return [*TOKENIZER(text, add_special_tokens=False)["input_ids"], *([END] if end else [])]


def line(prompt: str | None = "q1", text: str = "2", **fields: Any) -> dict[str, Any]:
    tokens = fields.pop("response_ids", ids(text))
    made = {"response_ids": tokens, "logprobs": [-0.5] * len(tokens)}
    return {**({} if prompt is None else {"prompt_id": prompt}), **made, **fields}


def written(folder: Path, lines: list[Any], name: str = "attempts.jsonl") -> str:
    rows = [row if isinstance(row, str) else json.dumps(row) for row in lines]
    (folder / name).write_text("".join(f"{row}\n" for row in rows))
    return str(folder / name)


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    return {"kind": "jsonl", "path": written(tmp_path, TASK, "task.jsonl"), "validation": 0.0}


@pytest.fixture
def config(student: str, teacher: str, task: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """The recipe `opd` with these lines as its attempts."""

    def made(lines: list[Any], recipe: str = "opd", **overrides: Any) -> Any:
        sampler = {"kind": "imported", "path": written(tmp_path, lines), "generate": GENERATE}
        sampler |= {key: overrides.pop(key) for key in ("prompt_tokens",) if key in overrides}
        told = {"task": task, "sampler": sampler, "prompts_per_step": 1, **overrides}
        return tiny.load_recipe(
            recipe,
            {**tiny.SCALE, "learner.model": student, "teachers.main.model": teacher}
            | {key.replace("__", "."): value for key, value in told.items()},
        )

    return made


GENERATE = {"kind": "hf", "max_tokens": 12}


# --- training on a file is training on the attempts


def sampled_by(cfg: Any, tmp_path: Path, name: str = "sampled") -> Done:
    from reflux.loop import train
    from reflux.training import Options

    return Done(tmp_path / name, asyncio.run(train(cfg, Options(tmp_path / name))))


def exported(attempts: list[Attempt]) -> list[dict[str, Any]]:
    """Attempts as lines, with all digits."""
    return [
        {
            "prompt_id": one.prompt.id,
            "prompt_ids": one.prompt_tokens.tolist(),
            "response_ids": one.tokens_T.tolist(),
            "mask": one.mask_T.tolist(),
            "logprobs": one.logp_T.tolist(),
            "version": one.version,
            "finish": one.finish,
        }
        for one in map(text_of, attempts)
    ]


def text_of(attempt: Attempt) -> TokenRollout:
    assert isinstance(attempt.rollout, TokenRollout)
    return attempt.rollout


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    """The training attempts of the sampler `hf`, with all digits."""
    from reflux.samplers.hf_engine import HFSampler

    found: list[Attempt] = []
    sample = HFSampler.sample

    async def keeping(self: Any, prompt: Prompt, n: int, draw: SamplingParams) -> list[Attempt]:
        group = await sample(self, prompt, n, draw)
        if draw.purpose == "train":
            found.extend(group)
        return group

    monkeypatch.setattr(HFSampler, "sample", keeping)
    return found


@pytest.mark.parametrize("objective", ["sampled_kl", "divergence", "policy_gradient"])
def test_the_first_step_is_that_of_the_same_attempts_sampled(
    config: Callable[..., Any],
    student: str,
    teacher: str,
    task: dict[str, Any],
    tmp_path: Path,
    kept: list[Attempt],
    objective: str,
) -> None:
    """Loss, gradient norm, rewards and the weights after the step."""
    more: dict[str, Any] = {"objectives": [{"kind": objective}], "rewards.verifier": {}}
    if objective == "policy_gradient":
        # A grader under which attempts of a tiny model differ.
        task["grader"] = "judges:shortness"
        more["credit.group_advantage"] = {}
    plan = {**more, "steps": 1, "prompts_per_step": 4, "group_size": 3, "save_every": 1}
    own = tiny.load_recipe(
        "opd",
        {**tiny.SCALE, "learner.model": student, "teachers.main.model": teacher, "sampler.max_tokens": 12}
        | {"task": task, **plan},
    )
    before = sampled_by(own, tmp_path)
    lines = exported(kept)
    assert len(lines) == 12
    after = sampled_by(config(lines, **plan), tmp_path, "imported")
    (one,), (other,) = before.rows("metrics"), after.rows("metrics")
    for key in ("loss", "grad_norm", "tokens_trained", "reward_mean", "response_tokens_mean", "finishes"):
        assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-9), key
    assert one["updates"] == other["updates"] == 1
    assert other["staleness_max"] == 0
    assert other["tokens_sampled"] == 0
    for name, value in before.weights.items():
        np.testing.assert_allclose(value.cpu(), after.weights[name].cpu(), atol=2e-5)
    assert any((value != 0).any() for name, value in before.state.items() if name.startswith("adam.exp_avg/"))


def test_attempts_of_a_run_are_read_as_it_wrote_them(
    tiny_run: Callable[..., Done], student: str, teacher: str, tmp_path: Path
) -> None:
    """attempts.jsonl itself is the file. Only the last digits of log-probs are lost."""
    run = tiny_run("opd", steps=3, prompts_per_step=2, group_size=2, seed=5)
    rows = [row for row in run.rows("attempts") if row["kind"] == "attempt"]
    again = tiny_run(
        "opd",
        steps=3,
        prompts_per_step=2,
        group_size=2,
        seed=5,
        sampler={"kind": "imported", "path": str(run.dir / "attempts.jsonl"), "generate": GENERATE},
    )
    found = [row for row in again.rows("attempts") if row["kind"] == "attempt"]
    assert len(found) == len(rows) == 12
    same_keys = ("prompt", "question", "tokens", "mask", "logp", "text", "finish")
    told = [tuple(json.dumps(row[key]) for key in same_keys) for row in rows]
    assert sorted(told) == sorted(tuple(json.dumps(row[key]) for key in same_keys) for row in found)
    # The versions of the first run are kept as data.
    lines = dict(enumerate(run.rows("attempts"), 1))
    for row in again.rows("imported"):
        assert row["version_lowest"] == row["version_highest"] == lines[row["line"]]["version"]
    assert {row["version_lowest"] for row in again.rows("imported")} == {0, 1, 2}
    assert [row["step"] for row in again.rows("imported")] == [1] * 4 + [2] * 4 + [3] * 4


def test_the_ratio_divides_by_the_log_prob_of_the_file(config: Callable[..., Any], tmp_path: Path) -> None:
    """A policy with half the probability doubles the gradient of each token, up to the cap."""
    import torch

    norms = []
    for shift in (0.0, np.log(2), 50.0):
        lines = [line("q1", "abc", logprobs=[float(-1.0 - shift)] * 4)]
        # far below the student, so that every ratio is above its cap at the last shift
        run = sampled_by(
            config(lines, steps=1, learner__clip=1e9, objectives=[{"kind": "sampled_kl", "ratio_cap": 1e9}]),
            tmp_path,
            f"shift-{shift:.1f}",
        )
        norms.append(run.rows("metrics")[0]["grad_norm"])
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)
    assert truncated_ratio(torch.tensor([0.0]), torch.tensor([-50.0]), 5.0).item() == 5.0
    capped = sampled_by(
        config(lines, steps=1, learner__clip=1e9, objectives=[{"kind": "sampled_kl", "ratio_cap": 5.0}]),
        tmp_path,
        "capped",
    )
    assert capped.rows("metrics")[0]["grad_norm"] < norms[2]
    assert capped.rows("metrics")[0]["ratio_outside_share"] == 1.0


# --- which attempts a step gets


def opened(cfg: Any, script: Any, **fields: Any) -> Any:
    """Runs script(sampler) on the opened sampler of a recipe. fields: of its context."""
    from reflux.config.recipe import part_context

    requirements = fields.pop("requirements", Requirements())
    context = replace(part_context(cfg, requirements, "sampler", Path("nowhere")), **fields)
    rows: list[tuple[str, Any]] = []
    services = tiny.Services(cfg.learner.student, append=lambda name, row: rows.append((name, row)))

    async def work() -> Any:
        async with cfg.sampler.open(context, services) as sampler:
            return await script(sampler)

    return asyncio.run(work())


def attempts_of(cfg: Any, steps: int = 1, **fields: Any) -> list[list[Attempt]]:
    """The groups that the first steps train on, with the prompts as the loop numbers them."""
    from reflux.runtime.occurrences import numbered

    async def script(sampler: Any) -> list[list[Attempt]]:
        stream, found = cfg.sampler.training_prompts(cfg, 0), []
        for step in range(steps):
            prompts = numbered(islice(stream, cfg.prompts_per_step))
            found += [await sampler.sample(prompt, cfg.group_size, cfg.draw(step)) for prompt in prompts]
        return found

    return opened(cfg, script, **fields)


def test_an_epoch_has_every_whole_group_once(config: Callable[..., Any]) -> None:
    """q1 has 5 attempts, q2 has 2 and q3 has 3: at group_size 2 there are 2 + 1 + 1 groups, and two attempts
    are left over.
    """
    texts = {"q1": "abcde", "q2": "fg", "q3": "hij"}
    lines = [line(name, letter) for name, letters in texts.items() for letter in letters]
    cfg = config(lines, prompts_per_step=2, group_size=2, steps=4)
    groups = [tuple(text_of(one).text for one in group) for group in attempts_of(cfg, steps=4)]
    every = {("a", "b"), ("c", "d"), ("f", "g"), ("h", "i")}
    assert set(groups[:4]) == set(groups[4:]) == every
    notes = [text for text in checks.warnings(cfg) if "are not used" in text]
    assert len(notes) == 1
    assert notes[0].startswith("sampler: 2 of the 10 attempts in ")
    assert not [text for text in checks.warnings(replace(cfg, group_size=1)) if "are not used" in text]


def test_the_order_depends_on_the_seed_and_differs_between_epochs(config: Callable[..., Any]) -> None:
    lines = [line(None, "a", messages=[{"role": "user", "content": f"number {k}"}]) for k in range(30)]
    cfg = config(lines, steps=60)
    first = [prompt.id for prompt in islice(cfg.sampler.training_prompts(cfg, 0), 60)]
    assert sorted(first[:30]) == sorted(first[30:])
    assert first[:30] != first[30:]
    assert [prompt.id for prompt in islice(cfg.sampler.training_prompts(cfg, 17), 43)] == first[17:]
    other = replace(cfg, seed=1)
    assert [prompt.id for prompt in islice(other.sampler.training_prompts(other, 0), 60)] != first


def test_a_prompt_that_occurs_twice_in_a_step_has_other_attempts(config: Callable[..., Any]) -> None:
    cfg = config([line("q1", letter) for letter in "abcd"], prompts_per_step=2, group_size=2, steps=1)
    groups = attempts_of(cfg)
    assert [group[0].rollout.prompt.key for group in groups] == ["q1", "q1#2"]
    assert sorted(text_of(one).text for group in groups for one in group) == list("abcd")


def test_a_prompt_of_another_stream_is_refused(config: Callable[..., Any]) -> None:
    cfg = config([line("q1")])

    async def script(sampler: Any) -> Any:
        return await sampler.sample(Prompt("other", ()), 1, cfg.draw(2))

    words = r"prompt other was asked for 1 attempts at step 3, for which .* has 0\. .*`training_prompts`"
    with pytest.raises(DataError, match=words):
        opened(cfg, script)


# --- what a rollout holds


def test_an_attempt_is_what_its_line_says(config: Callable[..., Any]) -> None:
    """Two turns with a tool's text between them, versions for each token, and raw log-probs."""
    tokens = [*ids("ab"), *ids("XY", end=False), *ids("c")]
    mask = [True] * 3 + [False] * 2 + [True] * 2
    logp = [-0.1, -0.2, -0.3, None, 7.0, -0.4, 0.0]
    row = line(
        "q2",
        response_ids=tokens,
        mask=mask,
        logprobs=logp,
        raw_logprobs=[-1.0] * 7,
        version=[4, 4, 4, 0, 5, 6, 6],
        reward=0.25,
        prompt_ids=RENDERER.ids([{"role": "user", "content": "2+1?"}]),
    )
    ((attempt,),) = attempts_of(config([row]), requirements=Requirements(spans=True, specials=True))
    rollout = text_of(attempt)
    assert rollout.prompt.id == "q2"
    assert rollout.prompt.answer == "3"
    assert rollout.prompt_tokens.tolist() == row["prompt_ids"]
    assert rollout.tokens_T.tolist() == tokens
    assert rollout.mask_T.tolist() == mask
    np.testing.assert_array_equal(rollout.logp_T, np.float32([-0.1, -0.2, -0.3, 0, 0, -0.4, 0]))
    np.testing.assert_array_equal(rollout.policy_logp_T, np.float32([-1, -1, -1, 0, 0, -1, -1]))
    assert rollout.text == "ab\nc"
    assert rollout.spans_T2 is not None
    assert rollout.spans_T2.tolist() == [[0, 1], [1, 2], [2, 2], [2, 2], [2, 2], [3, 4], [4, 4]]
    assert rollout.special_T is not None
    assert not rollout.special_T.any()
    assert (rollout.version, rollout.finish, rollout.positions_acted) == (0, "stop", 0)
    assert rollout.messages[-1] == {"role": "assistant", "content": "ab\nc"}
    assert attempt.reward is not None
    assert attempt.reward.value == 0.25


def test_tokens_before_the_first_turn_write_nothing(config: Callable[..., Any]) -> None:
    row = line("q1", response_ids=ids("abc"), mask=[0, 1, 1, 1], logprobs=[None, -1, -1, -1])
    ((attempt,),) = attempts_of(config([row]), requirements=Requirements(spans=True))
    rollout = text_of(attempt)
    assert rollout.text == "bc"
    assert rollout.spans_T2 is not None
    assert rollout.spans_T2.tolist() == [[0, 0], [0, 1], [1, 2], [2, 2]]


@pytest.mark.parametrize(
    ("fields", "finish"),
    [
        ({}, "stop"),
        ({"response_ids": ids("ab", end=False)}, "length"),
        ({"mask": [True, False]}, "length"),
        ({"finish": None}, "stop"),
        *(
            ({"finish": finish}, finish)
            for finish in ("stop", "length", "max_turns", "tool_error", "timeout")
        ),
    ],
)
def test_the_finish(config: Callable[..., Any], fields: dict[str, Any], finish: str) -> None:
    ((attempt,),) = attempts_of(config([line("q1", **fields)]))
    assert attempt.rollout.finish == finish


def test_the_version_is_that_of_the_student_when_the_line_is_read(config: Callable[..., Any]) -> None:
    """So staleness counts from there, whatever the file says."""
    cfg = config([line("q1", version=99)])

    async def script(sampler: Any) -> Any:
        await sampler.publish(InMemory.of(sampler.inner.model.net.state_dict(), 3), 3)
        return await sampler.sample(next(cfg.sampler.training_prompts(cfg, 0)), 1, cfg.draw(0))

    assert opened(cfg, script)[0].rollout.version == 3


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_staleness_stays_within_its_bound(
    config: Callable[..., Any], tmp_path: Path, max_staleness: int
) -> None:
    lines = [line(f"q{k}", "abc", version=7) for k in range(4)]
    run = sampled_by(config(lines, steps=5, max_staleness=max_staleness), tmp_path)
    assert [row["updates"] for row in run.rows("metrics")] == [1] * 5
    assert max(row["staleness_max"] for row in run.rows("metrics")) == max_staleness


def test_evaluations_sample_from_the_student(config: Callable[..., Any]) -> None:
    cfg = config([line("q1", "abcdefgh")])
    prompt = next(cfg.sampler.training_prompts(cfg, 0))

    async def script(sampler: Any) -> Any:
        return await sampler.sample(prompt, 2, replace(cfg.draw(0), purpose="eval"))

    group = opened(cfg, script)
    assert len(group) == 2
    assert all(text_of(one).text != "abcdefgh" and text_of(one).logp_T.any() for one in group)


def test_a_schedule_of_lengths_cuts_attempts_and_keeps_their_reward(config: Callable[..., Any]) -> None:
    tokens = [*ids("ab"), *ids("XY", end=False), *ids("cd")]
    mask = [True] * 3 + [False] * 2 + [True] * 3
    row = line("q1", response_ids=tokens, mask=mask, logprobs=[-1.0] * 8, reward=1)
    cuts = {1: 1, 3: 3, 4: 6, 6: 8}
    for most, length in cuts.items():
        cfg = config([row], sampler__generate={**GENERATE, "train_max_tokens": most})
        ((attempt,),) = attempts_of(cfg)
        assert attempt.rollout.length == length, most
        assert attempt.rollout.finish == ("stop" if most == 6 else "length")
        assert attempt.reward is not None
        assert attempt.reward.value == 1


# --- prompts


def test_prompts_are_found_by_id_by_messages_or_are_their_own(config: Callable[..., Any]) -> None:
    def asked(text: str) -> list[dict[str, str]]:
        # the other order of keys
        return [{"content": text, "role": "user"}]

    lines = [
        line("q1", "a"),
        line("q2", "b", messages=asked("2+1?")),
        line(None, "c", messages=asked("3+1?")),
        {**line(None, "d"), "id": "q0"},
        line("mine", "e", messages=asked("new?"), answer=7),
        line(None, "f", messages=asked("newer?")),
        line("elsewhere", "g", messages=asked("2+1?")),
    ]
    cfg = config(lines, prompts_per_step=6)
    groups = {text_of(group[0]).text: group[0].rollout.prompt for group in attempts_of(cfg, steps=2)}
    assert {text: (prompt.id, prompt.answer) for text, prompt in groups.items()} == {
        "a": ("q1", "2"),
        "b": ("q2", "3"),
        "c": ("q3", "4"),
        "d": ("q0", "1"),
        "e": ("mine", "7"),
        "f": ("imported/6", None),
        "g": ("q2", "3"),
    }
    assert groups["f"].messages == tuple({"content": "newer?", "role": "user"} for _ in "1")


def test_attempts_at_a_second_occurrence_belong_to_its_prompt(config: Callable[..., Any]) -> None:
    """In attempts.jsonl `q1#2` is q1 once more, but a prompt may have such an id itself."""
    row = {"kind": "attempt", "question": "1+1?", "mask": [1, 1], "logp": [-1, -1], "finish": "stop"}
    rows = [{**row, "prompt": name, "tokens": ids(text)} for name, text in (("q1", "a"), ("q1#2", "b"))]
    cfg = config(rows, prompts_per_step=2)
    assert {group[0].rollout.prompt.id for group in attempts_of(cfg)} == {"q1"}
    copies = Jsonl(written(Path(cfg.task.path).parent, [*TASK, {**TASK[1], "id": "q1#2"}], "copies.jsonl"))
    cfg = replace(cfg, task=replace(copies, validation=0.0))
    found = {text_of(group[0]).text: group[0].rollout.prompt.id for group in attempts_of(cfg)}
    assert found == {"a": "q1", "b": "q1#2"}


def test_lines_of_a_run_without_an_attempt_are_passed_over(config: Callable[..., Any]) -> None:
    empty = {"kind": "attempt", "prompt": "q1", "question": "1+1?", "tokens": [], "finish": "error"}
    cfg = config([empty, {"kind": "learned", "prompt": "q1", "sample": 0}, "", line("q1", "z")])
    checks.inputs(cfg)
    assert [entry.number for asked in cfg.sampler.file.asked for entry in asked.entries] == [4]


def test_prompts_of_a_task_that_never_repeats_are_found_by_reading_on(config: Callable[..., Any]) -> None:
    prompt = next(WordProblems().prompts("train", 0, 700))
    cfg = config([line(prompt.id)], task={"kind": "word_problems"})
    assert next(cfg.sampler.training_prompts(cfg, 0)) == prompt


# --- rewards


def test_the_recorded_reward_is_the_verdict_where_the_recipe_says_so(
    config: Callable[..., Any], tmp_path: Path
) -> None:
    lines = [line("q1", "2", reward=0.5), line("q1", "9", reward=True), line("q1", "7")]
    plan = {"steps": 1, "group_size": 3}
    told = sampled_by(config(lines, rewards__mine={"kind": "recorded"}, **plan), tmp_path, "recorded")
    (row,) = told.rows("metrics")
    assert (row["reward_mean"], row["ungraded"]) == (0.75, 1)
    errors = [row["error"] for row in told.rows("attempts") if "error" in row]
    assert errors == ["the attempt came without a reward"]
    judged = sampled_by(config(lines, rewards__verifier={}, **plan), tmp_path, "judged")
    assert judged.rows("metrics")[0]["reward_mean"] == pytest.approx(1 / 3)
    both = {"rewards__mine": {"kind": "recorded", "weight": 2.0}, "rewards__verifier": {}}
    summed = sampled_by(config(lines[:2], steps=1, group_size=2, **both), tmp_path, "both")
    assert summed.rows("metrics")[0]["reward_mean"] == pytest.approx((2 * 0.5 + 1 + 2 * 1 + 0) / 2)
    notes = checks.warnings(config(lines, rewards__mine={"kind": "recorded"}, **plan))
    assert any("1 of the 3 attempts in" in text and "(the first is in line 3)" in text for text in notes)


def test_an_attempt_that_a_tool_ended_has_no_recorded_reward(config: Callable[..., Any]) -> None:
    from reflux.rewards.recorded_reward import recorded

    ((attempt,),) = attempts_of(config([line("q1", reward=1.0, finish="tool_error")]))
    assert recorded(attempt).value is None
    assert recorded(attempt).error


def test_recorded_rewards_need_a_sampler_that_brings_them(tiny_run: Callable[..., Done]) -> None:
    words = (
        r"rewards\.mine: the attempts of sampler 'hf' come without rewards\. Use kind = \"verifier\", or the "
        r"sampler 'imported'\."
    )
    with pytest.raises(ConfigError, match=words):
        tiny_run("opd", rewards__mine={"kind": "recorded"})


# --- refusals of the recipe


@pytest.mark.parametrize("objective", [{"kind": "sampled_kl", "ratio": "none"}])
def test_a_sampled_loss_without_ratio_is_refused(config: Callable[..., Any], objective: Any) -> None:
    words = (
        r"ratio = \"none\" is biased on attempts that another policy sampled, as those of sampler 'imported'"
    )
    with pytest.raises(ConfigError, match=words):
        checks.join(config([line()], objectives=[objective]))
    checks.join(config([line()], objectives=[{**objective, "ratio": "clip"}]))


def test_lists_of_the_policy_that_sampled_are_refused(config: Callable[..., Any]) -> None:
    words = (
        "the teacher 'behaviour' needs the most likely tokens of the policy that sampled, and the attempts "
        "of sampler 'imported' have no such lists. Use a local teacher."
    )
    for objective in (
        {"kind": "sampled_kl", "teacher": "behaviour"},
        {"kind": "divergence", "support": "teacher", "teacher": "behaviour"},
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            checks.join(config([line()], objectives=[objective]))


def test_a_divergence_may_have_a_ratio(config: Callable[..., Any]) -> None:
    cfg = config([line()], objectives=[{"kind": "divergence", "ratio": "truncated"}])
    checks.join(cfg)
    assert not [text for text in checks.warnings(cfg) if "is 1 up to rounding" in text]
    assert any(paper.key == "impala" for paper in cfg.objectives[0].papers(cfg))


# --- refusals of the file

USER = [{"role": "user", "content": "1+1?"}]
OTHER = [{"role": "user", "content": "other"}]
RUN = {"kind": "attempt", "prompt": "q1", "question": "1+1?", "tokens": ids("2"), "logp": [-1, -1]}

REFUSED: dict[str, tuple[list[Any], str]] = {
    "no tokens": ([{"prompt_id": "q1", "logprobs": [-1]}], "line 1 has no field 'response_ids' (it has"),
    "no log-probs": ([{"prompt_id": "q1", "response_ids": [9]}], "line 1 has no field 'logprobs' (it has"),
    "no prompt": ([line(None)], "line 1 names no prompt. Give 'prompt_id', the id of a training prompt"),
    "no object": (["[1]"], "line 1 is JSON but not an object"),
    "no json": ([line(), "{"], "line 2 is not JSON"),
    "nothing": ([""], "has no attempt; nothing was written."),
    "empty tokens": (
        [line(response_ids=[])],
        "line 1 needs a list of token ids in its field 'response_ids', got []",
    ),
    "tokens as text": (
        [line(response_ids="abc")],
        "line 1 needs a list of token ids in its field 'response_ids', got 'abc'",
    ),
    "a broken token": (
        [line(response_ids=[3, 4.5])],
        "line 1 has other values than whole numbers in its field 'response_ids', which holds token ids",
    ),
    "nested tokens": (
        [line(response_ids=[[3], [4, 5]])],
        "line 1 has a list inside the list of its field 'response_ids'",
    ),
    "a negative token": (
        [line(response_ids=[-3, 4])],
        "line 1 has the token id -3 in its field 'response_ids', and no id is below 0",
    ),
    "a token of another tokenizer": (
        [line(), line(response_ids=[len(TOKENIZER), 1])],
        f"line 2 has the token id {len(TOKENIZER)}, and the student's tokenizer has the ids 0 to "
        f"{len(TOKENIZER) - 1}; nothing was written. The attempts must be sampled with the tokenizer",
    ),
    "a prompt token of another tokenizer": (
        [line(prompt_ids=[len(TOKENIZER)])],
        f"line 1 has the token id {len(TOKENIZER)}",
    ),
    "too few masks": (
        [line(mask=[True])],
        "line 1 has 1 entries in its field 'mask' for 2 response tokens, and needs one for each",
    ),
    "a mask of weights": (
        [line(mask=[0.5, 1])],
        "line 1 has other values than true and false (or 1 and 0) in its field 'mask'",
    ),
    "a mask of numbers": ([line(mask=[2, 1])], "line 1 has other values than true and false (or 1 and 0)"),
    "nothing sampled": (
        [line(mask=[False, False])],
        "line 1 has no position that was sampled: its mask is false everywhere",
    ),
    "too many log-probs": (
        [line(logprobs=[-1, -1, -1])],
        "line 1 has 3 entries in its field 'logprobs' for 2 response tokens",
    ),
    "probabilities": (
        [line(logprobs=[-1, 0.3])],
        "line 1 has 0.3 at position 1 (from 0) of its field 'logprobs'. The log-prob of a sampled token is "
        "finite and at most 0, in nats",
    ),
    "no log-prob": ([line(logprobs=[None, -1])], "line 1 has no number at position 0 (from 0) of its field"),
    "an infinite log-prob": (
        ['{"prompt_id": "q1", "response_ids": [9, 1], "logprobs": [-1, -Infinity]}'],
        "line 1 has -inf at position 1 (from 0) of its field 'logprobs'",
    ),
    "log-probs as text": (
        [line(logprobs=["a", "b"])],
        "line 1 has other values than numbers in its field 'logprobs', which holds log-probs",
    ),
    "raw log-probs": (
        [line(raw_logprobs=[-1, 2])],
        "line 1 has 2 at position 1 (from 0) of its field 'raw_logprobs'",
    ),
    "a version below 0": (
        [line(version=-1)],
        "line 1 needs whole numbers of at least 0 in its field 'version', got -1",
    ),
    "versions that are no numbers": (
        [line(version=["a", "b"])],
        "line 1 needs whole numbers of at least 0 in its field 'version', got ['a', 'b']",
    ),
    "too few versions": (
        [line(version=[1])],
        "line 1 has 1 entries in its field 'version' for 2 response tokens",
    ),
    "an unknown finish": (
        [line(finish="eos")],
        "line 1 has the finish 'eos'. Known: stop, length, max_turns, tool_error, timeout. Leave the "
        "field out",
    ),
    "a reward as text": (
        [line(reward="good")],
        "line 1 has no finite number in its field 'reward', but 'good'",
    ),
    "an endless reward": (
        ['{"prompt_id": "q1", "response_ids": [9], "logprobs": [-1], "reward": NaN}'],
        "line 1 has no finite number in its field 'reward', but nan",
    ),
    "a chat that is none": (
        [line(messages="hello")],
        'line 1 has no list of {"role": text, "content": text} in its field \'messages\'',
    ),
    "a chat with its answer": (
        [line(messages=[*USER, {"role": "assistant", "content": "2"}])],
        "line 1 ends with an assistant turn in its field 'messages', which is the prompt alone. Leave out "
        "the turns that 'response_ids' holds",
    ),
    "an id twice": (
        [line(messages=USER), line(messages=OTHER)],
        "line 2 has the prompt id 'q1' of line 1 with other messages",
    ),
    "an unknown id": (
        [line("q9")],
        "line 1 has the prompt id 'q9', and no training prompt of the task has this id; nothing was written. "
        "Use the task and the seed for which the attempts were sampled, or give the prompt in the field "
        "'messages'.",
    ),
    "other messages": (
        [line(messages=OTHER)],
        "line 1 has other messages than the task's prompt q1; nothing was written. Use the task,",
    ),
    "another question": (
        [{**RUN, "question": "other"}],
        "line 1 has other messages than the task's prompt q1",
    ),
    "two prompts of one id": (
        [line(None, messages=OTHER), line("imported/1", messages=[{"role": "user", "content": "third"}])],
        "line 2 has the prompt id 'imported/1', which is also that of line 1 with another prompt",
    ),
    "an unknown route": (
        [line("new", messages=OTHER, route="maths")],
        "line 1 has a prompt that is none of the task's, with the route maths; nothing was written. The "
        "routes of the task are (none). Give one of them in the field 'route'.",
    ),
    "too few attempts": (
        [line("q2"), line("q2"), line("q1")],
        "line 3: the prompt q1 has 1 attempts in the file, and group_size = 2 needs as many; nothing was "
        "written. Add attempts, lower group_size, or leave the prompt out.",
    ),
    "too long": (
        [line(text="a" * 12)],
        "line 1 has 13 sampled tokens, and sampler.generate.max_tokens = 12; nothing was written. Raise it, "
        "or leave the line out.",
    ),
    "beyond the window": (
        [line(response_ids=[9] * 600, mask=[True] + [False] * 599)],
        "tokens, and the student's context window holds 512; nothing was written. Leave the line out.",
    ),
    "another template": (
        [line(prompt_ids=[*RENDERER.ids(USER), 9])],
        "line 1 has other 'prompt_ids' than the student's chat template renders for the prompt q1: "
        f"{len(RENDERER.ids(USER)) + 1} tokens for {len(RENDERER.ids(USER))}, and they differ from position "
        f"{len(RENDERER.ids(USER))} (from 0) on",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused_with_its_line(
    config: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    lines, words = REFUSED[name]
    cfg = config(lines, group_size=2 if name == "too few attempts" else 1)
    with pytest.raises(DataError) as refused:
        checks.inputs(cfg)
    said = str(refused.value)
    assert words in said, said
    assert said.startswith(f"sampler.path: {tmp_path / 'attempts.jsonl'}")
    assert not (tmp_path / "sampled").exists()
    with pytest.raises(DataError):
        sampled_by(cfg, tmp_path)
    assert not (tmp_path / "sampled").exists()


def test_every_check_names_the_line_it_is_about(config: Callable[..., Any]) -> None:
    """Good lines and blank ones before it do not change that."""
    with pytest.raises(DataError, match=r"line 4 has the token id -3"):
        checks.inputs(config([line(), "", line(), line(response_ids=[-3])]))


def test_a_missing_file_is_refused(config: Callable[..., Any]) -> None:
    cfg = config([line()])
    Path(cfg.sampler.path).unlink()
    words = (
        r"sampler\.path: there is no file .*attempts\.jsonl; nothing was written\. It must hold one attempt"
    )
    with pytest.raises(DataError, match=words):
        checks.inputs(cfg)
    assert checks.warnings(cfg) is not None


def test_no_recorded_reward_at_all_is_refused(config: Callable[..., Any]) -> None:
    words = r"a reward of the recipe is the recorded one, and no line has a 'reward'; nothing was written\."
    with pytest.raises(DataError, match=words):
        checks.inputs(config([line()], rewards__mine={"kind": "recorded"}))
    checks.inputs(config([line(), line(reward=0)], rewards__mine={"kind": "recorded"}))


def test_prompt_tokens_of_the_file_may_be_taken_as_they_are(
    config: Callable[..., Any], tmp_path: Path
) -> None:
    given = [*RENDERER.ids(USER), 9, 9]
    cfg = config([line(prompt_ids=given)], prompt_tokens="given", steps=1)
    checks.inputs(cfg)
    ((attempt,),) = attempts_of(cfg)
    assert text_of(attempt).prompt_tokens.tolist() == given
    assert sampled_by(cfg, tmp_path).rows("metrics")[0]["updates"] == 1
    long = config([line(prompt_ids=[9] * 511)], prompt_tokens="given")
    with pytest.raises(DataError, match="prompt and response have 513 tokens"):
        checks.inputs(long)


def test_a_system_prompt_of_the_student_is_part_of_the_comparison(config: Callable[..., Any]) -> None:
    plain = RENDERER.ids(USER)
    spoken = Renderer(TOKENIZER, "Be brief.").ids(USER)
    assert plain != spoken
    checks.inputs(config([line(prompt_ids=spoken)], learner__system="Be brief."))
    with pytest.raises(DataError, match="has other 'prompt_ids'"):
        checks.inputs(config([line(prompt_ids=plain)], learner__system="Be brief."))


def test_a_file_that_changes_under_the_run_is_noticed(config: Callable[..., Any], tmp_path: Path) -> None:
    cfg = config([line(text="ab"), line(text="cd")])
    checks.inputs(cfg)
    written(tmp_path, [line(text="abc"), line(text="d")])
    with pytest.raises(DataError, match=r"line \d .*(has changed since the run began|is not JSON)"):
        attempts_of(cfg, steps=2)


# --- size, and resuming


def test_in_memory_are_places_and_not_attempts(tmp_path: Path) -> None:
    """The file is some 20 times what is held of it, and held is the same for long lines as for short ones."""
    import tracemalloc

    from reflux.samplers.imported_file import AttemptFile

    held = []
    for length in (10, 2000):
        row = json.dumps(line("q1", response_ids=[7] * length))
        path = written(tmp_path, [row] * 100, f"long-{length}.jsonl")
        tracemalloc.start()
        file = AttemptFile(path)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(file.asked[0].entries) == 100
    assert held[1] < held[0] + 20_000
    assert held[1] < Path(path).stat().st_size / 20


def test_the_file_is_parsed_once(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Checks, prompts and the opened sampler share what was read; a line is read again when it is used."""
    from reflux.samplers import imported_file

    parsed: Counter[str] = Counter()
    plain = imported_file.object_of
    monkeypatch.setattr(
        imported_file, "object_of", lambda row, where: parsed.update([where]) or plain(row, where)
    )
    lines = [line("q1", letter) for letter in "abcd"]
    sampled_by(config(lines, steps=2, group_size=1), tmp_path)
    assert sorted(parsed.values()) == [1, 1, 2, 2]


def test_a_resumed_run_trains_on_the_same_attempts(config: Callable[..., Any], tmp_path: Path) -> None:
    from laws.test_resume import stop_after, told
    from reflux.loop import train
    from reflux.training import Options

    lines = [line(f"q{k}", letter * 2) for letter in "abc" for k in range(4)]
    cfg = config(lines, steps=5, prompts_per_step=2, save_every=2, max_staleness=0)
    whole = sampled_by(cfg, tmp_path, "whole")
    stop_after(3, tmp_path / "stopped", cfg)
    resumed = Done(tmp_path / "stopped", asyncio.run(train(cfg, Options(tmp_path / "stopped", True))))
    assert same(whole.state, resumed.state)
    assert told(whole) == told(resumed)
    assert whole.rows("imported") == resumed.rows("imported")


def test_a_changed_file_is_not_resumed(config: Callable[..., Any], tmp_path: Path) -> None:
    from laws.test_resume import stop_after
    from reflux.loop import train
    from reflux.training import Options

    lines = [line("q1", letter) for letter in "abcd"]
    cfg = config(lines, steps=4)
    stop_after(2, tmp_path / "stopped", cfg)
    changed = config([*lines, line("q2")], steps=4)
    with pytest.raises(RunError, match=r"the content of sampler\.path has changed"):
        asyncio.run(train(changed, Options(tmp_path / "stopped", True)))
