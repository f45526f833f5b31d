"""Small images that a program can judge: "the digit 7", or "4 squares". The built-in default task of flow
models.

An image has 16 x 16 pixels in one channel. There are only a few different prompts. So the id of a prompt
contains the number of its earlier occurrences. The sampler's random numbers depend on the id, so the same
prompt gives a different image each time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of
from reflux.tasks.base import Split, TaskPart
from reflux.tasks.glyph_drawing import CELLS, DOMAINS, NUMBERS, Domain, asked
from reflux.types import FlowRollout, Prompt, Reward, Rollout


@dataclass(frozen=True, config=STRICT)
class Glyphs(TaskPart):
    """Prompts of `domains` in turn. Within a domain every number occurs once before any number repeats.

    The order of the numbers is drawn from the seed. digits: "the digit 0" to "the digit 9". An image is right
    if the nearest drawing of any digit, at any of its 9 positions, shows the digit of the prompt and no other
    digit is equally near, with at most 6 different pixels. counts: "1 square" to "`largest_count` squares",
    at most 9. An image is right if exactly that number of connected areas of ink (pixels brighter than half,
    connected by sides) have at least 4 pixels. Their shape and position do not matter. `Prompt.route` is the
    domain, so teachers can be specialists. held_out: the number of prompts in each of "validation" and
    "test". "train" never ends. The part `quality` of the reward is independent of the prompt
    (`glyph_reading.quality`).

    Prompt number p of a split depends on (split, seed, p) alone, so `start` costs nothing. Its id and text
    depend on the split, its number and its earlier occurrences. ValueError if domains are empty or repeated,
    if largest_count is outside 1..9, if held_out is negative, or if weight is not above 0.
    """

    domains: tuple[Domain, ...] = DOMAINS
    # the largest number of squares; the shipped models were trained on 1 to 6
    largest_count: int = 6
    # number of prompts in each held-out split; the default is a multiple of 10 digits and of 6 counts
    held_out: int = 480
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError("domains must name at least one of digits, counts, each once")
        if not 1 <= self.largest_count <= CELLS:
            raise ValueError(
                f"largest_count must be between 1 and {CELLS}, the number of positions for squares, got "
                f"{self.largest_count}"
            )
        if self.held_out < 0 or not self.weight > 0:
            raise ValueError("held_out must not be negative, and weight must be above 0")

    @property
    def ends(self) -> bool | None:
        return False

    @property
    def judge(self) -> str | None:
        return "reflux.evals.prompt_difficulty:as_glyph"

    @property
    def routes(self) -> frozenset[str | None]:
        return frozenset(self.domains)

    @property
    def rollouts(self) -> type[Rollout]:
        return FlowRollout

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        """Prompts from position `start` on. "train" never ends, the other splits have `held_out` prompts."""
        position = start
        while split == "train" or position < self.held_out:
            yield self._prompt(split, seed, position)
            position += 1

    def verify(self, prompt: Prompt, made: Any) -> Reward:
        """1.0 if the image `made` shows what the prompt asks for, else 0.0, with the quality of the image.
        ValueError for a prompt of another task, and for an image that is not uint8 [16, 16].
        """
        from reflux.tasks.glyph_reading import checked, is_right, quality

        domain, number = asked(prompt)
        image = checked(made)
        return Reward(float(is_right(image, domain, number)), parts={"quality": quality(image, domain)})

    def texts(self) -> list[str]:
        """The texts of all prompts, domain by domain."""
        return [text_of(domain, number) for domain in self.domains for number in self._numbers(domain)]

    def _numbers(self, domain: Domain) -> range:
        return NUMBERS[domain] if domain == "digits" else range(1, self.largest_count + 1)

    def _prompt(self, split: Split, seed: int, position: int) -> Prompt:
        turn, which = divmod(position, len(self.domains))
        domain = self.domains[which]
        numbers = list(self._numbers(domain))
        before, place = divmod(turn, len(numbers))
        random.Random(seed_of("glyphs", split, seed, domain, before)).shuffle(numbers)
        number = numbers[place]
        return Prompt(
            id=f"{split}-{domain}-{number}-{before}",
            messages=({"role": "user", "content": text_of(domain, number)},),
            answer=str(number),
            route=domain,
        )


def text_of(domain: Domain, number: int) -> str:
    """The text of a prompt: "the digit 7", "1 square", "4 squares"."""
    return f"the digit {number}" if domain == "digits" else f"{number} square{'s' if number > 1 else ''}"
