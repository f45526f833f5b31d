"""The fused draw: the noise of `rng.gumbel`, the sample and both logsumexps, on random keys and tables."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from device import DEVICE
from interpreted import interpreted
from reflux.config.step_context import SamplingParams
from reflux.models import picking
from reflux.models.rng import gumbel

# nats, of the noise; and a gap of noisy logits that rounding may reverse
NOISE = 1e-5


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with interpreted(block=64):
        from reflux.kernels import triton_draw_kernel

        importlib.reload(triton_draw_kernel)
        yield


def table(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, keys over all 64 bits, and positions."""
    dice = torch.Generator().manual_seed(seed)
    keys_B = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=dice)
    position_B = torch.randint(0, 5000, (rows,), generator=dice)
    return 3 * torch.randn(rows, width, generator=dice).to(DEVICE), keys_B.to(DEVICE), position_B.to(DEVICE)


def drawn(logits_BV: Tensor, keys_B: Tensor, position_B: Tensor, temperature: float = 1.0) -> list[Tensor]:
    from reflux.kernels.triton_draw import draw_rows

    return [result.cpu() for result in draw_rows(logits_BV, keys_B, position_B, temperature)]


def test_the_noise_is_that_of_rng() -> None:
    """Row v has two finite logits: 0 at column v, and at column 0 what makes both equal by the noise of
    `rng`. Raised by the tolerance column 0 wins, and lowered by it column v does.
    """
    width = 70
    _, keys_B, position_B = table(1, width)
    noise_V = gumbel(keys_B, position_B, width)[0]
    keys_V, position_V = keys_B.expand(width).clone(), position_B.expand(width).clone()
    for shift, winner in ((NOISE, "other"), (-NOISE, "own")):
        logits_VV = torch.full((width, width), -torch.inf, device=noise_V.device)
        own = torch.arange(1, width, device=noise_V.device)
        logits_VV[own, own] = 0.0
        logits_VV[:, 0] = noise_V - noise_V[0] + shift
        tokens_V = drawn(logits_VV, keys_V, position_V)[0][1:]
        wanted = own.cpu() if winner == "own" else torch.zeros_like(tokens_V)
        assert (tokens_V == wanted).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_tokens_and_logsumexps(dtype: torch.dtype, temperature: float) -> None:
    logits_BV, keys_B, position_B = table(20, 150)
    logits_BV = logits_BV.to(dtype)
    tokens_B, lse_B, tempered_B = drawn(logits_BV, keys_B, position_B, temperature)
    exact_BV = logits_BV.double()
    noisy_BV = exact_BV / temperature + gumbel(keys_B, position_B, 150)
    best = noisy_BV.topk(2)
    clear_B = (best.values[:, 0] - best.values[:, 1] > NOISE).cpu()
    assert clear_B.sum() > 15
    assert (tokens_B == best.indices[:, 0].cpu())[clear_B].all()
    torch.testing.assert_close(lse_B.double(), exact_BV.logsumexp(-1).cpu(), rtol=0, atol=1e-5)
    wanted_B = (exact_BV / temperature).logsumexp(-1).cpu()
    torch.testing.assert_close(tempered_B.double(), wanted_B, rtol=0, atol=1e-5)


def test_equal_numbers_give_the_lowest_id_and_left_out_tokens_are_never_drawn() -> None:
    logits_BV, keys_B, position_B = table(8, 200)
    kept_BV = torch.rand(8, 200, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.05
    kept_BV[:, 7] = True
    tokens_B = drawn(logits_BV.masked_fill(~kept_BV, -torch.inf), keys_B, position_B)[0]
    assert kept_BV.cpu()[torch.arange(8), tokens_B].all()
    # where no token is left, as after a number that is none
    assert drawn(torch.full_like(logits_BV, -torch.inf), keys_B, position_B)[0].tolist() == [0] * 8
    assert drawn(torch.full_like(logits_BV, torch.nan), keys_B, position_B)[0].max() < 200


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"top_p": 0.5}, {"temperature": 0.0}])
def test_the_fused_pick_is_the_plain_one(how: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BV, keys_B, position_B = table(20, 150)
    draw = replace(SamplingParams(0, "train", 9), **how)  # pyright: ignore[reportArgumentType]
    asked = (logits_BV, keys_B, position_B, draw, 5)
    fused = picking.pick(*asked)
    monkeypatch.setattr(picking, "usable", lambda logits: False)
    plain = picking.pick(*asked)
    assert fused[0].dtype == plain[0].dtype
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[3], plain[3])
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
