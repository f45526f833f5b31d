"""Objectives: each gives a cost per position. The protocol is in `base.py`."""

OBJECTIVES = {
    "sampled_kl": "reflux.objectives.sampled_kl:SampledKL",
    "divergence": "reflux.objectives.divergence:Divergence",
    "nll": "reflux.objectives.nll:NLL",
    "policy_gradient": "reflux.objectives.policy_gradient:PolicyGradient",
    "velocity_kl": "reflux.objectives.velocity_kl:VelocityKL",
}
