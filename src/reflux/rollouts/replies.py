"""The replies of an environment inside a finished attempt: where their tokens are, and which messages they
show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reflux.types import Message, TokenRollout


@dataclass(frozen=True, slots=True)
class ReplyPositions:
    """The positions [start, end) of an attempt, which the student did not choose. They hold `messages`, and
    the tokens with which the chat template begins the student's next turn. turn: the student's turn that was
    replied to.
    """

    start: int
    end: int
    turn: Message
    messages: tuple[Message, ...]


def replies_of(rollout: TokenRollout) -> list[ReplyPositions]:
    """The replies of an attempt, in order; [] for an attempt of one turn.

    The assistant messages after the prompt are taken for the student's turns. ValueError where their number
    differs from that of the turns, as where an environment replies in the role of the assistant.
    """
    edges_N = np.flatnonzero(np.diff(rollout.mask_T.astype(np.int8), prepend=0, append=0))
    starts = edges_N[1:-1].reshape(-1, 2).tolist()
    made = rollout.messages[len(rollout.prompt.messages) :]
    turns = [place for place, message in enumerate(made) if message["role"] == "assistant"]
    if len(turns) != len(starts) + bool(len(edges_N)):
        raise ValueError(
            f"prompt {rollout.prompt.id}: the attempt has {len(starts) + 1} turns of the student and "
            f"{len(turns)} assistant messages. A task whose replies are replayed must not reply in the role "
            "of the assistant."
        )
    return [
        ReplyPositions(start, end, made[turn], made[turn + 1 : after])
        for (start, end), turn, after in zip(starts, turns, turns[1:], strict=False)
    ]
