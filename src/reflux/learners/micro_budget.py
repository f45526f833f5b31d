"""How many tokens a micro-batch has. On a GPU it is found from measured memory.

A micro-batch of n tokens takes at most twice the memory of one with n / 2 tokens. So the size is doubled from
a small one, for as long as twice the measured memory is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reflux.learners.device_memory import DeviceMemory

# tokens where memory is not measured, as on a CPU
FIXED = 16384
# tokens of the first measured micro-batch
FIRST = 1024
# numbers of one hidden state per micro-batch above which a GPU is busy, and larger ones only take memory
_BUSY_NUMBERS, _BUSY_TOKENS = 1 << 22, 4096
# share of the free memory that a micro-batch may take; the sampler's cache varies from step to step
_SHARE = 0.8


def busy_tokens(width: int) -> int:
    """The tokens above which a larger micro-batch is not faster on a GPU. width: of a hidden state."""
    return max(_BUSY_TOKENS, _BUSY_NUMBERS // max(1, width))


class MicroBudget:
    """`tokens` is the most tokens of the next micro-batch. memory: of the device; None: `tokens` stays as it
    is. most: where its growth ends. note: gets the result in words, once.
    """

    def __init__(self, tokens: int, most: int, memory: DeviceMemory | None, note: Callable[[str], None]):
        self.tokens, self.most, self.memory, self.note = tokens, most, memory, note
        self.settled = memory is None

    @contextmanager
    def measuring(self, tokens: int) -> Iterator[None]:
        """Around the passes of a micro-batch of `tokens` tokens. Afterwards the budget may be larger."""
        if self.settled or self.memory is None:
            yield
            return
        self.memory.begin()
        yield
        each, free = self.memory.taken_bytes() / tokens, self.memory.free_bytes()
        fitting = int(_SHARE * free / max(1.0, each))
        grown = min(2 * self.tokens, self.most, max(fitting, self.tokens))
        self.settled = grown == self.most or grown < 2 * self.tokens
        self.tokens = grown
        if self.settled:
            why = "more are not faster" if grown == self.most else "more do not fit"
            self.note(
                f"learner.micro_batch_tokens: {grown:,} ({why}); measured at most {each / 1e6:.2g} MB a "
                f"token, and {free / 1e9:.3g} GB are free"
            )

    def halve(self, longest: int) -> bool:
        """After the memory was exceeded: half of the tokens, for good. False if that changes nothing, because
        every micro-batch has one text already. longest: tokens of the longest text.
        """
        if self.tokens <= longest:
            return False
        self.tokens, self.settled = max(1, self.tokens // 2), True
        if self.memory is not None:
            self.memory.release()
        self.note(
            f"learner.micro_batch_tokens: {self.tokens:,} from here on, because a larger micro-batch "
            "exceeded the memory; the step is computed again from its beginning"
        )
        return True
