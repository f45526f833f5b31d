"""Law 2, Zero at identity. With student = teacher a divergence costs 0, and a score function has no expected
gradient.
"""

import numpy as np
import pytest
import torch

from laws.estimators import Setting, World, settings_of
from reflux.loss.group_values import group_values
from reflux.objectives import OBJECTIVES

CASES = settings_of(OBJECTIVES)
IDS = [f"{kind}-{index}" for index, (kind, _) in enumerate(CASES)]


@pytest.mark.parametrize(("kind", "setting"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zero_at_identity(kind: str, setting: Setting | None, dtype: torch.dtype) -> None:
    assert setting, f"'{kind}' is registered but has no setting in tests/laws/estimators.py"
    if setting.home == "exempt":
        assert "xempt from law 2" in (type(setting.objective).__doc__ or ""), (
            f"'{kind}' must say in its docstring why it is exempt"
        )
        return
    world = World()
    rows = world.rows(world.student.to(dtype), world.student.detach().to(dtype), setting.outputs)
    rows.student.logits_NV = rows.student.logits_NV.to(dtype)
    rows.behaviour_logp_N, rows.advantage_offset_N = (
        rows.behaviour_logp_N.to(dtype),
        rows.advantage_offset_N.to(dtype),
    )
    if setting.group:
        # at identity every sibling's reward is 0
        rows.group_value_N = torch.full_like(
            rows.advantage_offset_N, group_values([np.zeros(2)] * setting.group, leave_one_out=True)[0]
        )
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    cost_N = setting.objective(rows)
    assert cost_N.detach().abs().max() < tolerance
    if setting.target == "tv" and setting.outputs == "listed" and setting.objective.tail == "bucket":
        # The cost has a kink here: the tail of a list is 1 - sum with a rounding error, and the sign of the
        # error decides the gradient.
        return
    # before averaging: no row has a gradient
    gradient_NV = torch.autograd.grad(cost_N.sum(), rows.student.logits_NV)[0]
    assert gradient_NV.abs().max() < tolerance


@pytest.mark.parametrize(("kind", "setting"), CASES, ids=IDS)
def test_divergence_costs_are_never_negative(kind: str, setting: Setting | None) -> None:
    assert setting, f"'{kind}' is registered but has no setting in tests/laws/estimators.py"
    if setting.home != "divergence":
        return
    for seed, spread in ((0, 0.001), (1, 1.0), (2, 20.0)):
        world = World(seed=seed, spread=spread)
        cost_N = setting.objective(world.rows(world.student, world.teacher, setting.outputs)).detach().numpy()
        assert np.isfinite(cost_N).all()
        assert cost_N.min() > -1e-12
        assert cost_N.max() > 0
