"""The groups of attempts that a run has asked for and that no checkpoint counts as consumed.

A finished group is written to a file of its own in the folder `in_flight`. A run that was stopped or killed
takes it again after a resume, if the weights of its tokens are not newer than the checkpoint and the bound of
staleness holds. All other attempts begin again, in new environments. Where an attempt must not begin twice
(`Task.runs_once`), its begin is noted in the folder, and after a resume it is given up: its attempts have
finish "error" and no position, and are counted as errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reflux.runtime.pipeline import Ask
from reflux.runtime.positions import Positions
from reflux.storage import rollout_files
from reflux.types import Attempt, Group, Prompt, TokenRollout

NAME = "in_flight"
_GROUP, _BEGUN = ".safetensors", ".begun"


# the block of a prompt and its place there
Key = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """What a resume finds in the folder. The values are the last steps that may take the groups."""

    finished: Mapping[Key, int]
    given_up: Mapping[Key, int]

    @property
    def recalled(self) -> dict[Key, int]:
        """The groups that are not sampled."""
        return {**self.given_up, **self.finished}

    def notes(self, positions: Positions) -> Iterator[str]:
        """Sentences for the user. positions: of the checkpoint."""
        left = {(block, place) for block, places in positions.left.items() for place in places}
        if left or self.recalled:
            yield (
                f"attempts in flight: {len(self.finished)} finished groups are used again, and "
                f"{len(left - self.recalled.keys())} begin again"
            )
        if self.given_up:
            yield (
                f"{len(self.given_up)} groups had begun, and the task does not let them begin twice. They "
                "are given up, and their attempts count as errors. A smaller save_every loses fewer."
            )


class InFlight:
    """folder: of the run. runs_once: as of the task. With max_staleness 0 no finished group is written, since
    none can be in flight at a checkpoint.
    """

    def __init__(self, folder: Path, runs_once: Callable[[Prompt], bool], *, max_staleness: int):
        self._folder, self._runs_once, self._max_staleness = folder / NAME, runs_once, max_staleness
        # by the block and the key of the prompt
        self._places: dict[tuple[int, str], Ask] = {}
        self._consumed: list[Ask] = []
        # the groups that are not sampled, with the last steps that may take them
        self.recalled: Mapping[Key, int] = {}

    def resume(self, positions: Positions, version: int) -> Iterable[str]:
        """Find what can be used again. Gives sentences for the user. positions: of the checkpoint. version:
        the policy version of its student.
        """
        found = self.find(positions, version)
        self.recalled = found.recalled
        return found.notes(positions)

    def begin(self, ask: Ask) -> bool:
        """The attempts at this prompt begin now, with nothing of an earlier try. False if they had begun
        before, as before a refresh, and must not begin twice.
        """
        self.discard(ask.step, ask.place)
        if not self._runs_once(ask.prompt):
            return True
        if self._path(ask, _BEGUN).exists():
            return False
        self._folder.mkdir(exist_ok=True)
        self._path(ask, _BEGUN).touch()
        return True

    def discard(self, block: int, place: int) -> None:
        """The finished group is not used, as after a refresh."""
        (self._folder / f"{block}-{place}{_GROUP}").unlink(missing_ok=True)

    def keep(self, ask: Ask, group: Group) -> None:
        """The attempts at this prompt are finished."""
        self._places[ask.step, ask.prompt.key] = ask
        if self._max_staleness:
            told = {"newest": max(_newest(attempt) for attempt in group), "deadline": ask.deadline}
            rollout_files.write(self._path(ask, _GROUP), group, told)

    def consume(self, groups: Sequence[Group]) -> None:
        """An optimiser step has used these groups."""
        self._consumed += [
            self._places.pop((group[0].asked_step, group[0].rollout.prompt.key)) for group in groups
        ]

    def forget(self) -> None:
        """A checkpoint counts all groups of `consume` as consumed."""
        for ask in self._consumed:
            for ending in (_GROUP, _BEGUN):
                self._path(ask, ending).unlink(missing_ok=True)
        self._consumed.clear()
        if self._folder.exists() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def recall(self, ask: Ask, n: int) -> Group:
        """The n attempts at this prompt that were finished before the resume, or were given up."""
        path = self._path(ask, _GROUP)
        if path.exists():
            return rollout_files.read(path, ask.prompt, ask.step)
        return [Attempt(_nothing(ask.prompt, sample), asked_step=ask.step) for sample in range(n)]

    def find(self, positions: Positions, version: int) -> Found:
        """What can be used after a resume; the rest is removed."""
        finished: dict[Key, int] = {}
        given_up: dict[Key, int] = {}
        for half in self._folder.glob(".*.tmp"):
            # A kill left it.
            half.unlink()
        for path, key in self._files():
            told = rollout_files.read_told(path) if path.suffix == _GROUP else None
            if positions.has_consumed(*key):
                path.unlink()
            elif path.suffix == _BEGUN:
                given_up[key] = max(positions.consumed, key[0]) + self._max_staleness
            elif told and told["newest"] <= version and told["deadline"] >= positions.consumed:
                finished[key] = told["deadline"]
            else:
                path.unlink()
        return Found(finished, {key: last for key, last in given_up.items() if key not in finished})

    def _files(self) -> Iterator[tuple[Path, Key]]:
        for path in sorted(self._folder.glob("*-*")):
            step, _, place = path.stem.partition("-")
            if path.suffix in (_GROUP, _BEGUN) and step.isdigit() and place.isdigit():
                yield path, (int(step), int(place))

    def _path(self, ask: Ask, ending: str) -> Path:
        return self._folder / f"{ask.step}-{ask.place}{ending}"


def _newest(attempt: Attempt) -> int:
    rollout = attempt.rollout
    return rollout.version if rollout.version_T is None else int(rollout.version_T.max(initial=0))


def _nothing(prompt: Prompt, sample: int) -> TokenRollout:
    ids, numbers = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    return TokenRollout(
        prompt=prompt,
        sample=sample,
        version=0,
        finish="error",
        mask_T=np.zeros(0, dtype=bool),
        logp_T=numbers,
        prompt_tokens=ids,
        tokens_T=ids,
        text="",
        messages=(),
    )
