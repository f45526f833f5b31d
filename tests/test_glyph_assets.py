"""The shipped flow models: their contents, how they were made, and their documented abilities."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from safetensors import safe_open

from reflux.assets import folder, glyph_models
from reflux.assets.glyph_models import (
    FLOW_SPECS,
    blank,
    cold_start,
    drawings,
    exam,
    first,
    flow_matching,
    pictures_of,
)
from reflux.assets.make import main
from reflux.evals.problems import problems
from reflux.metrics.intervals import wilson
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.load import load_flow
from reflux.samplers.flow import prompt_text
from reflux.tasks.glyph_drawing import DOMAINS, draw
from reflux.tasks.glyph_reading import quality
from reflux.tasks.glyphs import Glyphs

NAMES = ("glyph_base", "glyph_digits", "glyph_counts")
FILES = {
    "README.md",
    "model_index.json",
    "prompts/prompts.json",
    "prompts/prompts.safetensors",
    "scheduler/scheduler_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
}
TINY = replace(FLOW_SPECS["glyph_base"], steps=2, batch=4, warmup=1, layers=1, problems=4)
STATED = re.compile(
    r"^- held-out (\w+), (.+): ([0-9]+)/([0-9]+) right \((.+)%, 95 % interval (.+)% to (.+)%\), quality "
    r"([0-9.]+)$",
    re.MULTILINE,
)


def shipped(name) -> FlowModel:
    return load_flow(f"reflux:{name}", "model", device="cpu")


def files(where):
    return {str(path.relative_to(where)) for path in where.rglob("*") if path.is_file()}


def stated(name):
    """The results in a model's card: (right, images, quality) by domain and how it was asked."""
    found = STATED.findall((folder(name) / "README.md").read_text())
    return {
        (domain, how): (int(right), int(images), float(clean))
        for domain, how, right, images, _, _, _, clean in found
    }


# --------------------------------------------------------------------------------------------------
# what they are


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_holds_exactly_these_files_in_16_bits_and_is_small(name):
    assert files(folder(name)) == FILES
    assert sum((folder(name) / file).stat().st_size for file in FILES) < 1_300_000
    for file in FILES:
        if file.endswith(".safetensors"):
            with safe_open(folder(name) / file, "pt") as weights:
                assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_whole_and_what_its_spec_says(name):
    model, made = shipped(name), blank(FLOW_SPECS[name])
    found, expected = model.net.state_dict(), made.net.state_dict()
    assert {key: value.shape for key, value in found.items()} == {
        key: value.shape for key, value in expected.items()
    }
    assert all(value.isfinite().all() for value in found.values())
    table = model.net.prompts
    assert table is not None
    parts = (
        (model.net.transformer, "transformer/diffusion_pytorch_model.safetensors"),
        (table, "prompts/prompts.safetensors"),
    )
    for part, file in parts:
        with safe_open(folder(name) / file, "pt") as weights:
            # nothing left out, nothing left at its first value
            stored = {key: weights.get_tensor(key) for key in weights.keys()}  # noqa: SIM118
        assert stored.keys() == part.state_dict().keys()
        assert all(stored[key].float().equal(value) for key, value in part.state_dict().items())
    assert table.texts == ("", *Glyphs().texts())
    assert len(table.texts) == 17
    assert model.scheduler["shift"] == 1.0
    assert model.shape() == (1, 16, 16)
    np.testing.assert_allclose(
        model.grid(10),
        [*np.linspace(1, 1e-3, 10), 0],
        atol=1e-6,
        # as diffusers has it: the last step is a short one
    )


def test_the_models_are_of_the_size_the_method_page_gives():
    config = shipped("glyph_base").net.transformer.config
    expected = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "caption_projection_dim": 64,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 8,
    }
    assert {key: config[key] for key in expected} == expected
    assert sum(weight.numel() for weight in shipped("glyph_base").net.transformer.parameters()) == 581_508


@pytest.mark.parametrize("name", NAMES)
def test_a_card_states_what_was_measured_and_how_the_model_was_made(name):
    card, spec, results = (folder(name) / "README.md").read_text(), FLOW_SPECS[name], stated(name)
    ways = ("10 Euler steps", "40 Euler steps", "10 Euler steps, guidance 2")
    assert results.keys() == {(domain, how) for domain in DOMAINS for how in ways}
    assert (
        f"{spec.steps} steps of {spec.batch} drawings, lr {spec.lr:g}, seed {spec.seed}, 1 thread(s)" in card
    )
    assert f"python -m reflux.assets.make --only {name}`" in card
    assert (f"`reflux:{spec.start}`" if spec.start else "Trained from nothing") in card
    for _, _, right, images, share, low, high, clean in STATED.findall(card):
        bounds = wilson(int(right), int(images))
        assert int(images) == 480
        assert (share, low, high) == tuple(f"{100 * value:.1f}" for value in (int(right) / 480, *bounds))
        assert 0 <= float(clean) <= 1


