"""Samplers: the parts that sample attempts with the student."""

SAMPLERS = {
    "hf": "reflux.samplers.hf:HF",
    "references": "reflux.samplers.references:References",
    "imported": "reflux.samplers.imported:Imported",
    "flow": "reflux.samplers.flow:Flow",
    "vllm": "reflux.samplers.vllm:VLLM",
    "teacher_samples": "reflux.samplers.teacher_samples:TeacherSamples",
}
