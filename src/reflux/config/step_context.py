"""The optimiser step as parts see it: how attempts are sampled for it, and random numbers that depend on it."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

Purpose = Literal["train", "eval", "score"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an attempt is to be sampled. `cohort` groups are asked for together: in-process parts wait for all
    of them.
    """

    # the optimiser step the attempt is meant for, from 0
    step: int
    purpose: Purpose
    # of the attempt
    max_positions: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    cohort: int = 1
    # another number: other random numbers for the same prompts at the same step
    rng: int = 0


@dataclass(frozen=True, slots=True)
class StepContext:
    """What pure parts may know of now: the optimiser step (from 0) and random numbers of their own."""

    step: int
    seed: int

    def rng(self, *key: object) -> random.Random:
        """A generator that depends on (run seed, step, key) and nothing else (law 8)."""
        return random.Random(seed_of(self.seed, self.step, *key))


def seed_of(*key: object) -> int:
    """A 63-bit integer from any printable key, the same on every machine and in every process."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
