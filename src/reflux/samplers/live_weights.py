"""The weights that a sampler holds. New weights are taken over between two tokens of a model call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from reflux.runtime.weights import Weights


class CallStopped(Exception):
    """A model call ends early, because nobody waits for its result any more."""


class LiveWeights:
    """The parameters of `model.net` and their policy version.

    A model call runs inside `call`, one at a time. The code of the call, which may run in another thread,
    calls `renew` where it can go on with other weights. `publish` returns when the weights are replaced: at
    the next `renew`, or at the end of a call that does not call it.
    """

    def __init__(self, model: Any):
        self.model, self.version = model, 0
        self._turn = asyncio.Lock()
        # guards the fields below, which two threads use
        self._guard = threading.Lock()
        self._calling = self._stopping = False
        self._offered: tuple[Weights, Future[None]] | None = None

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Only one model call is inside this block. It has ended when the block is left."""
        async with self._turn:
            with self._guard:
                self._calling, self._stopping = True, False
            try:
                yield
            finally:
                with self._guard:
                    self._calling = False
                self._take_over()

    def renew(self) -> int:
        """Replace the weights if new ones are published, and return the policy version. Raises CallStopped
        if the call was stopped.
        """
        if self._stopping:
            raise CallStopped
        self._take_over()
        return self.version

    def stop(self) -> None:
        """End the call in progress at its next `renew`."""
        self._stopping = True

    async def publish(self, weights: Weights) -> None:
        """Replace the weights. They must not change before this returns."""
        with self._guard:
            done: Future[None] | None = Future() if self._calling else None
            self._offered = None if done is None else (weights, done)
        if done is None:
            self._replace(weights)
        else:
            await asyncio.wrap_future(done)

    def _take_over(self) -> None:
        with self._guard:
            offered, self._offered = self._offered, None
        if offered is None:
            return
        weights, done = offered
        if not done.set_running_or_notify_cancel():
            # Nobody waits for it any more, as when the run ends.
            return
        try:
            self._replace(weights)
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    @torch.no_grad()
    def _replace(self, weights: Weights) -> None:
        own = self.model.net.state_dict()
        for name, value in weights.tensors():
            own[name].copy_(value)
        self.version = weights.version
