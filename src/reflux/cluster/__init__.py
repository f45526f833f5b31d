"""Clusters: the parts that place samplers, teachers and the learner's ranks in other processes."""

CLUSTERS = {"ray": "reflux.cluster.ray:Ray"}
