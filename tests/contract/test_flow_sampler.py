"""The flow sampler: what it records, whose random numbers it uses, where it stops, and what it refuses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import tiny
import tiny_flow
from reflux.config.requirements import Requirements
from reflux.config.step_context import SamplingParams
from reflux.errors import DataError, ModelError
from reflux.models.flow.diffusers_library import library
from reflux.models.flow.sde import sde_step
from reflux.models.rng import normal, row_key
from reflux.runtime.weights import InMemory
from reflux.samplers.flow import Flow, prompt_text
from reflux.samplers.flow_engine import FlowSampler
from reflux.types import Attempt, FlowRollout, Prompt, VelocityTarget

TRAIN = SamplingParams(0, "train", 6)
GREEDY = SamplingParams(0, "eval", 6, temperature=0.0)
DRAWN = SamplingParams(0, "eval", 6, temperature=1.0)
MU, SPREAD = 0.8, 0.4


class Cloud:
    """A model that knows its data exactly: D independent values ~ N(MU, SPREAD^2). `break_at`: (text, t) ->
    what it says there.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        size: int = 4,
        dtype: torch.dtype = torch.float32,
        broken: dict[tuple[str, int], float] | None = None,
    ):
        self.size, self.dtype, self.broken = size, dtype, broken or {}
        self.calls: list[tuple[int, float, float]] = []

    def shape(self, pixels: int = 0) -> tuple[int, int, int]:
        return (1, self.size, self.size)

    def grid(self, steps: int) -> np.ndarray:
        return np.linspace(1, 0, steps + 1)

    def velocity(
        self, x_ND: torch.Tensor, t_N: torch.Tensor, texts: Sequence[str], guidance: float = 1.0
    ) -> torch.Tensor:
        t = float(t_N[0])
        self.calls.append((len(texts), round(t, 6), guidance))
        slope = (t - (1 - t) * SPREAD**2) / ((1 - t) ** 2 * SPREAD**2 + t**2)
        v_ND = -MU + slope * (x_ND - (1 - t) * MU)
        for (text, step), value in self.broken.items():
            if abs(t - (1 - step / 6)) < 1e-4 and text in texts:
                v_ND[texts.index(text), 1] = value
        return v_ND.to(self.dtype)

    def images(self, x_ND: torch.Tensor) -> list[np.ndarray]:
        return [
            np.round(row.reshape(self.size, self.size) * 10 + 100).astype(np.uint8)
            for row in x_ND.nan_to_num().clamp(-9, 9).cpu().numpy()
        ]


def prompts(count: int = 3) -> list[Prompt]:
    return [Prompt(f"p{i}", ({"role": "user", "content": tiny_flow.TEXTS[1 + i % 5]},)) for i in range(count)]


def sampler(
    model: Any = None, requirements: Requirements | None = None, seed: int = 0, **fields: Any
) -> FlowSampler:
    context = tiny.context(requirements or Requirements(), seed=seed)
    return FlowSampler(
        Flow(**{"steps": 6, "eval_steps": 9, **fields}), context, tiny.services(), model or tiny_flow.model(0)
    )


def ask(
    acting: FlowSampler, asked: Sequence[Prompt], n: int = 1, draw: SamplingParams = TRAIN
) -> list[FlowRollout]:
    async def main() -> list[list[Attempt]]:
        cohort = replace(draw, cohort=len(asked))
        return await asyncio.gather(*(acting.sample(prompt, n, cohort) for prompt in asked))

    rollouts = [attempt.rollout for group in asyncio.run(main()) for attempt in group]
    assert all(isinstance(rollout, FlowRollout) for rollout in rollouts)
    return rollouts  # type: ignore[return-value]


def behaviour(rollout: FlowRollout) -> np.ndarray:
    assert isinstance(rollout.behaviour, VelocityTarget)
    return rollout.behaviour.v_TD


# --- what is recorded


