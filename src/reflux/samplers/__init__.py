"""The student acts."""

SAMPLERS = {
    "hf": "reflux.samplers.hf:HF",
    "references": "reflux.samplers.references:References",
    "flow": "reflux.samplers.flow:Flow",
    "teacher_samples": "reflux.samplers.teacher_samples:TeacherSamples",
}
