"""Tasks: they give prompts and judge answers. The protocol is in `base.py`."""

TASKS = {
    "word_problems": "reflux.tasks.word_problems:WordProblems",
    "chains": "reflux.tasks.chains:Chains",
    "shopping": "reflux.tasks.shopping:Shopping",
    "calculator": "reflux.tasks.calculator:Calculator",
    "ledger": "reflux.tasks.ledger:Ledger",
    "gsm8k": "reflux.tasks.gsm8k:Gsm8k",
    "jsonl": "reflux.tasks.jsonl:Jsonl",
    "answered": "reflux.tasks.answered:Answered",
    "mix": "reflux.tasks.mix:Mix",
    "verifiers": "reflux.tasks.verifiers:Verifiers",
    "glyphs": "reflux.tasks.glyphs:Glyphs",
}