@pytest.mark.parametrize(("guidance", "noise_level"), [(1.0, 0.7), (2.5, 0.7), (1.0, 1.2)])
def test_every_step_is_recorded_as_it_was_drawn(guidance: float, noise_level: float) -> None:
    """By hand in numpy float64, from the recorded state, the model's velocity and the noise of the row."""
    model = tiny_flow.model(0, shift=3.0)
    rollouts = ask(
        sampler(model, Requirements(behaviour=1), guidance=guidance, noise_level=noise_level), prompts(), n=2
    )
    assert [(r.prompt.id, r.sample) for r in rollouts] == [(f"p{i}", s) for i in range(3) for s in range(2)]
    for r in rollouts:
        key = torch.tensor([row_key(0, "train", 0, r.prompt.id, r.sample)])
        assert r.x_SD.shape == (7, 16)
        np.testing.assert_array_equal(r.t_S, model.grid(6).astype(np.float32))
        np.testing.assert_array_equal(r.x_SD[0], normal(key, -1, 16)[0].numpy())
        for i, (t, dt) in enumerate(zip(r.t_S[:-1].astype(float), np.diff(r.t_S).astype(float), strict=True)):
            with torch.no_grad():
                v_D = model.velocity(
                    torch.from_numpy(r.x_SD[i : i + 1]), torch.tensor([t]), [prompt_text(r.prompt)], guidance
                )[0]
            sigma = noise_level * (t / (1 - t)) ** 0.5 if t < 1 else noise_level / (-dt) ** 0.5
            mean_D = (
                r.x_SD[i] * (1 + sigma**2 / (2 * t) * dt)
                + v_D.cpu().numpy() * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
            )
            std = sigma * (-dt) ** 0.5
            np.testing.assert_allclose(
                r.x_SD[i + 1], mean_D + std * normal(key, i, 16)[0].numpy(), rtol=1e-4, atol=2e-5
            )
            if i < 5:
                np.testing.assert_allclose(behaviour(r)[i], v_D.cpu().numpy(), rtol=1e-4, atol=1e-5)
                assert r.logp_T[i] == pytest.approx(
                    stats.norm.logpdf(r.x_SD[i + 1], mean_D, std).sum(), abs=1e-3 / std
                )
        np.testing.assert_array_equal(r.image, model.images(torch.from_numpy(r.x_SD[-1:]))[0])
        assert r.made is r.image


def test_the_last_step_of_a_grid_is_not_trained() -> None:
    for r in ask(sampler(requirements=Requirements(behaviour=1)), prompts()):
        assert r.mask_T.tolist() == [True] * 5 + [False]
        assert (r.finish, r.noise_level, r.guidance, r.length) == ("stop", 0.7, 1.0, 6)
        assert r.logp_T[-1] == 0
        assert (r.logp_T[:-1] != 0).all()
        assert np.isnan(behaviour(r)[-1]).all()
        assert np.isfinite(behaviour(r)[:-1]).all()
        assert {array.dtype for array in (r.x_SD, r.t_S, r.logp_T, behaviour(r))} == {np.dtype(np.float32)}
        assert (r.t_S[0], r.t_S[-1]) == (1, 0)


def test_velocities_are_recorded_where_they_are_wanted_or_a_judge_will_ask() -> None:
    assert [r.behaviour for r in ask(sampler(), prompts())] == [None] * 3
    assert all(
        behaviour(r).shape == (6, 16) for r in ask(sampler(requirements=Requirements(behaviour=1)), prompts())
    )
    assert all(behaviour(r).shape == (6, 16) for r in ask(sampler(), prompts(), draw=DRAWN))
    assert [
        r.behaviour for r in ask(sampler(requirements=Requirements(behaviour=1)), prompts(), draw=GREEDY)
    ] == [None] * 3


def test_one_call_a_step_for_all_rows_of_a_cohort_in_chunks() -> None:
    model = Cloud()
    ask(sampler(model, batch_images=4, guidance=3.0), prompts(5), n=2)
    times = np.round(np.linspace(1, 0, 7)[:-1], 6).tolist()
    assert model.calls == [(rows, t, 3.0) for rows in (4, 4, 2) for t in times]


def test_16_bit_velocities_move_a_float32_state() -> None:
    wide, narrow = (
        ask(sampler(Cloud(dtype=dtype), Requirements(behaviour=1)), prompts())
        for dtype in (torch.float32, torch.float16)
    )
    for one, other in zip(wide, narrow, strict=True):
        assert other.x_SD.dtype == np.float32
        assert behaviour(other).dtype == np.float32
        np.testing.assert_allclose(one.x_SD, other.x_SD, atol=0.01)
        assert not np.array_equal(other.x_SD, other.x_SD.astype(np.float16))


