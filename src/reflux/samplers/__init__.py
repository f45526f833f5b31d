"""The student acts."""

SAMPLERS = {"hf": "reflux.samplers.hf:HF", "stored": "reflux.samplers.stored:Stored"}
