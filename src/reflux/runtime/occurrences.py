"""Number the prompts that occur several times in one step or evaluation.

A step may have more prompts than the data has lines. Each occurrence then has attempts of its own: its key is
different, so its random numbers are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import count

from reflux.types import Prompt


def numbered(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The prompts of one step or evaluation, in order, with their `occurrence`, so that all have different
    keys. A number whose key is the id of another prompt is left out, such as 2 for `a` where there is `a#2`.
    """
    prompts = list(prompts)
    taken = {prompt.id for prompt in prompts}
    following: dict[str, Iterable[int]] = {}
    found = []
    for prompt in prompts:
        if prompt.id in following:
            again = (replace(prompt, occurrence=number) for number in following[prompt.id])
            prompt = next(other for other in again if other.key not in taken)
        else:
            following[prompt.id] = count(2)
        found.append(prompt)
    return found
