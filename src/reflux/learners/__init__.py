"""Learners: the parts that train the student."""

LEARNERS = {
    "flow": "reflux.learners.flow:Flow",
    "fsdp": "reflux.learners.fsdp:FSDP",
    "hf": "reflux.learners.hf:HF",
}
