"""What a page calls things: the positions of texts are tokens, those of images denoising steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reflux.reports.evals import EvalPoint
from reflux.reports.reading import Row, table


@dataclass(frozen=True)
class Words:
    """`images` says which of the two; a position is one `unit`, many are `units`; `position` heads their
    numbers, and `axis` a chart.
    """

    images: bool
    unit: str
    units: str
    position: str
    axis: str


TEXTS = Words(False, "token", "tokens", "position", "position in the answer (tokens)")
PICTURES = Words(
    True, "denoising step", "denoising steps", "denoising step", "denoising step, from noise (0) on"
)


def words_for(config: Row, attempts: Sequence[Row], moments: Iterable[EvalPoint]) -> Words:
    """By what is on disk: a first line or an example with an image; where there is nothing yet, by the
    learner's kind.
    """
    examples = [
        entry
        for moment in moments
        for entries in (*moment.examples.values(), moment.teacher_examples)
        for entry in entries
    ]
    lines = [*attempts, *examples]
    of_pictures = (
        any("image" in line for line in lines)
        if lines
        else table(config.get("learner")).get("kind") == "flow"
    )
    return PICTURES if of_pictures else TEXTS
