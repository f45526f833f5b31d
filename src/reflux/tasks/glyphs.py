"""Small images on demand, which a program can judge: "the digit 7", or "4 squares". The embedded default of
flow models.

An image is 16 x 16 pixels in one channel. There are only a few different prompts, so a prompt's id, on which
a sampler's random numbers depend, also says how often it was asked before: each time another image is made.
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
    """Prompts of `domains` by turns; within a domain every number once, in an order drawn from the seed,
    before any comes again.

    digits: "the digit 0" to "the digit 9". Right if the image's nearest drawing of any digit at any of its 9
    places is one of the asked digit, and of no other, at most 6 pixels off. counts: "1 square" to
    "`largest_count` squares", at most 9. Right if exactly so many pieces of ink (pixels brighter than half),
    joined by their sides, have at least 4 pixels; their shape and place do not matter. `Prompt.route` is the
    domain, so that teachers can specialise. held_out: how many prompts "validation" and "test" hold each;
    "train" never ends. The verdict's part `quality` says how clean the image is, whatever was asked
    (`glyph_reading.quality`).

    Prompt number p of a split depends on (split, seed, p) alone, so `start` costs nothing; its id and text on
    the split, the number asked for and how often it came before. ValueError for domains that repeat or are
    none, a largest_count outside 1..9, a negative held_out, a weight not above 0.
    """

    domains: tuple[Domain, ...] = DOMAINS
    # the shipped models know 1 to 6
    largest_count: int = 6
    # by default a whole number of rounds of 10 digits and of 6 counts
    held_out: int = 480
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError("domains must name at least one of digits, counts, each once")
        if not 1 <= self.largest_count <= CELLS:
            raise ValueError(
                f"largest_count must lie between 1 and {CELLS}, the places for squares, got "
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
        """Prompts from position `start` on; "train" for ever, the others `held_out` of them."""
        position = start
        while split == "train" or position < self.held_out:
            yield self._prompt(split, seed, position)
            position += 1

    def verify(self, prompt: Prompt, made: Any) -> Reward:
        """1.0 or 0.0, and the image's quality. ValueError for a prompt of another task, and for what is no uint8 [16, 16]."""
        from reflux.tasks.glyph_reading import checked, is_right, quality

        domain, number = asked(prompt)
        image = checked(made)
        return Reward(float(is_right(image, domain, number)), parts={"quality": quality(image, domain)})

    def texts(self) -> list[str]:
        """Every prompt that can be asked, domain by domain."""
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
    """What a user asks for: "the digit 7", "1 square", "4 squares"."""
    return f"the digit {number}" if domain == "digits" else f"{number} square{'s' if number > 1 else ''}"
