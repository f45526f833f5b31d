"""The fused pass and the plain pass give the same loss, records and gradients, for any objectives at once.

Each seed draws objectives, teachers, heads and sizes. The plain pass computes in float64. A wider search:
REFLUX_SEEDS=500 pytest tests/methods/test_fused_and_plain.py
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from device import DEVICE
from interpreted import interpreted
from reflux.kernels import fused_pass, row_pass
from reflux.kernels.head import Head
from reflux.loss import token_loss
from reflux.loss.aggregate import shift_taker
from reflux.loss.targets import HiddenTarget, SampledTarget, TopKTarget
from reflux.objectives.divergence import MIXED, Divergence
from reflux.objectives.nll import NLL
from reflux.objectives.policy_gradient import PolicyGradient
from reflux.objectives.sampled_kl import GROUP_BASELINES, SampledKL

if find_spec("triton") is None:
    pytest.skip("Triton is not installed: pip install triton", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
SEEDS = range(int(os.environ.get("REFLUX_SEEDS", "6")))
KINDS = ("reverse", "forward", "jsd", "skew_reverse", "skew_forward", "alpha", "tv")
BASELINES = ("none", "kl", "topk_kl", "minimum_variance", *GROUP_BASELINES)
# the largest error as a share of the largest number
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 4e-2}


def divergence(r: random.Random) -> Divergence:
    kind, support = r.choice(KINDS), r.choice(["full", "full", "student", "teacher", "union"])
    return Divergence(
        r.choice(["main", "anchor", *(["behaviour"] if support == "teacher" else [])]),
        r.choice([1.0, -0.7]),
        kind,  # pyright: ignore[reportArgumentType]
        r.choice([None, 0.0, 0.2, 0.7]) if kind in MIXED else None,
        support,  # pyright: ignore[reportArgumentType]
        r.choice([2, 5, 40, 200]),
        "bucket" if support == "full" else r.choice(["bucket", "renormalised"]),
        ratio=r.choice(["none", "truncated"]),
        ratio_cap=r.choice([1.0, 5.0]),
    )


def sampled(r: random.Random) -> SampledKL:
    baseline: Any = r.choice(BASELINES)
    anyone = ["sampled", "behaviour"] if baseline in ("none", *GROUP_BASELINES) else []
    ratio: Any = r.choice(["truncated", "clip", "none"])
    return SampledKL(
        r.choice(["main", "anchor", *anyone]),
        r.choice([1.0, 0.3]),
        baseline,
        r.choice([1, 3, 500]),
        ratio,
        max_gap_nats=r.choice([None, 1.0]),
    )


DRAWN = (
    divergence,
    divergence,
    sampled,
    lambda r: NLL(),
    lambda r: PolicyGradient(ratio=r.choice(["clip", "none"])),
)


class Adapted(nn.Module):
    """A head with an adapter, whose base is frozen."""

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor):
        super().__init__()
        self.weight, self.A, self.B = weight, nn.Parameter(A), nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + x @ self.A.T @ self.B.T


class Rows(token_loss.TokenMicroBatch):
    """A micro-batch of given rows, without texts."""

    def __init__(self, objectives: list[Any], teachers: dict[str, Any], heads: Any, **columns: Any):
        self.objectives, self.teachers, self.heads = objectives, teachers, heads
        self.taker, self.items = shift_taker(objectives), []
        self.__dict__.update(columns)


@dataclass
class Case:
    seed: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        r, rng = random.Random(self.seed), torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            # numbers that both precisions have
            return torch.randn(*shape, generator=rng).to(self.dtype).double().to(DEVICE)

        n, v, pad = r.choice([1, 3, 5]), r.choice([3, 33, 40, 64]), r.choice([0, 5])
        k = r.randint(2, min(v, 12))
        self.vocabulary, self.scale, self.cap = v, r.choice([1.0, 0.4]), r.choice([None, 4.0])
        self.objectives = [r.choice(DRAWN)(r) for _ in range(r.choice([1, 2, 3]))]
        self.frozen, self.variance = r.random() < 0.2, r.random() < 0.3
        self.variance &= all(not o.samples or o.teacher in ("main", "anchor") for o in self.objectives)
        self.rows = r.choice([(128, 128), (4, 2), (2, 2)])
        self.h_NH, self.weight, self.bias = draw(n, 6), draw(v + pad, 6), draw(v + pad)
        self.biased, self.adapter = (
            r.random() < 0.3,
            (draw(2, 6), draw(v + pad, 2)) if r.random() < 0.3 else None,
        )
        self.others = draw(n, 4), draw(v, 4), draw(v), draw(n, 6), draw(v, 6)
        if r.random() < 0.2:
            # a token that the teacher excludes
            self.others[2][v // 2] = -math.inf
        logp_NV = draw(n, v).log_softmax(-1)
        ids_NK = torch.rand(n, v, generator=rng).argsort(-1)[:, :k].to(DEVICE)
        self.tokens_N = torch.randint(v, (n,), generator=rng).to(DEVICE)
        self.listed = ids_NK, logp_NV.gather(-1, ids_NK), logp_NV.gather(-1, self.tokens_N[:, None])[:, 0]
        self.coef_KN = [draw(n) * (draw(n) > -0.8) * o.coef for o in self.objectives]
        self.columns = -draw(n).abs() - 0.5, draw(n), draw(n)

    def heads(self, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Head]]:
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if self.adapter:
            module: Any = Adapted(weight, *(matrix.to(dtype) for matrix in self.adapter))
        else:
            module = nn.Linear(6, len(weight), bias=self.biased, device=DEVICE, dtype=dtype)
            module.load_state_dict({"weight": weight} | ({"bias": bias} if self.biased else {}))
            module.requires_grad_(not self.frozen)
        cap = None if self.others[2].isinf().any() else self.cap
        _, main, bias, _, anchor = (part.to(dtype) for part in self.others)
        own = Head(lambda: module, self.vocabulary, self.scale, self.cap)
        return module, {"own": own, "m": Head.of(main, bias, 0.7, cap), "a": Head.of(anchor)}

    def run(
        self, dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
    ) -> dict[str, Tensor | None]:
        wide = torch.promote_types(dtype, torch.float32)
        module, heads = self.heads(dtype)
        h_NH = self.h_NH.to(dtype, copy=True).requires_grad_()
        ids_NK, logp_NK, logp_N = self.listed
        behaviour_N, offset_N, value_N = (column.to(wide) for column in self.columns)
        teachers = {
            "anchor": (
                HiddenTarget(teacher="anchor", h_TH=h_NH, head="a"),
                {"h_NH": self.others[3].to(dtype)},
            ),
            "behaviour": (
                TopKTarget(teacher="behaviour", ids_TK=None, logp_TK=None, logp_T=None),  # type: ignore[arg-type]  # pyright: ignore
                {"ids_NK": ids_NK, "logp_NK": logp_NK.to(wide), "logp_N": logp_N.to(wide)},
            ),
            "main": (HiddenTarget(teacher="main", h_TH=h_NH, head="m"), {"h_NH": self.others[0].to(dtype)}),
            "sampled": (SampledTarget(teacher="sampled", logp_T=None), {"logp_N": behaviour_N - 0.3}),  # type: ignore[arg-type]  # pyright: ignore
        }
        batch = Rows(
            self.objectives,
            teachers,
            heads,
            coef_KN=[coef_N.to(wide) for coef_N in self.coef_KN],
            value_KN=[value_N] * len(self.objectives),
            behaviour_logp_N=behaviour_N,
            advantage_offset_N=offset_N,
            tokens_N=self.tokens_N,
        )
        chunk, block = self.rows
        monkeypatch.setattr(row_pass, "can_fuse", lambda h: fused)
        monkeypatch.setattr(fused_pass, "fused_rows", lambda *_: self.rows)
        monkeypatch.setattr(row_pass, "chunk_rows", lambda *_: chunk)
        monkeypatch.setattr(row_pass, "block_rows", lambda *_: block)
        result = token_loss.backward(batch, h_NH, heads["own"], self.variance)
        found = {"loss": result.loss, "kl": result.kl_N, "hidden": h_NH.grad}
        found |= {f"logp {name}": logp_N for name, logp_N in result.logp.items()}
        found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
        found |= {f"outside {k}": outside_N for k, outside_N in enumerate(result.outside)}
        return found | dict(zip(("variance", "without"), result.variance or (), strict=False))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_both_passes_agree(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(seed, dtype)
    with interpreted(64):
        plain, fused = case.run(torch.float64, False, monkeypatch), case.run(dtype, True, monkeypatch)
    assert plain.keys() == fused.keys()
    for name, wanted in plain.items():
        made = fused[name]
        assert (made is None) == (wanted is None), name
        if made is None or wanted is None:
            continue
        if name.startswith("outside"):
            assert torch.equal(made, wanted), (name, case.objectives)
            continue
        finite = wanted.isfinite()
        if name.startswith(("loss", "kl", "logp")):
            assert torch.equal(made[~finite].double(), wanted[~finite]) or wanted.isnan().any(), name
        size = 1e-2 + float(wanted[finite].abs().amax() if finite.any() else 0.0)
        gap = (made.double() - wanted)[finite].abs()
        assert not finite.any() or float(gap.amax()) <= BOUNDS[dtype] * size, (name, case.objectives)
