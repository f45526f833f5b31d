"""The student moves."""

LEARNERS = {"flow": "reflux.learners.flow:Flow", "hf": "reflux.learners.hf:HF"}