def test_images_of_known_data_have_its_mean_and_spread() -> None:
    """The whole engine on an exact velocity: grid, random numbers and steps together."""
    rollouts = ask(
        sampler(Cloud(8), steps=80, batch_images=500), prompts(5), 100, replace(TRAIN, max_positions=80)
    )
    last = np.array([r.x_SD[-1] for r in rollouts]).ravel()
    assert last.mean() == pytest.approx(MU, abs=4 * SPREAD / len(last) ** 0.5)
    assert last.std() == pytest.approx(SPREAD, rel=0.02)


# --- random numbers


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    model = tiny_flow.model(0)
    together = {(r.prompt.id, r.sample): r for r in ask(sampler(model), prompts(5), n=3)}
    for fields, asked, n in (
        ({}, prompts(5)[3:4], 2),
        ({"batch_images": 2}, prompts(4), 3),
        ({"batch_images": 1}, prompts(2)[::-1], 1),
    ):
        for r in ask(sampler(model, **fields), asked, n):
            np.testing.assert_allclose(r.x_SD, together[r.prompt.id, r.sample].x_SD, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(r.logp_T, together[r.prompt.id, r.sample].logp_T, atol=1e-2)


def test_it_depends_on_seed_purpose_step_prompt_sample_and_dice() -> None:
    model = Cloud()

    def starts(
        asked: list[Prompt] = prompts(1), draw: SamplingParams = TRAIN, seed: int = 0, n: int = 1
    ) -> list[bytes]:
        return [r.x_SD.tobytes() for r in ask(sampler(model, seed=seed), asked, n, draw)]

    assert starts() == starts()
    found = starts(n=2) + starts(prompts(2)[1:]) + starts(seed=1)
    found += [
        image
        for draw in (replace(TRAIN, step=1), replace(TRAIN, rng=1), DRAWN)
        for image in starts(draw=draw)
    ]
    assert len(set(found)) == len(found) == 7


def test_the_global_dice_are_neither_read_nor_moved() -> None:
    model = tiny_flow.model(0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = ask(sampler(model), prompts())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for r, other in zip(one, ask(sampler(model), prompts()), strict=True):
        np.testing.assert_array_equal(r.x_SD, other.x_SD)


def test_noise_is_standard_normal_and_independent_everywhere() -> None:
    keys = torch.tensor([row_key(0, "train", step, f"p{i}", 0) for step in range(4) for i in range(25)])
    # [position, row, index]
    noise = np.stack([normal(keys, position, 401).numpy() for position in (-1, 0, 1, 7)])
    assert noise.dtype == np.float32
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    for axis in range(3):
        # of neighbouring rows, positions, and indices: those of a pair, and those of two pairs
        one, other = (
            np.take(noise, range(start, noise.shape[axis] - 1 + start), axis).ravel() for start in (0, 1)
        )
        for f in (np.asarray, np.square, np.abs):
            assert abs(np.corrcoef(f(one), f(other))[0, 1]) < 4 / len(one) ** 0.5
    radius = (noise[..., 0:400:2] ** 2 + noise[..., 1:400:2] ** 2).ravel()
    assert stats.kstest(radius, "chi2", (2,)).pvalue > 0.01


def test_noise_depends_on_key_position_and_index_alone() -> None:
    keys = torch.tensor([5, -3, 1 << 62])
    whole = normal(keys, 2, 8)
    # however many there are, also an odd number
    assert torch.equal(normal(keys, 2, 5), whole[:, :5])
    assert torch.equal(normal(keys.flip(0), 2, 8), whole.flip(0))
    assert len(torch.unique(torch.cat([whole, normal(keys, 3, 8), normal(keys, -1, 8)]))) == 72


# --- where it stops


def test_a_greedy_image_is_the_odes_from_the_first_noise() -> None:
    model = tiny_flow.model(0)
    for r in ask(sampler(model), prompts(), draw=GREEDY):
        assert (r.noise_level, r.finish, r.length) == (0, "stop", 9)
        assert not r.logp_T.any()
        scheduler = library().FlowMatchEulerDiscreteScheduler.from_config(dict(model.scheduler))
        scheduler.set_timesteps(9)
        x = normal(torch.tensor([row_key(0, "eval", 0, r.prompt.id, 0)]), -1, 16)
        for i, t in enumerate(scheduler.timesteps):
            with torch.no_grad():
                v = model.velocity(x, scheduler.sigmas[i : i + 1], [prompt_text(r.prompt)]).cpu()
            x = scheduler.step(v, t, x, return_dict=False)[0]
        # a level, where rounding falls the other way
        assert np.abs(r.image.astype(int) - model.images(x)[0]).max() <= 1


@pytest.mark.parametrize("purpose", ["eval", "score"])
def test_what_is_only_looked_at_keeps_its_picture_and_no_state(purpose: Any) -> None:
    """It still tells its times, its length and that no position counts: so no teacher is asked about states
    that are gone.
    """
    model = tiny_flow.model(0)
    everyone = ask(
        sampler(model, noise_level=0.0, steps=9),
        prompts(),
        draw=SamplingParams(0, purpose, 6, temperature=1.0),
    )
    for r, kept in zip(
        ask(sampler(model), prompts(), draw=replace(GREEDY, purpose=purpose)), everyone, strict=True
    ):
        assert r.x_SD.shape == (10, 0)
        assert (r.length, len(r.t_S), len(r.logp_T), r.finish, r.behaviour) == (9, 10, 9, "stop", None)
        assert not r.mask_T.any()
        np.testing.assert_array_equal(r.image, kept.image)
        assert kept.x_SD.shape == (10, 16)
    for r in ask(sampler(model, noise_level=0.0), prompts()):
        # training without noise learns at the states
        assert r.x_SD.shape == (7, 16)
        assert r.mask_T.tolist() == [True] * 5 + [False]


def test_a_drawn_evaluation_is_noisy_and_walks_the_training_grid() -> None:
    for r in ask(sampler(max_denoising_steps=2), prompts(), draw=DRAWN):
        assert (r.noise_level, r.finish, r.length) == (0.7, "stop", 6)


def test_training_without_noise_is_eulers_and_has_no_density() -> None:
    for r in ask(sampler(Cloud(), Requirements(behaviour=1), noise_level=0.0), prompts()):
        assert r.noise_level == 0
        assert not r.logp_T.any()
        np.testing.assert_allclose(
            np.diff(r.x_SD, axis=0)[:-1], behaviour(r)[:-1] * np.diff(r.t_S)[:-1, None], atol=1e-6
        )


@pytest.mark.parametrize("length", [1, 3, 5])
def test_a_prefix_is_the_first_steps_of_the_same_walk(length: int) -> None:
    model = tiny_flow.model(0)
    for cut, whole in zip(
        ask(sampler(model), prompts(), draw=replace(TRAIN, max_positions=length)),
        ask(sampler(model), prompts()),
        strict=True,
    ):
        np.testing.assert_array_equal(cut.x_SD, whole.x_SD[: length + 1])
        np.testing.assert_array_equal(cut.t_S, whole.t_S[: length + 1])
        np.testing.assert_array_equal(cut.logp_T, whole.logp_T[:length])
        assert cut.finish == "length"
        # its last step is none of the grid's
        assert cut.mask_T.all()
        np.testing.assert_array_equal(cut.image, model.images(torch.from_numpy(cut.x_SD[-1:]))[0])


@pytest.mark.parametrize("length", [6, 100])
def test_a_length_beyond_the_grid_is_the_whole_walk(length: int) -> None:
    for r in ask(sampler(), prompts(), draw=replace(TRAIN, max_positions=length)):
        assert (r.finish, r.length, r.mask_T[-1]) == ("stop", 6, False)


def test_the_length_follows_its_schedule_in_training_and_never_cuts_an_evaluation() -> None:
    from reflux.config.schedules import Linear

    part = Flow(steps=6, max_denoising_steps=Linear(start=2, increment=1.5))
    assert [part.draw(step).max_positions for step in range(4)] == [2, 3, 5, 6]
    for purpose in ("eval", "score"):
        draws = [SamplingParams(0, purpose, 2, temperature) for temperature in (0.0, 1.0)]
        assert [ask(sampler(), prompts(1), draw=draw)[0].finish for draw in draws] == ["stop", "stop"]


# --- weights


def test_publish_copies_and_the_version_is_written_down() -> None:
    acting, other = sampler(tiny_flow.model(0)), tiny_flow.model(1)
    (before,) = ask(acting, prompts(1))
    asyncio.run(acting.publish(InMemory.of(other.net.state_dict(), 5), 5))
    (after,) = ask(acting, prompts(1))
    assert (before.version, after.version) == (0, 5)
    np.testing.assert_array_equal(after.x_SD, ask(sampler(other), prompts(1))[0].x_SD)
    assert not np.array_equal(after.x_SD[1:], before.x_SD[1:])
    with torch.no_grad():
        next(other.net.parameters()).add_(1.0)
    np.testing.assert_array_equal(ask(acting, prompts(1))[0].x_SD, after.x_SD)


def opened(folder: Path, **fields: Any) -> FlowSampler:
    context = tiny.context(model=tiny_flow.save(folder, 3))

    async def main() -> FlowSampler:
        async with Flow(**{"steps": 6, **fields}).open(context, tiny.services()) as acting:
            return acting

    return asyncio.run(main())


def test_it_opens_the_learners_model_as_its_own_frozen_copy(tmp_path: Path) -> None:
    acting = opened(tmp_path)
    assert not any(parameter.requires_grad for parameter in acting.model.net.parameters())
    (one,), (other,) = ask(acting, prompts(1)), ask(sampler(tiny_flow.model(3)), prompts(1))
    np.testing.assert_allclose(one.x_SD, other.x_SD, rtol=1e-5, atol=1e-5)


def test_a_size_that_does_not_fit_is_refused_as_it_opens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        opened(tmp_path, pixels=7)


def test_seconds_go_to_sampling_or_to_the_evaluation() -> None:
    acting = sampler(Cloud())
    ask(acting, prompts(1))
    assert set(acting.services.clock.take()) == {"sample", "total"}
    ask(acting, prompts(1), draw=DRAWN)
    assert set(acting.services.clock.take()) == {"eval", "total"}


# --- bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("step", [0, 4, 5])
@pytest.mark.parametrize("draw", [TRAIN, GREEDY])
def test_a_velocity_that_is_not_finite_is_refused_by_name(
    value: float, step: int, draw: SamplingParams
) -> None:
    model = Cloud(broken={(tiny_flow.TEXTS[2], step): value})
    with pytest.raises(
        ModelError, match=rf"prompt p1: at denoising step {step} \(from 0, of 6; t = .*not finite"
    ):
        ask(sampler(model, eval_steps=6), prompts(3), draw=draw)


def test_so_is_a_state_that_overflows_and_what_is_merely_large_is_not_clamped() -> None:
    # the last step: times -1/6, and (1 + a^2/2)
    model = Cloud(broken={(tiny_flow.TEXTS[2], 5): -3e38})
    (r,) = ask(sampler(model), prompts(2)[1:])
    assert r.x_SD[-1, 1] == pytest.approx(3e38 / 6 * (1 + 0.7**2 / 2), rel=1e-4)
    with pytest.raises(ModelError, match="prompt p1: at denoising step 5 "):
        ask(sampler(model, noise_level=5.0), prompts(2)[1:])


def test_only_the_velocity_of_the_first_bad_prompt_is_named() -> None:
    model = Cloud(broken={(tiny_flow.TEXTS[2], 3): float("nan"), (tiny_flow.TEXTS[3], 1): float("nan")})
    with pytest.raises(ModelError, match="prompt p1: at denoising step 3 "):
        ask(sampler(model), prompts(3))


def test_the_text_of_a_prompt_is_its_last_user_message() -> None:
    turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
    assert prompt_text(Prompt("p", tuple({"role": role, "content": text} for role, text in turns))) == "d"
    with pytest.raises(DataError, match="prompt p7 has no user message"):
        prompt_text(Prompt("p7", ({"role": "system", "content": "a"},)))


def test_a_stored_step_can_be_taken_again() -> None:
    """What a learner reads, `np.diff(t_S)` as dt, gives the drawn state its recorded density."""
    for r in ask(sampler(Cloud(), Requirements(behaviour=1)), prompts()):
        for i in np.flatnonzero(r.mask_T):
            _, mean_D, std = sde_step(
                r.x_SD[i], behaviour(r)[i], r.t_S[i], np.diff(r.t_S)[i], r.noise_level, r.x_SD[i]
            )
            assert r.logp_T[i] == pytest.approx(stats.norm.logpdf(r.x_SD[i + 1], mean_D, std).sum(), abs=1e-3)
