"""Sampler `teacher_samples`: images that the teachers drew, and states on straight lines to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_glyphs
from conftest import Done
from reflux.config.recipe import RunConfig
from reflux.errors import DataError
from reflux.loop import train
from reflux.training import Options
from tiny_glyphs import EVAL_STEPS, NO_EVALS, TIMES, D, behaviour, drawn, glyphs, rollouts

Config = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tiny_glyphs.Models:
    return tiny_glyphs.models(tmp_path_factory.mktemp("flows"))


@pytest.fixture
def config(models: tiny_glyphs.Models) -> Config:
    return partial(tiny_glyphs.config, known=models)


def test_each_state_lies_on_a_line_from_noise_to_the_picture(config: Config, tmp_path: Path) -> None:
    for rollout in rollouts(drawn(config("flow_sft"), tmp_path / "run", glyphs(4), n=2)):
        x_TD, t_T, v_TD = rollout.x_SD[:-1], rollout.t_S[:-1], behaviour(rollout)
        assert rollout.x_SD.shape == (TIMES + 1, D)
        assert rollout.length == TIMES == len(v_TD)
        assert rollout.mask_T.all()
        assert (np.diff(rollout.t_S) < 0).all()
        assert rollout.t_S[-1] == 0
        assert rollout.x_SD.dtype == rollout.t_S.dtype == v_TD.dtype == np.float32
        noise_TD = v_TD + rollout.x_SD[-1]
        np.testing.assert_allclose(
            x_TD, (1 - t_T)[:, None] * rollout.x_SD[-1] + t_T[:, None] * noise_TD, atol=1e-5
        )
        np.testing.assert_allclose(
            x_TD - t_T[:, None] * v_TD, np.broadcast_to(rollout.x_SD[-1], x_TD.shape), atol=1e-5
        )
        assert (rollout.noise_level, rollout.finish) == (0.0, "stop")
        levels = ((np.clip(rollout.x_SD[-1], -1, 1) + 1) * 127.5).round().astype(np.uint8).reshape(16, 16)
        np.testing.assert_array_equal(rollout.image, levels)


def test_noise_and_times_have_the_distributions_that_are_stated(config: Config, tmp_path: Path) -> None:
    """Noise: 80 x 256 standard normals, independent over times; times: the sigmoid of a standard normal."""
    from scipy import stats

    found = rollouts(drawn(config("flow_sft", sampler__positions=40), tmp_path / "run", glyphs(20)))
    noise_RTD = np.stack([behaviour(rollout) + rollout.x_SD[-1] for rollout in found])
    assert stats.kstest(noise_RTD[:, ::8].ravel(), "norm").pvalue > 1e-3
    neighbours = np.corrcoef(noise_RTD.reshape(-1, D))[np.triu_indices(800, 1)]
    # 1 / sqrt(256) each; the same noise would give 1
    assert abs(neighbours).max() < 0.45
    t = np.concatenate([rollout.t_S[:-1] for rollout in found]).astype(np.float64)
    assert stats.kstest(np.log(t / (1 - t)), "norm").pvalue > 1e-3


def test_a_prompts_picture_is_drawn_by_the_teacher_of_its_route(
    config: Config, tmp_path: Path, models: tiny_glyphs.Models
) -> None:
    """Each equals the ODE of that table's model from the same first noise; the steps are those of
    evaluations.
    """
    from reflux.models.flow.load import load_flow
    from reflux.models.rng import normal, row_key

    cfg = config("flow_sft")
    for rollout in rollouts(drawn(cfg, tmp_path / "run", glyphs(4))):
        model = load_flow(models[str(rollout.prompt.route)], "m", device="cpu")
        grid_S = model.grid(EVAL_STEPS).astype(np.float32)
        x_1D = normal(torch.tensor([row_key(cfg.seed, "train", 0, rollout.prompt.id, 0)]), -1, D)
        for t, after in pairwise(grid_S):
            with torch.no_grad():
                x_1D = x_1D + model.velocity(
                    x_1D, torch.tensor([t]), [rollout.prompt.messages[-1]["content"]]
                ) * float(after - t)
        np.testing.assert_allclose(rollout.x_SD[-1], x_1D[0].cpu().numpy(), atol=2e-5)


def test_what_is_drawn_depends_on_no_neighbour(config: Config, tmp_path: Path) -> None:
    """Alone, among others, in another order, in other chunks: the same times and noise to the bit, the same
    image up to rounding.
    """
    prompts = glyphs(6)
    together = {r.prompt.id: r for r in rollouts(drawn(config("flow_sft"), tmp_path / "a", prompts))}
    others = [
        drawn(config("flow_sft"), tmp_path / "b", prompts[3:4]),
        drawn(config("flow_sft"), tmp_path / "c", prompts[::-1]),
        drawn(config("flow_sft", sampler__generate__batch_images=2), tmp_path / "d", prompts),
    ]
    for rollout in (r for groups in others for r in rollouts(groups)):
        same = together[rollout.prompt.id]
        np.testing.assert_array_equal(rollout.t_S, same.t_S)
        np.testing.assert_allclose(rollout.x_SD, same.x_SD, atol=1e-5)
    again = {r.prompt.id: r for r in rollouts(drawn(config("flow_sft"), tmp_path / "e", prompts, step=1))}
    assert all(not np.array_equal(again[key].t_S, together[key].t_S) for key in again)
    siblings = rollouts(drawn(config("flow_sft"), tmp_path / "f", prompts[:1], n=2))
    assert not np.array_equal(siblings[0].x_SD, siblings[1].x_SD)
    assert [rollout.sample for rollout in siblings] == [0, 1]


def test_the_guidance_of_the_inner_sampler_holds_for_drawing_and_learning(
    config: Config, tmp_path: Path
) -> None:
    plain = rollouts(drawn(config("flow_sft"), tmp_path / "a", glyphs(2)))
    guided = rollouts(drawn(config("flow_sft", sampler__generate__guidance=3.0), tmp_path / "b", glyphs(2)))
    assert {rollout.guidance for rollout in plain} == {1.0}
    assert {rollout.guidance for rollout in guided} == {3.0}
    assert all(abs(a.x_SD[-1] - b.x_SD[-1]).max() > 0.1 for a, b in zip(plain, guided, strict=True))


def test_a_prompt_that_no_table_may_draw_is_an_error(config: Config, tmp_path: Path) -> None:
    prompt = replace(glyphs(1)[0], route="music")
    with pytest.raises(DataError, match="has the route 'music', for which no teacher would sample"):
        drawn(config("flow_sft"), tmp_path / "run", [prompt])


def test_evaluations_are_the_students_own(config: Config, tmp_path: Path) -> None:
    """Greedy: the same image as the plain flow sampler's."""
    cfgs = {kind: config(kind) for kind in ("flow_sft", "flow_grpo")}
    found = [
        rollouts(
            drawn(
                replace(cfg, prompts_per_step=2), tmp_path / kind, glyphs(2), purpose="eval", temperature=0.0
            )
        )
        for kind, cfg in cfgs.items()
    ]
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a.x_SD, b.x_SD)
        assert len(a.t_S) == EVAL_STEPS + 1


def test_the_loss_of_drawn_pictures_is_that_of_flow_matching(
    config: Config, tmp_path: Path, models: tiny_glyphs.Models
) -> None:
    """Mean over pixels, positions and images of (v - (x_1 - x_0))^2, by the model itself."""
    from reflux.models.flow.load import load_flow

    cfg = config("flow_sft", steps=1, **NO_EVALS)
    folder = tmp_path / "train"
    done = Done(folder, asyncio.run(train(cfg, Options(folder))))
    model, errors = load_flow(models["student"], "m", device="cpu"), []
    for rollout in rollouts(drawn(cfg, tmp_path / "again", glyphs(4))):
        texts = [rollout.prompt.messages[-1]["content"]] * TIMES
        with torch.no_grad():
            v_TD = model.velocity(
                torch.from_numpy(rollout.x_SD[:-1]), torch.from_numpy(rollout.t_S[:-1].copy()), texts
            )
        errors.append(((v_TD.cpu().numpy() - behaviour(rollout)) ** 2).mean())
    assert done.rows("metrics")[0]["loss"] == pytest.approx(float(np.mean(errors)), rel=1e-4)
