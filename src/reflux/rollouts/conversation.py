"""One text attempt in progress: the tokens read and written over all its turns, and the rollout built from
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from reflux.models.turns import Turn
from reflux.rollouts.environment import Environment
from reflux.types import Finish, Message, Prompt, TokenRollout, TopKTarget


@dataclass
class Conversation:
    """The state of one attempt. `replies[i]` are the token ids inserted after the student's turn i: the
    environment's message, and the chat template's tokens that begin the student's next turn.
    """

    prompt: Prompt
    sample: int
    prompt_ids: list[int]
    messages: list[Message]
    # Tokens that the student may still write.
    tokens_left: int
    environment: Environment | None = None
    turns: list[Turn] = field(default_factory=list)
    # The student's text, turn by turn.
    texts: list[str] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)
    # Sum of the environment's rewards; None if it gave none.
    reward: float | None = None
    # "length" until a turn ends by itself.
    finish: Finish = "length"

    @property
    def ids(self) -> list[int]:
        """All tokens so far, in order."""
        return self.prompt_ids + [i for turn, reply in self._pieces() for i in turn.tokens + reply]

    def add_turn(self, turn: Turn, text: str) -> None:
        self.turns.append(turn)
        self.texts.append(text)
        self.messages.append({"role": "assistant", "content": text})
        self.tokens_left -= len(turn.tokens)
        self.finish = turn.finish

    def add_reply(self, ids: list[int], messages: Sequence[Message], tokens_left: int) -> None:
        self.replies.append(ids)
        self.messages += messages
        self.tokens_left = tokens_left

    @property
    def read(self) -> int:
        """Number of positions that the model ran forward. Every turn reads all tokens before it again, and so
        does every change of the weights during a turn. The last token of a turn counts although the model
        does not read it.
        """
        before, read = len(self.prompt_ids), 0
        for turn, reply in self._pieces():
            changes = np.flatnonzero(np.diff(turn.version_T)) + 1
            read += before + len(turn.tokens) + before * len(changes) + int(changes.sum())
            before += len(turn.tokens) + len(reply)
        return read

    def turn_lengths(self) -> list[tuple[list[int], str, int]]:
        """(ids, text, number of reply ids that follow) of each turn."""
        return [
            (turn.tokens, text, len(reply))
            for (turn, reply), text in zip(self._pieces(), self.texts, strict=True)
        ]

    def rollout(self, version: int, spans_T2: np.ndarray | None) -> TokenRollout:
        """The finished attempt. version: the policy version of an attempt without a turn. spans_T2: the
        characters that each position wrote; None if they are not recorded.
        """
        pieces = self._pieces()
        version_T = self._versions()
        logp_T, raw_T = self._column(lambda turn: turn.logp_T), self._column(lambda turn: turn.raw_T)
        mask = [
            chosen for turn, reply in pieces for chosen in [True] * len(turn.tokens) + [False] * len(reply)
        ]
        return TokenRollout(
            prompt=self.prompt,
            sample=self.sample,
            version=int(version_T.min()) if self.turns else version,
            version_T=version_T if len(np.unique(version_T)) > 1 else None,
            finish=self.finish,
            mask_T=np.asarray(mask, dtype=bool),
            logp_T=logp_T,
            logp_raw_T=None if np.array_equal(raw_T, logp_T) else raw_T,
            sampled_positions=self.read,
            behaviour=_listed(pieces, raw_T) if pieces and pieces[0][0].behaviour_TK is not None else None,
            prompt_tokens=np.asarray(self.prompt_ids, dtype=np.int64),
            tokens_T=np.asarray([i for turn, reply in pieces for i in turn.tokens + reply], dtype=np.int64),
            text="\n".join(self.texts),
            messages=tuple(self.messages),
            spans_T2=spans_T2,
            environment_reward=self.reward,
        )

    def _pieces(self) -> list[tuple[Turn, list[int]]]:
        """Each turn with the ids that follow it. The last turn may have none yet."""
        return list(zip(self.turns, [*self.replies, []], strict=False))

    def _versions(self) -> np.ndarray:
        """The policy version of each position, int64. A reply has that of the turn before it."""
        parts = [
            part
            for turn, reply in self._pieces()
            for part in (turn.version_T, np.repeat(turn.version_T[-1:], len(reply)))
        ]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def _column(self, of: Callable[[Turn], np.ndarray]) -> np.ndarray:
        """One number per position, float32; 0 where the student did not choose."""
        parts = [part for turn, reply in self._pieces() for part in (of(turn), np.zeros(len(reply)))]
        return np.concatenate([np.zeros(0), *parts]).astype(np.float32)


def _listed(pieces: list[tuple[Turn, list[int]]], raw_T: np.ndarray) -> TopKTarget:
    """The student's own top-k at sampling time. Unchosen positions hold a uniform placeholder that no rule
    reads (mask_T is False).
    """
    ids, logp = [], []
    for turn, reply in pieces:
        assert turn.behaviour_TK is not None
        k = turn.behaviour_TK[0].shape[1]
        ids += [turn.behaviour_TK[0], np.tile(np.arange(k), (len(reply), 1))]
        logp += [turn.behaviour_TK[1], np.full((len(reply), k), -np.log(k))]
    return TopKTarget(
        teacher="behaviour",
        ids_TK=np.concatenate(ids),
        logp_TK=np.concatenate(logp).astype(np.float32),
        logp_T=raw_T,
    )
