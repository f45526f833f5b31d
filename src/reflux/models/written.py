"""The tokens of a batch so far, on the host: which rows have ended, and the turns at the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reflux.models.stop_texts import StopTexts
from reflux.models.text import Model
from reflux.models.turns import Turn, TurnRequest


class Written:
    """Every unfinished row has one token per step, so unfinished rows differ only in their budgets."""

    def __init__(self, model: Model, asks: Sequence[TurnRequest]):
        stop = asks[0].draw.stop
        self.stop = StopTexts(model.tokenizer, stop) if stop else None
        self.budgets, self.ends = np.asarray([ask.max_tokens for ask in asks]), np.asarray(model.end_ids)
        self.ended = np.zeros(len(asks), dtype=bool)
        self.over = np.zeros(len(asks), dtype=bool)
        # the tokens of each row; filled only if there are stop texts
        self.tokens: list[list[int]] = [[] for _ in asks]
        # characters of each row after the end of its stop text
        self.beyond = [0] * len(asks)
        # per step: the requests of the unfinished rows, what was picked for them, and the policy version
        self.steps: list[tuple[np.ndarray, list[np.ndarray]]] = []

    def add(self, owners: np.ndarray, picked: Sequence[np.ndarray], version: int) -> list[int]:
        """Add the tokens of C steps. What a row drew after its end is left out. Returns the unfinished rows.

        owners: the request that each row of the batch belongs to. picked: columns [C, B, ...] as `pick` gives
        them. version: the policy version that drew them.
        """
        for step in zip(*picked, strict=True):
            self._add_step(owners, step, version)
        return np.flatnonzero(~self.over[owners]).tolist()

    def _add_step(self, owners: np.ndarray, picked: Sequence[np.ndarray], version: int) -> None:
        rows = np.flatnonzero(~self.over[owners])
        going, tokens = owners[rows], picked[0][rows]
        self.steps.append((going, [*(column[rows] for column in picked), np.full(len(rows), version)]))
        self.ended[going] = (tokens[:, None] == self.ends).any(1)
        if self.stop:
            self._stop(self.stop, going, tokens)
        self.over[going] = self.ended[going] | (self.budgets[going] <= len(self.steps))

    def _stop(self, stop: StopTexts, going: np.ndarray, tokens: np.ndarray) -> None:
        """End the rows in which a stop text has ended."""
        for owner, token in zip(going.tolist(), tokens.tolist(), strict=True):
            self.tokens[owner].append(token)
            beyond = None if self.ended[owner] else stop.beyond(self.tokens[owner])
            if beyond is not None:
                self.ended[owner], self.beyond[owner] = True, beyond

    def turns(self) -> list[Turn]:
        """The turns in the order of the requests."""
        columns = self._columns()
        behaviour = (
            list(zip(columns[3], columns[4], strict=True)) if len(columns) > 4 else [None] * len(self.over)
        )
        fields = zip(*columns[:3], behaviour, columns[-1], self.ended.tolist(), self.beyond, strict=True)
        return [
            Turn(ids.tolist(), logp_T, raw_T, behaviour_TK, version_T, "stop" if ended else "length", beyond)
            for ids, logp_T, raw_T, behaviour_TK, version_T, ended, beyond in fields
        ]

    @property
    def tokens_so_far(self) -> list[list[int]]:
        """The tokens of each request."""
        return [ids.tolist() for ids in self._columns()[0]]

    def _columns(self) -> list[list[np.ndarray]]:
        """The columns of `steps`, each cut into one array per request."""
        owners = np.concatenate([owners for owners, _ in self.steps])
        order = np.argsort(owners, kind="stable")
        cuts = np.cumsum(np.bincount(owners, minlength=len(self.over)))[:-1]
        return [
            np.split(np.concatenate(column)[order], cuts)
            for column in zip(*(picked for _, picked in self.steps), strict=True)
        ]
