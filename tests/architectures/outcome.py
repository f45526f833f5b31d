"""What comes of one model type: right, refused with a sentence, not tried for a reason, or wrong."""

from __future__ import annotations

import re
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from architectures.parity import ALIVE, TOLERANCE, gaps
from architectures.runs import two_steps
from architectures.text import tokenizer
from architectures.tiny_models import build
from reflux.errors import RefluxError

RIGHT, REFUSED, UNTRIED, WRONG = "right", "refused", "not tried", "WRONG"
# a sentence is cut after so many characters
LONGEST = 300


@dataclass(frozen=True)
class Outcome:
    """One row of the table."""

    name: str
    verdict: str
    note: str = ""

    @property
    def line(self) -> str:
        return f"| {self.name} | {self.verdict} | {self.note} |"


def outcome(name: str, folder: Path) -> Outcome:
    """Build a student and a teacher of the type in `folder`, and try them."""
    quiet()
    student, teacher = folder / "student", folder / "teacher"
    try:
        for seed, model in enumerate((student, teacher)):
            build(name, model, tokenizer(), seed)
    except Exception as error:
        # whatever transformers raises: the library has not been reached
        return Outcome(name, UNTRIED, f"no tiny model: {told(error, folder)}")
    try:
        found = {**gaps(student), **two_steps(student, teacher, folder)}
    except RefluxError as refusal:
        return Outcome(name, REFUSED, told(refusal, folder))
    except Exception as error:
        # a fault of the library, in the table instead of a refusal
        return Outcome(name, WRONG, f"{place(error)}: {type(error).__name__}: {told(error, folder)}")
    return judged(name, found)


def judged(name: str, found: dict[str, float]) -> Outcome:
    """The row of a type that ran to the end, from its gaps in nats."""
    if found.pop("first token") < ALIVE:
        return Outcome(name, UNTRIED, "no tiny model: the first token changes nothing at the later ones")
    apart = [f"{what} {nats:.1g}" for what, nats in found.items() if not nats <= TOLERANCE]
    return Outcome(name, WRONG, f"{', '.join(apart)} nats apart") if apart else Outcome(name, RIGHT)


def told(error: Exception, folder: Path) -> str:
    """The first sentences of an error, without paths and numbers that differ from run to run."""
    said = " ".join(str(error).split()).replace("|", "/")
    for model in (folder / "student", folder / "teacher", folder):
        said = said.replace(str(model), "MODEL")
    said = re.sub(r"/tmp/\S+|0x[0-9a-f]+", "...", said)
    said = re.sub(r"(?<![\w.])\d+\.\d+(e[-+]\d+)?|\d+e[-+]\d+", "N", said)
    return said[:LONGEST]


def place(error: Exception) -> str:
    """The innermost line of the library on the way to an error, by file and function."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/reflux/" in frame.filename]
    return f"{frames[-1].filename.rsplit('/reflux/')[-1]}:{frames[-1].name}" if frames else "the check itself"


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
