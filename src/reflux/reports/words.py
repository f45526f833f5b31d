"""The words of a page: the positions of texts are called tokens, those of images denoising steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reflux.reports.evals import EvalPoint
from reflux.reports.reading import Row, table


@dataclass(frozen=True)
class Words:
    """`images`: True for images, False for texts. `unit` and `units` name one position and several.
    `position` is the header of a column of positions, and `axis` the title of a chart's axis.
    """

    images: bool
    unit: str
    units: str
    position: str
    axis: str


TEXTS = Words(False, "token", "tokens", "position", "position in the answer (tokens)")
PICTURES = Words(
    True, "denoising step", "denoising steps", "denoising step", "denoising step (0 starts from noise)"
)


def words_for(config: Row, attempts: Sequence[Row], moments: Iterable[EvalPoint]) -> Words:
    """The words for a run. A run makes images if an attempt or an example on disk has an image. If there are
    no attempts yet, the kind of the learner decides.
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
