"""What a flow model says of its times and of its states, and the encoders and decoder beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny_flow
from reflux.errors import ModelError
from reflux.models.flow.encoders import TextEncoders
from reflux.models.flow.flow_model import FlowModel
from reflux.models.flow.load import load_flow
from reflux.models.flow.sde import step_factors

MODEL = tiny_flow.model(0)


def with_scheduler(**fields: Any) -> FlowModel:
    return replace(MODEL, scheduler={**MODEL.scheduler, **fields})


def test_every_grid_begins_at_1_falls_and_ends_at_0() -> None:
    for shift in np.arange(100, 1001) / 100:
        t_S = with_scheduler(shift=float(shift)).grid(7)
        assert (t_S[0], t_S[-1]) == (1.0, 0.0), shift
        assert (np.diff(t_S) < 0).all(), shift
        # diffusers' own
        sigma_S = tiny_flow.grid(7, float(shift))
        np.testing.assert_allclose(t_S, sigma_S, rtol=0, atol=2e-7)
        np.testing.assert_array_equal(t_S[1:], sigma_S[1:])


@pytest.mark.parametrize("shift", [1.0, 1.18, 1.32, 1.43, 3.0])
def test_the_first_step_is_as_noisy_as_the_noise_level(shift: float) -> None:
    t_S = with_scheduler(shift=shift).grid(10).astype(np.float32)
    assert step_factors(float(t_S[0]), float(np.diff(t_S)[0]), 0.7)[2] == pytest.approx(0.7, abs=1e-12)


def test_one_step_goes_from_1_to_0() -> None:
    assert with_scheduler(shift=1.18).grid(1).tolist() == [1.0, 0.0]


def test_a_grid_that_begins_elsewhere_is_refused() -> None:
    with pytest.raises(ModelError, match="first time of the model's scheduler is t = 0"):
        tiny_flow.model(0, invert_sigmas=True).grid(4)


# --- sizes


class Eightfold:
    factor = 8

    def __call__(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW


@pytest.mark.parametrize(
    ("decode", "fits", "side", "crooked", "unit", "large"),
    [(None, 8, 8, 7, 2, 10), (Eightfold(), 64, 8, 8, 16, 80)],
)
def test_sizes(decode: Any, fits: int, side: int, crooked: int, unit: int, large: int) -> None:
    # patches of 2, and places for 4 a side
    model = replace(MODEL, decode=decode)
    assert model.shape() == (1, 4, 4)
    assert model.shape(fits) == (1, side, side)
    with pytest.raises(ModelError, match=rf"sampler\.pixels = {crooked}: .* multiple of {unit}\.$"):
        model.shape(crooked)
    with pytest.raises(
        ModelError,
        match=rf"sampler\.pixels = {large}: .* position embeddings for 4 patches .* at most {fits}\.$",
    ):
        model.shape(large)


def test_the_largest_size_is_the_transformers_own() -> None:
    def velocity(side: int) -> torch.Tensor:
        return MODEL.velocity(torch.zeros(1, side**2), torch.ones(1), [""])

    assert velocity(MODEL.shape(8)[1]).shape == (1, 64)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        velocity(10)


# --- text encoders


class Pipeline:
    """Encodes a text as its length, and knows whom it is asked by."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.inside = self.most = 0

    def encode_prompt(self, *, prompt: str, **_: Any) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.asked.append(prompt)
        # another thread may come in
        time.sleep(0.001)
        self.inside -= 1
        return torch.full((1, 2, 3), float(len(prompt))), None, torch.full((1, 4), float(len(prompt))), None


def lengths(texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def test_each_prompt_is_encoded_once_in_any_order_of_asking() -> None:
    pipeline = Pipeline()
    encode = TextEncoders(pipeline, "cpu")
    for texts in (["a", "bb", "a"], ["bb", "", "a"]):
        tokens_BLJ, pooled_BP = encode(texts)
        assert (tokens_BLJ[:, 0, 0].tolist(), pooled_BP[:, 0].tolist()) == (lengths(texts), lengths(texts))
    assert sorted(pipeline.asked) == ["", "a", "bb"]


def test_a_call_may_have_more_prompts_than_are_kept() -> None:
    pipeline = Pipeline()
    encode, texts = TextEncoders(pipeline, "cpu", kept=2), ["", "a", "bb", "ccc", "a"]
    for _ in range(2):
        assert encode(texts)[0][:, 0, 0].tolist() == lengths(texts)
    encode(["a", "ccc"])
    before = len(pipeline.asked)
    encode(["ccc", "a"])
    assert len(pipeline.asked) == before


def test_threads_are_answered_one_at_a_time() -> None:
    pipeline = Pipeline()
    encode, texts = (
        TextEncoders(pipeline, "cpu", kept=3),
        [letter * n for n, letter in enumerate("abcdefgh", 1)],
    )
    wrong: list[Any] = []

    def ask(offset: int) -> None:
        for start in range(20):
            mine = [texts[(offset + start + i) % len(texts)] for i in range(3)]
            try:
                if encode(mine)[0][:, 0, 0].tolist() != lengths(mine):
                    wrong.append(mine)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=ask, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (wrong, pipeline.most) == ([], 1)


def test_a_decoder_without_a_shift_only_scales() -> None:
    from reflux.models.flow.encoders import LatentDecoder

    config = SimpleNamespace(block_out_channels=(4, 4, 4), scaling_factor=0.5, shift_factor=None)
    vae: Any = SimpleNamespace(
        config=config, dtype=torch.float32, requires_grad_=lambda _: vae, decode=lambda x, return_dict: (x,)
    )
    decode = LatentDecoder(vae)
    assert (decode.factor, decode(torch.ones(1, 1, 1, 1)).item()) == (4, 2.0)


def test_a_model_that_was_loaded_and_saved_again_names_no_folder(tmp_path: Path) -> None:
    first = tiny_flow.save(tmp_path / "first", 1)
    second = tmp_path / "second"
    second.mkdir()
    load_flow(first, "model").save(second)
    assert str(tmp_path) not in "".join(path.read_text() for path in second.rglob("*.json"))