# --------------------------------------------------------------------------------------------------
# what they know


@pytest.fixture(scope="module")
def scores():
    """By model and domain, the first 60 held-out prompts in 10 steps."""
    return {name: {domain: exam(shipped(name), domain, 60) for domain in DOMAINS} for name in NAMES}


def test_each_specialist_is_far_better_at_its_domain_than_the_other_and_than_the_base_which_has_room_to_learn(
    scores,
):
    right = {
        name: {domain: score.right / 60 for domain, score in found.items()} for name, found in scores.items()
    }
    for own, other in (("digits", "counts"), ("counts", "digits")):
        assert right[f"glyph_{own}"][own] > 0.8
        assert right[f"glyph_{own}"][own] > right[f"glyph_{other}"][own] + 0.3
        assert right[f"glyph_{own}"][own] > right["glyph_base"][own] + 0.2
        assert right[f"glyph_{other}"][own] < right["glyph_base"][own]
        assert 0.2 < right["glyph_base"][own] < 0.75


def test_the_cards_are_true(scores):
    for name, found in scores.items():
        for domain, score in found.items():
            right, images, clean = stated(name)[domain, "10 Euler steps"]
            assert score.images == 60
            # an eighth of the card's own images
            assert abs(score.right / 60 - right / images) < 0.15
            assert abs(score.quality - clean) < 0.06


def test_asked_for_nothing_a_model_draws_something_of_what_it_was_taught():
    """The empty prompt was learned too, without which guidance would push away from noise."""
    for own in DOMAINS:
        made = pictures_of(shipped(f"glyph_{own}"), [""] * 40, steps=10)
        assert np.mean([quality(image, own) for image in made]) > 0.5
        assert len({image.tobytes() for image in made}) > 30


# --------------------------------------------------------------------------------------------------
# how they are made


def test_drawings_are_what_was_asked_for_in_black_and_white():
    task = Glyphs()
    prompts = list(islice(task.prompts("train", 5), 24))
    clean_ND = drawings(prompts, random.Random(1))
    assert clean_ND.shape == (24, 256)
    assert clean_ND.dtype == torch.float32
    assert set(clean_ND.unique().tolist()) == {-1.0, 1.0}
    images = blank(TINY).images(clean_ND)
    assert all(task.verify(prompt, image).value == 1.0 for prompt, image in zip(prompts, images, strict=True))
    assert all(
        task.verify(prompt, image).parts == {"quality": 1.0}
        for prompt, image in zip(prompts, images, strict=True)
    )


def test_flow_matching_costs_nothing_where_the_velocity_is_exact_and_its_square_elsewhere(monkeypatch):
    clean_ND = drawings(list(islice(Glyphs().prompts("train", 5), 2000)), random.Random(1))
    model, texts, seen = blank(TINY), ["1 square"] * 2000, []

    def exact(self, x_ND, t_N, asked, guidance=1.0):
        seen.append((x_ND, t_N, asked))
        # x_t - x_0 = t (x_1 - x_0)
        return (x_ND - clean_ND) / t_N[:, None]

    monkeypatch.setattr(FlowModel, "velocity", exact)
    assert flow_matching(model, clean_ND, texts, torch.Generator().manual_seed(0)).item() < 1e-9
    ((x_ND, t_N, asked),) = seen
    assert asked == texts
    noise_ND = (x_ND - (1 - t_N[:, None]) * clean_ND) / t_N[:, None]
    assert noise_ND.mean().item() == pytest.approx(0, abs=0.01)
    assert noise_ND.std().item() == pytest.approx(1, abs=0.01)
    assert t_N.logit().mean().item() == pytest.approx(0, abs=0.1)
    assert t_N.logit().std().item() == pytest.approx(1, abs=0.1)
    monkeypatch.setattr(
        FlowModel, "velocity", lambda self, x_ND, t_N, asked, guidance=1.0: torch.zeros_like(x_ND)
    )
    loss = flow_matching(model, clean_ND, texts, torch.Generator().manual_seed(0))
    # the squares of noise and drawing
    assert loss.item() == pytest.approx(2, abs=0.02)


