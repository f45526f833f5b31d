"""Images of the same prompts by the student before and after training, and by the teacher. Each prompt has
one row, and each image has its verdict.

A file holds an image as base64 text. The image is decoded and encoded again, so that the page only contains
PNGs that this program wrote, whatever the file contains.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from reflux.models import images
from reflux.reports.evals import EvalPoint, main_name
from reflux.reports.examples import id_of, verdict, words
from reflux.reports.reading import Row, number, table
from reflux.reports.units import count

# The largest side, in pixels on the page, of an image that is enlarged.
_SHOWN = 144
_ROWS = 24


@dataclass(frozen=True)
class Image:
    """The attributes of an img element. enlarged: True if the image is scaled up by a whole number, so that
    the browser keeps its pixels sharp.
    """

    # A data: URI.
    source: str
    width: int
    height: int
    enlarged: bool


@dataclass(frozen=True)
class DrawnImage:
    """One image of a row: the model and the step that generated it, the verdict and its parts as text.
    `image` is None if there is no readable image.
    """

    who: str
    when: str
    alt: str
    image: Image | None
    verdict: str
    parts: list[str]


@dataclass(frozen=True)
class Strip:
    """One prompt and its images."""

    prompt: str
    gold: str
    drawn: list[DrawnImage]


def picture_in(value: object) -> Image | None:
    """The image in base64 text. None if the text holds no readable image."""
    if not isinstance(value, str):
        return None
    try:
        pixels = images.thumbnail(images.from_text(value))
    except ValueError:
        return None
    height, width = pixels.shape[:2]
    scale = max(1, _SHOWN // max(height, width))
    source = "data:image/png;base64," + base64.b64encode(images.png(pixels)).decode()
    return Image(source, width * scale, height * scale, scale > 1)


def read_strips(moments: list[EvalPoint]) -> list[Strip]:
    """One strip for each prompt, in order, with the images of the first evaluation moment, of the last one
    and of the teacher, where they exist.
    """
    name = main_name(
        (name for moment in moments for name, entries in moment.examples.items() if entries), "accuracy"
    )
    kept = [moment for moment in moments if moment.examples.get(name or "")]
    columns = [
        (who, f"step {count(moment.step)}", moment.examples[name or ""]) for who, moment in _named(kept)
    ]
    taught = next((moment.teacher_examples for moment in moments if moment.teacher_examples), [])
    columns += [("Teacher", "", taught)] if taught else []
    by_id = [(who, when, {id_of(entry): entry for entry in entries}) for who, when, entries in columns]
    order = list(dict.fromkeys(id_of(entry) for _, _, entries in columns for entry in entries))[:_ROWS]
    return [
        _strip([(who, when, entries[prompt]) for who, when, entries in by_id if prompt in entries])
        for prompt in order
    ]


def _named(kept: list[EvalPoint]) -> list[tuple[str, EvalPoint]]:
    """The first and the last evaluation moment, by title. Only a moment at step 0 is called Before."""
    ends = [kept[0], kept[-1]] if len(kept) > 1 else kept
    return [("Before" if moment.step == 0 else "After", moment) for moment in ends]


def _strip(entries: list[tuple[str, str, Row]]) -> Strip:
    first = entries[0][2]
    asked = words(first.get("question", first.get("prompt"))) or id_of(first)
    return Strip(
        asked, words(first.get("answer")), [_drawn(asked, who, when, entry) for who, when, entry in entries]
    )


def _drawn(asked: str, who: str, when: str, entry: Row) -> DrawnImage:
    judged = verdict(entry.get("right", entry.get("verdict")))
    told = f"{who.lower()}, {when}" if when else who.lower()
    return DrawnImage(
        who, when, f"{asked}: {told}, {judged}", picture_in(entry.get("image")), judged, parts_of(entry)
    )


def parts_of(entry: Row) -> list[str]:
    """The parts of a verdict as text: "quality 0.93"."""
    known = {words(name): number(value) for name, value in table(entry.get("parts")).items()}
    return [f"{name} {value:.2f}" for name, value in known.items() if value is not None]
