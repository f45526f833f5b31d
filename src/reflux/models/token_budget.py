"""How many tokens a model reads at once. On a GPU the learner finds the number from measured memory.

n tokens take at most twice the memory of n / 2 tokens. So the number is doubled from a small one, for as long
as twice the measured memory is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reflux.models.device_memory import DeviceMemory

# tokens where memory is not measured, as on a CPU
FIXED = 16384
# tokens of the first measured micro-batch
FIRST = 1024
# numbers of one table of hidden states above which a GPU is busy, and more tokens only take memory
_BUSY_NUMBERS, _BUSY_TOKENS = 1 << 22, 4096
# share of the free memory that may be taken; the sampler's cache varies from step to step
_SHARE = 0.8


def busy_tokens(width: int) -> int:
    """The tokens above which more are not faster on a GPU. width: of a hidden state."""
    return max(_BUSY_TOKENS, _BUSY_NUMBERS // max(1, width))


class TokenBudget:
    """`tokens` is the most tokens of the next passes."""

    def __init__(
        self,
        key: str,
        note: Callable[[str], None],
        tokens: int,
        most: int = 0,
        memory: DeviceMemory | None = None,
    ):
        """key: the path of the recipe's key, for the notes in words. memory: of the device; None: `tokens`
        does not grow. most: where its growth ends.
        """
        self.key, self.note, self.tokens, self.most, self.memory = key, note, tokens, most, memory
        self.settled, self._warm = memory is None, False

    @contextmanager
    def measuring(self, tokens: int) -> Iterator[None]:
        """Around the passes over `tokens` tokens. Afterwards the budget may be larger."""
        if self.settled or self.memory is None or 2 * tokens < self.tokens:
            yield
            return
        self.memory.begin()
        yield
        each, free = self.memory.taken_bytes() / tokens, self.memory.free_bytes()
        grown = min(2 * self.tokens, self.most, int(_SHARE * free / max(1.0, each)))
        # The first passes also allocate what is kept, such as the gradients, so their result is no limit.
        self.settled = grown == self.most or (self._warm and grown < 2 * self.tokens)
        self.tokens, self._warm = max(grown, self.tokens), True
        if self.settled:
            why = "more are not faster" if grown == self.most else "more do not fit"
            self.note(
                f"{self.key}: {self.tokens:,} ({why}); measured at most {each / 1e6:.2g} MB a token, and "
                f"{free / 1e9:.3g} GB are free"
            )

    def halve(self, longest: int) -> bool:
        """After the memory was exceeded: half of the tokens, for good. False if that changes nothing, because
        only one text is read at once already. longest: tokens of the longest text.
        """
        if self.tokens <= longest:
            return False
        self.tokens, self.settled = max(1, self.tokens // 2), True
        self.note(
            f"{self.key}: {self.tokens:,} from here on, because the memory of the device was exceeded; the "
            "passes begin again"
        )
        return True