def test_a_share_of_the_prompts_is_left_out(monkeypatch):
    asked = []
    monkeypatch.setattr(
        FlowModel,
        "velocity",
        lambda self, x_ND, t_N, texts, guidance=1.0: (
            asked.extend(texts) or x_ND * self.net.prompts.rows.weight.sum()
        ),
    )
    cold_start(replace(TINY, steps=20, batch=100, domains=("digits",)))
    assert asked.count("") / len(asked) == pytest.approx(FLOW_SPECS["glyph_base"].blank, abs=0.03)
    assert {text for text in asked if text} == set(Glyphs(domains=("digits",)).texts())


def test_training_may_go_on_from_a_shipped_model_and_the_same_seed_makes_the_same():
    spec = replace(FLOW_SPECS["glyph_digits"], steps=2, batch=4, warmup=1)
    base = shipped("glyph_base").net.state_dict()
    begun = first(spec).net.state_dict()
    assert all(begun[key].equal(base[key]) for key in base)
    made = [cold_start(one).net.state_dict() for one in (spec, spec, replace(spec, seed=9))]
    assert all(made[0][key].equal(made[1][key]) for key in base)
    assert not all(made[0][key].equal(made[2][key]) for key in base)
    moved = [key for key in base if not made[0][key].equal(base[key])]
    assert "prompts.rows.weight" in moved
    assert len(moved) > 0.9 * len(base)


def test_the_seed_sets_the_noise_that_is_learned_from(monkeypatch):
    seen = []

    def record(model, clean_ND, texts, rng):
        seen.append(rng.initial_seed())
        return model.net.prompts.rows.weight.sum()

    monkeypatch.setattr(glyph_models, "flow_matching", record)
    for seed in (3, 4):
        cold_start(replace(TINY, seed=seed, steps=1))
    assert seen == [3, 4]


def test_an_exam_asks_for_a_picture_of_each_prompt_and_judges_it_by_that_prompt(monkeypatch):
    asked, rng = [], random.Random(0)
    tasks = {domain: list(problems(Glyphs(domains=(domain,)), "test")) for domain in DOMAINS}
    by_text = {prompt_text(prompt): prompt for prompts in tasks.values() for prompt in prompts}

    def artist(model, texts, *, steps, guidance, seed):
        asked.append((list(texts), steps, guidance, seed))
        # the first of each batch is too dim
        return [draw(by_text[text], rng) // (1 if index else 2) for index, text in enumerate(texts)]

    monkeypatch.setattr(glyph_models, "pictures_of", artist)
    for domain in DOMAINS:
        score = exam(blank(TINY), domain, 50, steps=7, guidance=3.0, batch=20)
        assert score.images == 50
        assert score.right == 47
        assert score.quality == pytest.approx((47 + 3 * 127 / 255) / 50)
        assert [text for texts, *_ in asked for text in texts] == [
            prompt_text(prompt) for prompt in tasks[domain][:50]
        ]
        assert {how for _, *how in asked for how in [tuple(how[:2])]} == {(7, 3.0)}
        assert len({seed for *_, seed in asked}) == 3
        asked.clear()


def test_the_seed_sets_the_first_weights():
    one, same, other = (blank(replace(TINY, seed=seed)).net.state_dict() for seed in (0, 0, 1))
    assert all(one[key].equal(same[key]) for key in one)
    assert not one["prompts.rows.weight"].equal(other["prompts.rows.weight"])


def test_pictures_are_euler_steps_along_the_model_s_own_grid(monkeypatch):
    model, times = blank(TINY), []

    def towards_grey(self, x_ND, t_N, texts, guidance=1.0):
        times.append((t_N[0].item(), guidance))
        return x_ND / t_N[:, None]

    monkeypatch.setattr(FlowModel, "velocity", towards_grey)
    made = pictures_of(model, ["1 square", "the digit 3"], steps=5, guidance=1.5)
    assert times == [(pytest.approx(t), 1.5) for t in model.grid(5)[:-1]]
    # x = t x_1 ends at 0
    assert all(abs(image.astype(int) - 127.5).max() <= 1 for image in made)


def test_making_writes_whole_folders_that_load_and_replaces_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(FLOW_SPECS, "glyph_base", TINY)
    for _ in range(2):
        main(["--only", "glyph_base", "--out", str(tmp_path), "--threads", "1"])
        assert [path.name for path in tmp_path.iterdir()] == ["glyph_base"]
        assert files(tmp_path / "glyph_base") == FILES
    assert "held-out digits, 10 Euler steps: 0/4 right" in capsys.readouterr().out
    assert "held-out digits, 10 Euler steps: 0/4 right" in (tmp_path / "glyph_base" / "README.md").read_text()
    index = json.loads((tmp_path / "glyph_base" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    found = load_flow(str(tmp_path / "glyph_base"), "model", device="cpu").net.state_dict()
    expected = cold_start(TINY).net.state_dict()
    assert all(found[key].equal(expected[key].half().float()) for key in expected)
