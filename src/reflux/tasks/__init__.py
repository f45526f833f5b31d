"""Where prompts come from, and how an answer is judged."""

TASKS = {
    "word_problems": "reflux.tasks.word_problems:WordProblems",
    "gsm8k": "reflux.tasks.gsm8k:Gsm8k",
    "jsonl": "reflux.tasks.jsonl:Jsonl",
    "mix": "reflux.tasks.mix:Mix",
    "glyphs": "reflux.tasks.glyphs:Glyphs",
}
