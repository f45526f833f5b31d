"""Findings on the tokenizers of student and teachers, before models are loaded."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config.recipe import RunConfig
from reflux.evals.finding import Finding
from reflux.models.chat.token_map import check_same_tokens
from reflux.models.generation_file import end_ids_of
from reflux.models.text import load_tokenizer


def before(cfg: RunConfig) -> Iterator[Finding]:
    """Findings before models are loaded, on tokenizers and end tokens."""
    own = cfg.learner.student
    student = load_tokenizer(own.model, "learner.model", own.trust_remote_code, own.base_model)
    ends = list(end_ids_of(own, "learner.model", student))
    yield Finding("ok", "end of text", f"ids {ends} end an answer ({student.convert_ids_to_tokens(ends)})")
    if student.chat_template is None:
        yield Finding(
            "warning",
            "chat template",
            "the student's tokenizer has none: messages are joined by newlines, as for a base model",
        )
    for name, teacher in cfg.teachers.items():
        reader = None if teacher.is_student else teacher.reader(cfg.learner.student)
        if reader is None:
            # the teacher is the student, or its tokenizer is not in this process
            continue
        tokenizer = load_tokenizer(
            reader.model, f"teachers.{name}.model", reader.trust_remote_code, reader.base_model
        )
        check_same_tokens(student, tokenizer, name)
        yield Finding(
            "ok",
            "tokenizers",
            f"teacher '{name}' and the student share a vocabulary of {len(tokenizer)} tokens",
        )
        ours = set(ends)
        theirs = set(end_ids_of(reader, f"teachers.{name}.model", tokenizer))
        if ours != theirs:
            text = f"teacher '{name}' ends answers with ids {sorted(theirs)}, the student with {sorted(ours)}"
            yield Finding("warning", "end of text", text)
