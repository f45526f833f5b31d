"""The student acts."""

SAMPLERS = {
    "hf": "reflux.samplers.hf:HF",
    "stored": "reflux.samplers.references:Stored",
    "flow": "reflux.samplers.flow:Flow",
    "drawn": "reflux.samplers.teacher_samples:Drawn",
}
