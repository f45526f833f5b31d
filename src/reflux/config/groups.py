"""The groups of parts, such as samplers and teachers. Each group has a registry of kinds, a base class for
its parts, and a protocol.
"""

from __future__ import annotations

GROUPS = {
    "samplers": "reflux.samplers:SAMPLERS",
    "teachers": "reflux.teachers:TEACHERS",
    "contexts": "reflux.contexts:CONTEXTS",
    "objectives": "reflux.objectives:OBJECTIVES",
    "credit": "reflux.credit:CREDIT",
    "rewards": "reflux.rewards:REWARDS",
    "learners": "reflux.learners:LEARNERS",
    "extrapolation": "reflux.extrapolation:EXTRAPOLATIONS",
    "tasks": "reflux.tasks:TASKS",
    "evals": "reflux.evals:EVALS",
    "cluster": "reflux.cluster:CLUSTERS",
    "endpoints": "reflux.engines.endpoints:ENDPOINTS",
    "schedules": "reflux.config.schedules:SCHEDULES",
}


# the base class that every part of a group inherits
BASES = {
    "samplers": "reflux.samplers.base:SamplerPart",
    "teachers": "reflux.teachers.base:TeacherPart",
    "contexts": "reflux.contexts.base:ContextPart",
    "objectives": "reflux.objectives.base:ObjectivePart",
    "credit": "reflux.credit.base:CreditPart",
    "rewards": "reflux.rewards.base:RewardPart",
    "learners": "reflux.learners.base:LearnerPart",
    "extrapolation": "reflux.extrapolation.base:ExtrapolationPart",
    "tasks": "reflux.tasks.base:TaskPart",
    "evals": "reflux.evals.base:EvalPart",
    "cluster": "reflux.cluster.base:ClusterPart",
    "endpoints": "reflux.engines.endpoints.base:ChatEndpoint",
}


# the protocol whose members every part of a group has
PROTOCOLS = {
    "samplers": "reflux.samplers.base:Sampler",
    "teachers": "reflux.teachers.base:Teacher",
    "contexts": "reflux.contexts.base:Context",
    "objectives": "reflux.objectives.base:Objective",
    "credit": "reflux.credit.base:CreditRule",
    "rewards": "reflux.rewards.base:RewardFn",
    "learners": "reflux.learners.base:Learner",
    "extrapolation": "reflux.extrapolation.base:Extrapolation",
    "tasks": "reflux.tasks.base:Task",
    "evals": "reflux.evals.base:Eval",
    "cluster": "reflux.cluster.base:Cluster",
    "endpoints": "reflux.engines.endpoints.base:Endpoint",
}
