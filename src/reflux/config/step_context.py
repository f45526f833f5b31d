"""Values of one optimiser step: sampling parameters, and random numbers that depend on the step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from reflux.types import Message, Prompt

Purpose = Literal["train", "eval", "score", "preflight"]
# The prompt, the student's turns, and a number of completed optimiser steps, to the replies to each turn.
Replay = Callable[[Prompt, Sequence[Message], int], list[tuple[Message, ...]]]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an attempt is sampled. `cohort` is the number of groups that are requested together. Parts in this
    process wait until all these groups are requested and process them in one batch.
    """

    # the optimiser step that the attempt is sampled for, from 0
    step: int
    purpose: Purpose
    # the most positions of the attempt
    max_positions: int
    temperature: float = 1.0
    top_p: float = 1.0
    # texts that end a response
    stop: tuple[str, ...] = ()
    # number of groups that form one batched request
    cohort: int = 1
    # part of the random key: another value gives other random numbers for the same prompts and step
    rng: int = 0
    # number of completed optimiser steps when the attempt is asked for; environments get it
    completed: int = 0


@dataclass(frozen=True, slots=True)
class StepContext:
    """The number of a step (from 0) and the seed of the run, for parts that keep no state.

    step: the optimiser step that attempts are sampled for and trained in. version: the policy version of the
    learner at the time of the call, as `Rollout.version` counts it. completed: the number of completed
    optimiser steps, when an attempt is scored first that of the moment when it was asked for. An attempt that
    is scored when it is sampled and again when it is trained has the same step both times; the others may
    differ. replay: `Task.replay` of the run's task, for contexts; None elsewhere.
    """

    step: int
    seed: int
    version: int = 0
    completed: int = 0
    replay: Replay | None = None

    def rng(self, *key: object) -> random.Random:
        """A random generator that depends only on (run seed, step, key) (law 8)."""
        return random.Random(seed_of(self.seed, self.step, *key))


def seed_of(*key: object) -> int:
    """A 63-bit integer computed from the repr of `key`. It is the same on every machine and in
    every process.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
