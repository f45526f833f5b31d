"""The worked solutions with which the student of long answers is trained: it confuses signs when it plans."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

from reflux.tasks.arithmetic import Chain, Operation, apply
from reflux.tasks.base import Split
from reflux.tasks.chains import Chains

OPPOSITE: dict[Operation, Operation] = {"add": "sub", "sub": "add", "mul": "mul"}


@dataclass(frozen=True)
class WrongSigns(Chains):
    """Chains whose worked solutions, from the plan on, add a number of at least `least` where the problem
    subtracts it, and the other way round. `Prompt.answer` stays the right one.

    A model that learns them fails at a problem with such a number. Problems whose wrong values would be above
    `largest` or below 0 are left out.
    """

    least: int = 6

    def worked(self, path: list[str], chain: Chain) -> str:
        return super().worked(path, self.wrong(chain))

    def wrong(self, chain: Chain) -> Chain:
        value, steps = chain
        return value, tuple(
            (OPPOSITE[kind] if number >= self.least else kind, number) for kind, number in steps
        )

    def _chain(self, rng: random.Random, split: Split) -> Chain | None:
        chain = super()._chain(rng, split)
        if chain is None:
            return None
        value, steps = self.wrong(chain)
        values = accumulate(steps, lambda so_far, step: apply(step[0], so_far, step[1]), initial=value)
        return chain if all(0 <= found <= self.largest for found in values) else None
