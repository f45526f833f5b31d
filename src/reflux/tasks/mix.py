"""Mixes several tasks in one stream, each with its share."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT, PartOf
from reflux.config.step_context import seed_of
from reflux.tasks.base import Solution, Split, Task, TaskPart
from reflux.types import Message, Prompt, Reward, Rollout

if TYPE_CHECKING:
    from reflux.rollouts.environment import Environment

# Number of prompts in a block. In each block every part has exactly its share.
BLOCK = 1000


@dataclass(frozen=True, config=STRICT)
class Mix(TaskPart):
    """A mix of the tasks `parts` (by name), each in proportion to its `weight`.

    The id of a prompt is "NAME/ID": the name of the task in the mix, and the id that this task gave.

    "train": every block of 1,000 prompts contains exactly the share of each task (largest remainders), in an
    order drawn from (seed, block). So `start` is found without reading the prompts before it. Held-out
    splits: all problems of all tasks, with the tasks in turn, so the first few hundred problems are a
    balanced mix. ValueError for names with a slash, and for a part whose share of 1,000 is rounded to 0.
    """

    parts: Annotated[dict[str, Task], PartOf("tasks", many="table")]
    weight: float = 1.0

    mixes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("a mix needs at least one part: a table [task.parts.NAME] with its kind")
        if not self.weight > 0:
            raise ValueError("weight must be above 0")
        if len({part.rollouts for part in self.parts.values()}) > 1:
            raise ValueError("the parts of a mix must all make texts, or all make images")
        for name, share in self._shares().items():
            if "/" in name:
                raise ValueError(
                    f"the part name '{name}' contains a slash, which separates names from ids. Rename it"
                )
            if not share:
                raise ValueError(
                    f"the weight of part '{name}' is less than 1 in {BLOCK} prompts. Raise the weight, or "
                    "remove the part"
                )

    @property
    def judges(self) -> bool:
        return any(part.judges for part in self.parts.values())

    @property
    def multi_turn(self) -> bool:
        return any(part.multi_turn for part in self.parts.values())

    @property
    def local(self) -> bool:
        return all(part.local for part in self.parts.values())

    @property
    def ends(self) -> bool | None:
        parts = [part.ends for part in self.parts.values()]
        return False if False in parts else None if None in parts else True

    @property
    def patience(self) -> int:
        """The number of prompts in the blocks which together contain the `patience` of each part, wherever a
        pass begins.
        """
        return BLOCK * (1 + max(part.patience for part in self.parts.values()))

    @property
    def judge(self) -> str | None:
        found = {part.judge for part in self.parts.values()}
        return found.pop() if len(found) == 1 else None

    @property
    def solves(self) -> bool:
        return all(part.solves for part in self.parts.values())

    def solve(self, problem: str) -> Solution | None:
        """The solution by the first task in the mix that can read the problem."""
        found = (part.solve(problem) for part in self.parts.values())
        return next((solution for solution in found if solution is not None), None)

    @property
    def rollouts(self) -> type[Rollout]:
        return next(iter(self.parts.values())).rollouts

    @property
    def routes(self) -> frozenset[str | None] | None:
        found = [part.routes for part in self.parts.values()]
        return (
            None
            if any(routes is None for routes in found)
            else frozenset(route for routes in found for route in routes or ())
        )

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        if split == "train":
            return self._train(seed, start)
        streams = [self._stream(name, split, seed, 0) for name in self.parts]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
        return itertools.islice((prompt for prompt in turns if prompt is not None), start, None)

    def verify(self, prompt: Prompt, made: Any) -> float | Reward:
        """The verdict on `made` of the task in the mix that the prompt comes from."""
        part, inner = self._inner(prompt)
        return part.verify(inner, made)

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        """The environment of the task in the mix that the prompt comes from."""
        part, inner = self._inner(prompt)
        return part.open_env(inner, step)

    @property
    def replays(self) -> bool:
        return self.multi_turn and all(part.replays for part in self.parts.values() if part.multi_turn)

    def replay(self, prompt: Prompt, turns: Sequence[Message], step: int) -> list[tuple[Message, ...]]:
        part, inner = self._inner(prompt)
        return part.replay(inner, turns, step)

    def evidence(self, rollout: Rollout) -> Any:
        return self.parts[self.part_of(rollout.prompt)].evidence(rollout)

    def runs_once(self, prompt: Prompt) -> bool:
        part, inner = self._inner(prompt)
        return part.runs_once(inner)

    def part_of(self, prompt: Prompt) -> str:
        """The name, in the mix, of the task that the prompt comes from. ValueError for a prompt of another
        task.
        """
        name, slash, _ = prompt.id.partition("/")
        if not slash or name not in self.parts:
            raise ValueError(f"prompt {prompt.id} belongs to no part of this mix ({', '.join(self.parts)})")
        return name

    def _train(self, seed: int, start: int) -> Iterator[Prompt]:
        shares = self._shares()
        block, skip = divmod(start, BLOCK)
        before = Counter(self._order(seed, block)[:skip])
        streams = {
            name: self._stream(name, "train", seed, block * share + before[name])
            for name, share in shares.items()
        }
        return (
            next(streams[name])
            for number in itertools.count(block)
            for name in self._order(seed, number)[skip if number == block else 0 :]
        )

    def _order(self, seed: int, block: int) -> list[str]:
        names = [name for name, share in self._shares().items() for _ in range(share)]
        random.Random(seed_of("mix", seed, block)).shuffle(names)
        return names

    def _shares(self) -> dict[str, int]:
        """The number of prompts of each part per block: rounded down, then the rest by largest remainders."""
        total = sum(part.weight for part in self.parts.values())
        exact = {name: BLOCK * part.weight / total for name, part in self.parts.items()}
        shares = {name: int(share) for name, share in exact.items()}
        by_remainder = sorted(exact, key=lambda name: shares[name] - exact[name])
        for name in by_remainder[: BLOCK - sum(shares.values())]:
            shares[name] += 1
        return shares

    def _stream(self, name: str, split: Split, seed: int, start: int) -> Iterator[Prompt]:
        stream = self.parts[name].prompts(split, seed_of(seed, name), start)
        return (replace(prompt, id=f"{name}/{prompt.id}") for prompt in stream)

    def _inner(self, prompt: Prompt) -> tuple[Task, Prompt]:
        name = self.part_of(prompt)
        return self.parts[name], replace(prompt, id=prompt.id.removeprefix(f"{name}/"))
