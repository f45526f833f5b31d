"""The student acts."""

SAMPLERS = {
    "hf": "reflux.samplers.hf:HF",
    "stored": "reflux.samplers.stored:Stored",
    "flow": "reflux.samplers.flow:Flow",
    "drawn": "reflux.samplers.drawn:Drawn",
}
