"""Objectives: a cost per position. See `base.py`."""

OBJECTIVES = {
    "sampled_kl": "reflux.objectives.sampled_kl:SampledKL",
    "divergence": "reflux.objectives.divergence:Divergence",
    "nll": "reflux.objectives.nll:NLL",
    "outcome": "reflux.objectives.outcome:Outcome",
    "velocity_kl": "reflux.objectives.velocity_kl:VelocityKL",
}
