"""Compares the log-probs of sampled tokens from three computations: the sampler's records, the learner's
padded batch, and the model's own forward pass of one text without a cache and without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reflux.evals.finding import Finding
from reflux.evals.gaps import Gaps
from reflux.models.placement import autocasts
from reflux.types import Group, TokenRollout

if TYPE_CHECKING:
    from reflux.learners.base import OpenLearner

NARROW = ("bfloat16", "float16")


def is_narrow(learner: Any, dtype: str) -> bool:
    """True if the sampler or the learner computes in 16 bits. dtype: of the sampler; "auto": as stored, on a
    CPU where it multiplies that natively.
    """
    from reflux.models.cpu.precision import multiplies_natively

    stored, on_cpu = learner.model.stored_dtype, learner.model.device.type == "cpu"
    wide = stored is None or (on_cpu and not multiplies_natively(stored))
    own = "float32" if wide else str(stored).removeprefix("torch.")
    return _autocasts(learner) or (own if dtype == "auto" else dtype) in NARROW


def _autocasts(learner: Any) -> bool:
    return autocasts(learner.cfg.autocast, learner.model.device)


def sampled_texts(groups: Sequence[Group]) -> list[TokenRollout]:
    """The rollouts of all attempts that have a token, in order."""
    rollouts = (attempt.rollout for group in groups for attempt in group)
    return [rollout for rollout in rollouts if isinstance(rollout, TokenRollout) and rollout.length]


def parity(learner: OpenLearner, groups: Sequence[Group], dtype: str) -> Finding:
    """The finding on the sampled tokens of all attempts. dtype: of the sampler."""
    from reflux.learners.observe import logp
    from reflux.learners.own_pass import own_logps

    rollouts = sampled_texts(groups)
    learnt = learner.everywhere(logp, groups)
    own = learner.everywhere(own_logps, rollouts)
    sampled = [rollout.policy_logp_T for rollout in rollouts]
    masks = [rollout.mask_T for rollout in rollouts]
    pairs = [
        Gaps("sampler and learner", _gaps(sampled, learnt, masks), is_narrow(learner, dtype)),
        Gaps(
            "the learner's batch and the model's own pass of one text",
            _gaps(learnt, own, masks),
            _autocasts(learner),
        ),
    ]
    worst = max(pairs, key=lambda pair: pair.excess)
    if worst.verdict == "ok":
        return Finding("ok", "parity", "; ".join(map(str, pairs)))
    cause = (
        "The size is that of rounding in 16 bits; a float32 sampler would remove it."
        if worst.verdict == "warning"
        else "If only the first position differs, the usual cause is another chat template. If single texts "
        "and batches differ, the architecture reads its neighbours or its padding, and this library does not "
        "support it."
    )
    if worst.verdict == "failed" and worst.narrow:
        cause += " Try sampler.dtype = 'float32': what it removes is rounding."
    return Finding(worst.verdict, "parity", f"{worst}. {cause}")


def _gaps(
    ones: Sequence[np.ndarray], others: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> list[np.ndarray]:
    return [np.abs(one - other)[mask] for one, other, mask in zip(ones, others, masks, strict=True)]
