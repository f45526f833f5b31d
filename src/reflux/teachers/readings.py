"""The tokens that a text teacher reads along an attempt: the student's own tokens, after the messages and
between the replies that the teacher sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from reflux.errors import ModelError
from reflux.models.chat.ends import declared_special
from reflux.models.chat.naming import about_prompt
from reflux.models.chat.renderer import Renderer
from reflux.rollouts.replies import replies_of
from reflux.teachers.base import TeacherRequest
from reflux.types import Message, TokenRollout


@dataclass(frozen=True, slots=True)
class Reading:
    """ids_L: the tokens, without the last one of the attempt, because no prediction after it is needed.
    first: the index at which the response begins. places: which positions of the response, as the teacher
    reads it, are the T positions of the attempt; a slice of all where it reads the attempt itself.

    Position t is predicted by the state after ids_L[: first + places_T[t]]. A position of a replaced reply
    stands for one of the new reply, which is of no use: the student did not choose it.
    """

    ids_L: np.ndarray
    first: int
    places: np.ndarray | slice

    def spread(self, values_TK: np.ndarray) -> np.ndarray:
        """values_TK [T, K] at the positions of the response as the teacher reads it; 0, 1, ... K - 1 at
        positions that stand for none of the attempt.
        """
        if isinstance(self.places, slice):
            return values_TK
        positions = len(self.ids_L) - self.first + 1
        spread = np.tile(np.arange(values_TK.shape[1], dtype=values_TK.dtype), (positions, 1))
        spread[self.places] = values_TK
        return spread


def read_by(name: str, request: TeacherRequest, renderer: Renderer, context_tokens: int) -> Reading:
    """What the teacher reads. name: the teacher's, for errors. ModelError for more than `context_tokens`
    tokens.
    """
    rollout, view = request.rollout, request.view
    assert isinstance(rollout, TokenRollout)
    prompt, response, places = rollout.prompt_tokens, rollout.tokens_T, slice(None)
    with about_prompt(rollout.prompt.id):
        if view.messages != rollout.prompt.messages:
            prompt = np.asarray(renderer.ids(view.messages), dtype=np.int64)
        if view.spans:
            response, places = _replaced(request, renderer)
    sequence = np.concatenate([prompt, response[:-1]])
    if len(sequence) > context_tokens:
        raise ModelError(
            f"teachers.{name}: prompt {rollout.prompt.id} and its response take {len(sequence)} tokens, but "
            f"the model's context window holds {context_tokens}. Lower sampler.max_tokens or "
            "sampler.max_prompt_tokens, or shorten the teacher's context."
        )
    return Reading(sequence, len(prompt), places)


def _replaced(request: TeacherRequest, renderer: Renderer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the response with the replies of `spans` in place of those of the attempt, and for each
    position of the attempt the place of its token.
    """
    rollout = request.rollout
    assert isinstance(rollout, TokenRollout)
    pieces, places, begin, length = list[np.ndarray](), list[np.ndarray](), 0, 0
    for start, end, ids in _new_replies(request, renderer):
        kept = rollout.tokens_T[begin:start]
        places.append(length + np.arange(len(kept)))
        places.append(length + len(kept) + np.minimum(np.arange(end - start), len(ids) - 1))
        pieces += [kept, np.asarray(ids, dtype=np.int64)]
        begin, length = end, length + len(kept) + len(ids)
    rest = rollout.tokens_T[begin:]
    places.append(length + np.arange(len(rest)))
    return np.concatenate([*pieces, rest]), np.concatenate(places)


def _new_replies(request: TeacherRequest, renderer: Renderer) -> Iterator[tuple[int, int, list[int]]]:
    """(start, end, new token ids) of each reply that is replaced."""
    rollout, view = request.rollout, request.view
    assert isinstance(rollout, TokenRollout)
    special = declared_special(renderer.tokenizer)
    before: list[Message] = list(view.messages)
    for reply in replies_of(rollout):
        before.append(reply.turn)
        messages = view.spans.get(reply.start, reply.messages)
        if reply.start in view.spans:
            # A turn that a stop text ended has no end token, and the reply begins with that of the template.
            closed = int(rollout.tokens_T[reply.start - 1]) in special
            yield reply.start, reply.end, renderer.reply_ids(before, messages, closed)
        before += messages
