"""Sums of prices that the student has to ask for. The price table may change during a run.

"Buy figs, ham, milk. Ask price(NAME), then write Answer: SUM."  ->
"price(figs)", reply "12"; "12. price(ham)", reply "7"; "12+7=19. price(milk)", reply "5";
"19+5=24. Answer: 24"
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.config.step_context import seed_of
from reflux.tasks.generated import last_answer
from reflux.tasks.tools import Calls, Game, ToolTask, the_call
from reflux.types import Prompt, Rollout, TokenRollout

ITEMS = ["apples", "bread", "corn", "dates", "eggs", "figs", "grapes", "ham", "jam", "kale", "lemons", "milk"]


@dataclass(frozen=True, config=STRICT)
class Shopping(ToolTask):
    """What `min_items` to `max_items` things cost together. The student asks for each price by a call
    price(NAME), one a turn, and then writes "Answer: SUM".

    Prices are whole numbers from 1 to `largest_price`. The table of prices has the version s //
    `drift_every` after s completed optimiser steps, and all prices of a version are drawn again. An attempt
    keeps the table with which it began. `drift_every` 0: the table never changes.

    A turn without exactly one call, and a name that is not in the table, get a reply that begins with
    "Error:". The attempt ends after 10 turns, and only 6 calls get a price. `verify` takes the whole
    conversation: the sum is that of the prices which the student saw. An answer without having asked for all
    of them is wrong.
    """

    kind: ClassVar[str] = "shopping"

    # the smallest number of things to buy
    min_items: Annotated[int, Field(ge=1)] = 2
    # the largest number of things to buy
    max_items: Annotated[int, Field(le=6)] = 4
    # the highest price; the lowest is 1
    largest_price: Annotated[int, Field(ge=1)] = 20
    # optimiser steps from one table of prices to the next; 0: there is one table
    drift_every: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.min_items > self.max_items:
            raise ValueError(
                f"min_items = {self.min_items} is above max_items = {self.max_items}. Raise max_items"
            )

    def price(self, name: str, step: int) -> int:
        """The price after `step` completed optimiser steps."""
        version = step // self.drift_every if self.drift_every else 0
        return 1 + seed_of("prices", version, name) % self.largest_price

    def draw(self, rng: random.Random) -> tuple[str, ...]:
        return tuple(rng.sample(ITEMS, rng.randint(self.min_items, self.max_items)))

    def ask(self, problem: tuple[str, ...]) -> tuple[str, str]:
        return f"Buy {', '.join(problem)}. Ask price(NAME), then write Answer: SUM.", "+".join(problem)

    def game(self, problem: tuple[str, ...], step: int) -> Game:
        def price(name: str) -> str:
            return str(self.price(name, step)) if name in ITEMS else f"Error: no {name} here"

        return Calls({"price": price}, "price(NAME)")

    def turn(self, problem: tuple[str, ...], replies: Sequence[str]) -> str:
        prices = [int(reply) for reply in replies]
        before, after = sum(prices[:-1]), sum(prices)
        told = f"{before}+{prices[-1]}={after}. " if len(prices) > 1 else f"{after}. " if prices else ""
        rest = problem[len(prices) :]
        return told + (f"price({rest[0]})" if rest else f"Answer: {after}")

    def evidence(self, rollout: Rollout) -> Any:
        return rollout.messages if isinstance(rollout, TokenRollout) else rollout.made

    def verify(self, prompt: Prompt, made: Any) -> float:
        """1.0 if the number after the last "Answer:" is the sum of the prices of all things that were to be
        bought, as the student was told them, else 0.0. made: the messages of the conversation.
        """
        if prompt.answer is None:
            raise ValueError(f"prompt {prompt.id} has no answer to compare with")
        if isinstance(made, str):
            return 0.0
        said = list(made[len(prompt.messages) :])
        seen, wanted = dict(_prices(said)), prompt.answer.split("+")
        if not said or not all(name in seen for name in wanted):
            return 0.0
        return float(last_answer(said[-1]["content"]) == str(sum(seen[name] for name in wanted)))


def _prices(said: Sequence[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """(name, price) of each call that got a price. said: the student's turns and the replies, in turn."""
    for turn, reply in zip(said[::2], said[1::2], strict=False):
        call = the_call(turn["content"])
        if call is not None and reply["content"].isdecimal():
            yield call[1], int(reply["content"])
