"""The student moves."""

LEARNERS = {"hf": "reflux.learners.hf:HF"}
