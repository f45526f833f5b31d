"""Learners: the parts that train the student."""

LEARNERS = {"flow": "reflux.learners.flow:Flow", "hf": "reflux.learners.hf:HF"}
