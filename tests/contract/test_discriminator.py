"""The reward `discriminator`: its scores, its gradient, what it learns, and runs with it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import tiny
from device import here
from laws.test_resume import stop_after, told
from reflux import checks
from reflux.assets.characters import character_tokenizer
from reflux.config.recipe import load_recipe
from reflux.config.step_context import StepContext
from reflux.errors import ConfigError, DataError, ModelError, StepRefused
from reflux.models.scalar_model import ScalarModel
from reflux.models.text import as_model
from reflux.rewards.bradley_terry import Pairs, bradley_terry, slopes
from reflux.rewards.discriminator import DiscriminatorReward
from reflux.rewards.discriminator_engine import OpenDiscriminator
from reflux.runtime.services import Services
from reflux.storage import checkpoints
from reflux.types import Attempt, Group, Prompt, Reward
from tiny import same

CHAT = {"kind": "outside:Chat"}
# a reward that has something to learn from in a few tiny steps
RUN = {
    "task": CHAT,
    "group_size": 3,
    "rewards__discriminator__warmup_steps": 1,
    "rewards__discriminator__lr": 1e-3,
}
TEXTS = [np.arange(6, 6 + length) for length in (9, 4, 12, 1, 9)]


def scorer(net: Any = None) -> ScalarModel:
    """In float64, with a random output, because one of zeros scores everything 0."""
    made = ScalarModel(as_model((net or tiny.net(1, layers=2)).double(), character_tokenizer()))
    with torch.no_grad():
        made.weight_H.normal_(
            generator=torch.Generator().manual_seed(0)
        ) if not made.weight_H.is_cuda else None
    return made


def opened(model: Any = None, training_positions: int = 12, **fields: Any) -> OpenDiscriminator:
    model = as_model(model or tiny.net(1), character_tokenizer())
    context = tiny.context(name="rewards.discriminator")
    context = replace(context, numbers=replace(context.numbers, training_positions=training_positions))
    cfg = DiscriminatorReward(**{"lr": 1e-2, "autocast": "off", **fields})
    return OpenDiscriminator(cfg, context, tiny.services(), model)


def group(answers: Sequence[str], written: Sequence[str], finish: str = "stop", number: int = 0) -> Group:
    """Attempts with these texts at a prompt with these answers of the teacher."""
    tokenizer, question = character_tokenizer(), tiny.rollout(1, seed=number).prompt_tokens
    prompt = Prompt(f"p{number}", ({"role": "user", "content": f"{number}?"},), references=tuple(answers))
    made = []
    for sample, text in enumerate(written):
        tokens = np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], tiny.END])
        base = tiny.rollout(len(tokens), sample=sample, finish=finish)
        made.append(Attempt(replace(base, prompt=prompt, prompt_tokens=question, tokens_T=tokens, text=text)))
    return made


def learn(reward: OpenDiscriminator, groups: Sequence[Group], step: int = 0) -> dict[str, Any]:
    asyncio.run(reward.learn(groups, StepContext(step, 0)))
    return dict(reward.services.take_reported()["rewards"]["discriminator"])


def score(reward: OpenDiscriminator, asked: Group) -> list[Reward]:
    return asyncio.run(reward.score(asked))


# --- the score


def test_the_score_is_the_output_at_the_last_token_and_at_first_0() -> None:
    made = scorer()
    for text in TEXTS:
        ids_1L = here(torch.from_numpy(text)[None])
        h_H = made.model.net(input_ids=ids_1L, output_hidden_states=True).hidden_states[-1][0, -1]
        assert float(made.measured([text], 64)) == pytest.approx(
            float((h_H @ made.weight_H).detach()), rel=1e-12
        )
        assert abs(float((h_H @ made.weight_H).detach())) > 1e-3
    fresh = ScalarModel(as_model(tiny.net(1), character_tokenizer()))
    assert fresh.measured(TEXTS, 64).tolist() == [0.0] * len(TEXTS)


@pytest.mark.parametrize("tokens", [1, 20, 1000])
def test_the_score_does_not_depend_on_padding_batch_or_order(tokens: int) -> None:
    made = scorer()
    alone = torch.cat([made.measured([text], 1) for text in TEXTS])
    torch.testing.assert_close(made.measured(TEXTS, tokens), alone, rtol=1e-12, atol=1e-12)
    backward = made.measured(TEXTS[::-1], tokens).flip(0)
    torch.testing.assert_close(backward, alone, rtol=1e-12, atol=1e-12)
    assert len(set(alone.round(decimals=9).tolist())) == len(TEXTS) - 1


@pytest.mark.parametrize("tokens", [1, 9, 20, 30, 1000])
def test_texts_are_divided_by_the_budget_and_each_is_read_once(tokens: int) -> None:
    parts = list(scorer().parts(TEXTS, tokens))
    assert sorted(index for part in parts for index in part) == list(range(len(TEXTS)))
    taken = [(len(part), len(part) * max(len(TEXTS[index]) for index in part)) for part in parts]
    assert all(count == 1 or padded <= tokens for count, padded in taken)
    assert len(parts) == {1: 5, 9: 4, 20: 3, 30: 2, 1000: 1}[tokens]


# --- the gradient


@pytest.mark.parametrize("tokens", [1, 20, 1000])
def test_the_gradient_is_that_of_the_loss_however_texts_are_divided(tokens: int) -> None:
    made, pairs = scorer(), Pairs.of([(1, 2), (1, 1)])
    expected = torch.autograd.grad(
        bradley_terry(torch.cat([made.scores([text]) for text in TEXTS]), pairs), list(made.trained.values())
    )
    _, slopes_N = slopes(made.measured(TEXTS, tokens), pairs)
    made.backward(TEXTS, slopes_N, tokens)
    found = {name: value.grad for name, value in made.trained.items() if value.grad is not None}
    assert found.keys() == made.trained.keys()
    tiny.close(dict(zip(found, expected, strict=True)), found, rtol=1e-9)


def test_the_gradient_is_the_slope_of_the_loss_in_any_direction() -> None:
    """By finite differences in float64, over all weights at once. The norms of Qwen3 compute in float32, so
    the model is a GPT-2.
    """
    tokens = len(character_tokenizer())
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=tokens, eos_token_id=tiny.END, **shape))
    made, pairs, step = scorer(here(net.eval())), Pairs.of([(1, 2), (1, 1)]), 1e-6
    _, slopes_N = slopes(made.measured(TEXTS, 1000), pairs)
    made.backward(TEXTS, slopes_N, 1000)
    rng = np.random.default_rng(0)
    way = {name: here(rng.normal(size=tuple(value.shape))) for name, value in made.trained.items()}
    slope = sum(float((value.grad * way[name]).sum()) for name, value in made.trained.items())

    def loss(factor: float) -> float:
        with torch.no_grad():
            for name, value in made.trained.items():
                value += factor * way[name]
            found = float(bradley_terry(made.measured(TEXTS, 1000), pairs))
            for name, value in made.trained.items():
                value -= factor * way[name]
        return found

    assert slope == pytest.approx((loss(step) - loss(-step)) / (2 * step), rel=1e-5)
    assert abs(slope) > 1e-3


# --- learning


def test_it_learns_to_tell_two_tokens_apart_also_by_the_prompt() -> None:
    """The answer is right at one prompt and wrong at the other, so the score must depend on both."""
    groups = [group(["a"], ["b", "b"]), group(["b"], ["a"], number=1)]
    reward = opened()
    first = learn(reward, groups)
    assert (first["pair_accuracy"], first["pairs"]) == (0.5, 3)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (first["teacher_score"], first["student_score"]) == (0.0, 0.0)
    for step in range(1, 40):
        last = learn(reward, groups, step)
    assert last["pair_accuracy"] == 1.0
    assert last["loss"] < 0.1
    assert last["teacher_score"] > last["student_score"] + 1
    values = [each.value for each in score(reward, groups[0])]
    assert values[0] == values[1]


def test_where_the_student_writes_what_the_teacher_wrote_nothing_moves() -> None:
    reward = opened()
    with torch.no_grad():
        reward.scorer.weight_H.fill_(0.3)
    found = learn(reward, [group(["a"], ["a", "a"])])
    assert found["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["pair_accuracy"] == 0.5
    assert found["grad_norm"] < 1e-6
    # The output is not 0, so other answers would move it.
    assert learn(reward, [group(["a"], ["b", "b"])])["grad_norm"] > 1e-3


def test_attempts_without_a_verdict_have_no_score_and_are_in_no_pair() -> None:
    reward, judged = opened(), group(["a"], ["b", "c"])
    lost = group(["a"], ["b"], finish="tool_error")
    empty = replace(tiny.rollout(0, finish="error"), prompt=judged[0].rollout.prompt)
    mixed = [*judged, *lost, Attempt(empty)]
    values = [(each.value, each.error) for each in score(reward, mixed)]
    assert values == [
        (0.0, None),
        (0.0, None),
        (None, "a tool of the environment failed"),
        (None, "sampling ended in an error"),
    ]
    assert learn(reward, [mixed, lost])["pairs"] == 2
    state = {name: value.detach().clone() for name, value in reward.trained.items()}
    assert learn(reward, [lost]) == {"pairs": 0}
    assert same(state, reward.trained)


def test_in_the_warm_up_it_learns_and_no_attempt_has_a_reward() -> None:
    reward, asked = opened(warmup_steps=3), group(["a"], ["b"])
    asked[0].asked_step = 2
    (early,) = score(reward, asked)
    assert early.value is None
    assert "learns alone in the first 3 steps (rewards.discriminator.warmup_steps)" in str(early.error)
    learn(reward, [asked], 2)
    asked[0].asked_step = 3
    (later,) = score(reward, asked)
    assert later.value not in (None, 0.0)


def test_several_answers_are_all_compared_and_cut_where_an_attempt_would_be() -> None:
    reward = opened(references=2, training_positions=3)
    asked = group(["abcdef", "x", "not read"], ["b", "c"])
    texts, sizes = reward._texts([asked])
    assert sizes == [(2, 2)]
    start = asked[0].rollout.prompt_length
    ids = character_tokenizer()(["abc", "x"], add_special_tokens=False)["input_ids"]
    assert [text[start:].tolist() for text in texts[:2]] == [ids[0], [*ids[1], tiny.END]]
    assert all((text[:start] == asked[0].rollout.prompt_tokens).all() for text in texts)
    assert learn(reward, [asked])["pairs"] == 4


def test_recomputed_activations_change_no_weight() -> None:
    groups = [group(["abc"], ["b", "ca"])]
    plain, again = opened(), opened(gradient_checkpointing=True)
    for reward in (plain, again):
        for step in range(2):
            learn(reward, groups, step)
    for name, value in plain.trained.items():
        torch.testing.assert_close(again.trained[name], value, rtol=1e-5, atol=1e-6)


def test_it_continues_from_what_it_saved(tmp_path: Path) -> None:
    groups = [group(["a"], ["b", "c"])]
    whole, half = opened(), opened()
    for step in range(4):
        learn(whole, groups, step)
    for step in range(2):
        learn(half, groups, step)
    half.save(tmp_path)
    again = opened()
    again.load(tmp_path)
    for step in range(2, 4):
        learn(again, groups, step)
    assert same(whole.trained, again.trained)
    assert not same(whole.trained, half.trained)


def test_a_step_that_is_not_finite_is_refused_and_moves_nothing() -> None:
    reward = opened()
    with torch.no_grad():
        reward.scorer.weight_H.fill_(torch.inf)
    before = {name: value.detach().clone() for name, value in reward.trained.items()}
    with pytest.raises(StepRefused, match=r"step 1: rewards.discriminator has loss .* lower rewards"):
        learn(reward, [group(["a"], ["b"])])
    assert same(before, reward.trained)
    assert all(each.value is None for each in score(reward, group(["a"], ["b"])))


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task.kind": "calculator"}, "the task 'calculator' has several turns"),
        ({"sampler": {"kind": "references"}}, "gives answers that the student did not write"),
        ({"learner": {"kind": "fsdp", "model": "reflux:student"}}, "trains its discriminator in one process"),
        ({"cluster": {"samplers": 1}}, "trains its discriminator in one process"),
        ({"rewards.discriminator.lr": -1e-4}, "rewards.discriminator.lr is -0.0001 at step 0"),
        ({"group_size": 1}, "group_size >= 2"),
    ],
)
def test_mistakes_are_refused_before_anything_is_loaded(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        checks.join(load_recipe("gad", changes))


def test_images_are_refused() -> None:
    changes = {"rewards.discriminator": {"kind": "discriminator"}}
    with pytest.raises(ConfigError, match=r"discriminator judges texts, and the attempts .* images"):
        checks.join(load_recipe("flow_grpo", changes))


def test_a_run_of_nothing_but_warm_up_is_advised_against() -> None:
    cfg = load_recipe("gad", {"steps": 10})
    assert any("only the discriminator learns in this run" in text for text in checks.warnings(cfg))
    assert not any("warmup" in text for text in checks.warnings(load_recipe("gad")))


def test_prompts_without_answers_are_refused_before_the_first_step(tiny_run: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"discriminator needs 1 answers .* train-5 has 0") as refused:
        tiny_run("gad", **{**RUN, "task": {"kind": "outside:Patchy"}})
    assert "reflux answers" in str(refused.value)
    with pytest.raises(DataError, match="needs 2 answers"):
        tiny_run("gad", **RUN, rewards__discriminator__references=2)


def test_a_model_with_other_tokens_is_refused(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    tiny.net(1, padded_rows=4).save_pretrained(tmp_path / "other")
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"rewards.discriminator.model: the tokens of .* are not those"):
        tiny_run("gad", **RUN, rewards__discriminator__model=str(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"rewards\.discriminator\.model"):
        tiny_run("gad", **RUN, rewards__discriminator__model=str(tmp_path / "missing"))


# --- runs


def discriminator_state(done: Any) -> dict[str, Any]:
    folder = done.dir / "checkpoints"
    last = checkpoints.of_step(folder, checkpoints.steps(folder)[-1])
    return checkpoints.read(last / "rewards" / "discriminator")


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_run_ends_as_an_uninterrupted_one(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path, step: int
) -> None:
    settings = {**RUN, "steps": 5, "save_every": 2}
    whole = tiny_run("gad", **settings)
    stop_after(step, tmp_path / "stopped", tiny.config("gad", student, teacher, **settings))
    resumed = tiny_run("gad", **settings, out=tmp_path / "stopped", resume=True)
    assert same(whole.state, resumed.state)
    assert same(discriminator_state(whole), discriminator_state(resumed))
    assert told(whole) == told(resumed)


def test_a_run_records_what_its_discriminator_does(tiny_run: Callable[..., Any]) -> None:
    done = tiny_run("gad", **RUN, steps=4)
    rows = done.rows("metrics")
    found = [row["rewards"]["discriminator"] for row in rows]
    assert (found[0]["loss"], found[0]["pair_accuracy"]) == (pytest.approx(math.log(2)), 0.5)
    assert all(each["pairs"] == 12 and each["grad_norm"] > 0 and each["lr"] == 1e-3 for each in found)
    # The student's score before the update is the reward of the step.
    assert [row["ungraded"] for row in rows] == [12, 0, 0, 0]
    for row in rows[1:]:
        mean = row["rewards"]["discriminator"]["student_score"]
        assert row["reward_mean"] == pytest.approx(mean, abs=1e-6)
        assert abs(mean) > 1e-4
    assert [row["updates"] for row in rows] == [0, 1, 1, 1]
    titles = {chart.title for chart in charts(done.dir)}
    assert titles == {"rewards.discriminator: pairs", "rewards.discriminator: scores"}
    from reflux.reports.page import write_report

    assert "rewards.discriminator: pairs" in write_report(done.dir).read_text()
    assert "rewards" not in tiny_run("rl", steps=1, task=CHAT, group_size=2).rows("metrics")[0]


def charts(folder: Path) -> list[Any]:
    from reflux.reports.recorded import Recorded

    return list(DiscriminatorReward().diagnostics("discriminator", Recorded(folder)))


def test_it_runs_beside_sampling_and_resumes_there(
    tiny_run: Callable[..., Any], student: str, teacher: str, tmp_path: Path
) -> None:
    """Not bit for bit, but all of it: each step has its pairs, and no attempt is older than the bound."""
    settings = {**RUN, "steps": 5, "save_every": 2, "max_staleness": 2}
    stop_after(3, tmp_path / "run", tiny.config("gad", student, teacher, **settings))
    done = tiny_run("gad", **settings, out=tmp_path / "run", resume=True)
    rows = done.rows("metrics")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["rewards"]["discriminator"]["pairs"] == 12 for row in rows)
    assert all(row["staleness_max"] <= 2 for row in rows)
    assert same_keys(discriminator_state(done))


def same_keys(state: dict[str, Any]) -> bool:
    names = {key.split("/", 1)[1] for key in state if key.startswith("weight/")}
    return names == {key.split("/", 1)[1] for key in state if key.startswith("adam.exp_avg/")}


def test_it_adds_up_with_a_verifier(tiny_run: Callable[..., Any]) -> None:
    """Its warm-up leaves the sum without a value, and both parts are recorded."""
    done = tiny_run("gad", **RUN, rewards__verifier={"kind": "verifier"}, steps=3)
    rows = [row for row in done.rows("attempts") if row["kind"] == "attempt"]
    early, later = (
        [row for row in rows if row["step"] == step] for step in sorted({row["step"] for row in rows})[:2]
    )
    assert all(row["reward"] is None for row in early)
    for row in later:
        parts = row["parts"]
        assert row["reward"] == pytest.approx(parts["discriminator"] + parts["verifier"])


def test_the_paper_is_cited() -> None:
    from reflux.config.citations import papers

    assert "2511.10643" in {paper.arxiv for paper in papers(load_recipe("gad"))}


def test_opening_twice_gives_the_same_start(student: str) -> None:
    """The discriminator is a copy: the learner's weights are not moved by it."""
    context = tiny.context(name="rewards.discriminator", model=student)

    async def both() -> list[dict[str, Any]]:
        states = []
        for _ in range(2):
            services = Services(context.student)
            async with DiscriminatorReward(lr=1e-2, autocast="off").open(context, services) as reward:
                states.append({name: value.detach().clone() for name, value in reward.trained.items()})
                await reward.learn([group(["a"], ["b"])], StepContext(0, 0))
        return states

    first, second = asyncio.run(both())
    assert same(first, second)
    loaded = {f"trunk.{name}": value for name, value in tiny.net(1, lift=1.5).model.named_parameters()}
    assert same({name: value for name, value in first.items() if name != "score"}, loaded)
