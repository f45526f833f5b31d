"""Keys, kinds and values of recipes that were renamed. An old name is an error that names the new one."""

from __future__ import annotations

KEYS = {
    "accelerator": "extrapolation",
    "as": "alias",
    "factor": "weight",
    "length": "max_denoising_steps",
    "max_lag": "max_staleness",
    "noise_floor": "min_grad_norm",
    "normalise": "loss_aggregation",
    "times": "positions",
}
KINDS = {
    ("credit", "outcome"): "group_advantage",
    ("objectives", "outcome"): "policy_gradient",
    ("samplers", "drawn"): "teacher_samples",
    ("samplers", "stored"): "references",
    ("teachers", "own"): "self",
}
VALUES = {
    ("loss_aggregation", "kept"): "token-mean-weighted",
    ("loss_aggregation", "chosen"): "token-mean",
    ("loss_aggregation", "rollout_means"): "seq-mean-token-mean",
    ("teacher", "said"): "behaviour",
    ("candidates", "said"): "behaviour",
    ("makes", "picture"): "image",
}


def new_key(key: str, known: list[str]) -> str:
    """The hint for an unknown key; "" if it is not an old name of one of the `known` keys of its table."""
    return f"; it is called '{KEYS[key]}' now." if KEYS.get(key) in known else ""


def new_kind(group: str, kind: str) -> str:
    """The hint for an unknown kind; "" if it is not an old name of a kind of this group."""
    return f"; it is called '{KINDS[group, kind]}' now." if (group, kind) in KINDS else ""


def new_value(key: str, value: object) -> str | None:
    """The new name of an old value of a key; None for any other value."""
    return VALUES.get((key, value)) if isinstance(value, str) else None
