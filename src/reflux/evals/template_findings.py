"""Findings on chat templates, with the opened models. All of them are warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from reflux.config.context import StudentSpec
from reflux.errors import ModelError
from reflux.evals.finding import Finding
from reflux.models.chat.ends import template_ends
from reflux.models.chat.renderer import Renderer
from reflux.models.chat.template_checks import first_difference, prints_clock, unread_arguments
from reflux.types import Prompt

# A lower probability of the end token after a whole answer is almost none.
_ALMOST_NONE = 1e-4
_SHORT = "Yes."
# The most tokens of an answer that is read. The logits of a long one may need more memory than a step.
_LONGEST = 256


def on_templates(
    learner: Any, student: StudentSpec, teachers: Mapping[str, Renderer], prompt: Prompt
) -> Iterator[Finding]:
    """Warnings about the student's template, and about teachers that render messages in another way.
    teachers: the renderers of the teachers that are not the student, by table.
    """
    renderer = learner.model.renderer(student.system, student.template, student.prompt_suffix)
    messages = prompt.messages
    if prints_clock(renderer, messages):
        text = "the chat template writes the time into the prompt, so a run that is resumed reads another one"
        yield Finding("warning", "template", text)
    if unread := unread_arguments(renderer):
        text = f"the chat template does not read {', '.join(unread)} of learner.template"
        yield Finding("warning", "template", text)
    for table, other in teachers.items():
        if different := first_difference(renderer, other, messages):
            text = f"teacher '{table}' renders the same messages in another way: {different}"
            yield Finding("warning", "template", f"{text}. It reads the student's tokens all the same")
    yield from _end(learner, renderer, prompt)


def _end(learner: Any, renderer: Renderer, prompt: Prompt) -> Iterator[Finding]:
    """A warning if the student gives the template's end token almost no probability after whole answers, as a
    base model does with a template that it was not trained on.
    """
    from reflux.learners.own_pass import own_logp

    ends = template_ends(learner.model.tokenizer, renderer.template.arguments)
    answers = [text for text in (*prompt.references[:1], prompt.answer, _SHORT) if text]
    found = []
    for answer in answers if ends else ():
        try:
            ids = renderer.answer_ids(prompt.messages, answer, learner.model.end_ids)
        except ModelError:
            # An answer that the template cannot show says nothing about its end.
            continue
        before, closed = np.asarray(renderer.ids(prompt.messages)), np.asarray([*ids[:-1], ends[0]])
        if len(closed) > _LONGEST or len(before) + len(closed) > learner.model.context_tokens:
            continue
        found.append(float(np.exp(learner.everywhere(own_logp, before, closed)[-1])))
    if found and max(found) < _ALMOST_NONE:
        token = learner.model.tokenizer.convert_ids_to_tokens(ends[0])
        text = (
            f"after a whole answer the student gives the template's end token {token!r} a probability of at "
            f"most {max(found):.1g}. Its answers may never end: was it trained with this template?"
        )
        yield Finding("warning", "template", text)
