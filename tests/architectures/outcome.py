"""What comes of one model type: right, refused with a sentence, not tried for a reason, or wrong."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from architectures.adapters import adapter_gaps
from architectures.parity import ALIVE, TOLERANCE, gaps
from architectures.runs import adapter_run, started, two_steps
from architectures.text import tokenizer
from architectures.tiny_models import build
from reflux.errors import ModelError

RIGHT, REFUSED, UNTRIED, WRONG = "right", "refused", "not tried", "WRONG"


@dataclass(frozen=True)
class Outcome:
    """One row of the table. lora: the verdict on training with adapters; empty where it was not tried."""

    name: str
    verdict: str
    lora: str = ""
    note: str = ""

    @property
    def line(self) -> str:
        return f"| {self.name} | {self.verdict} | {self.lora} | {self.note} |"

    @property
    def fault(self) -> bool:
        return WRONG in (self.verdict, self.lora)


def outcome(name: str, folder: Path) -> Outcome:
    """Build a student and a teacher of the type in `folder`, and try them."""
    quiet()
    student, teacher = folder / "student", folder / "teacher"
    try:
        for seed, model in enumerate((student, teacher)):
            build(name, model, tokenizer(), seed)
    except Exception as error:
        # whatever transformers raises: the library has not been reached
        return Outcome(name, UNTRIED, note=f"no tiny model: {told(error, folder)}")
    verdict, note = trial(folder, "run", lambda out: {**two_steps(student, teacher, out), **gaps(student)})
    if verdict != RIGHT:
        return Outcome(name, verdict, note=note)
    lora, note = trial(folder, "adapted", lambda out: adapter_gaps(student, out))
    if lora == WRONG:
        # a run may refuse what the direct measurement finds
        refused, said = trial(folder, "adapter_run", lambda out: adapter_run(student, teacher, out))
        lora, note = (refused, said) if refused == REFUSED else (lora, note)
    return Outcome(name, verdict, lora, note)


def trial(folder: Path, out: str, measure: Callable[[Path], dict[str, float]]) -> tuple[str, str]:
    """The verdict on what `measure` finds, which writes to the folder `out` in `folder`, and the note."""
    try:
        return judged(measure(folder / out))
    except ModelError as refusal:
        if started(folder / out):
            return WRONG, f"refused only after the first step: {told(refusal, folder)}"
        return REFUSED, told(refusal, folder)
    except Exception as error:
        # a fault of the library: it belongs in the table, and the other types are still to be tried
        return WRONG, f"{place(error)}: {type(error).__name__}: {told(error, folder)}"


def judged(found: dict[str, float]) -> tuple[str, str]:
    """The verdict on gaps in nats."""
    if found.pop("first token", ALIVE) < ALIVE:
        return UNTRIED, "no tiny model: the first token changes nothing at the later ones"
    apart = [f"{what} {nats:.1g}" for what, nats in found.items() if not nats <= TOLERANCE]
    return (WRONG, f"{', '.join(apart)} nats apart") if apart else (RIGHT, "")


def told(error: Exception, folder: Path) -> str:
    """The first sentence of an error, without paths, numbers and orders that differ from run to run."""
    said = " ".join(str(error).split()).replace("|", "/").replace("`", "'")
    for model in (folder / "student", folder / "teacher", folder):
        said = said.replace(str(model), "MODEL")
    said = re.sub(r"0x[0-9a-f]+|(?<=position )\d+", "N", said)
    said = re.sub(r"(?<![\w.])\d+\.\d+(e[-+]\d+)?|\d+e[-+]\d+", "N", said)
    # a set is printed in another order by each process
    said = re.sub(r"\{('[^{}]*')\}", lambda found: f"{{{', '.join(sorted(found[1].split(', ')))}}}", said)
    return re.split(r"\.(?= [A-Z'])", said)[0].removesuffix(".")


def place(error: Exception) -> str:
    """The innermost line of the library on the way to an error, by file and function."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/reflux/" in frame.filename]
    return f"{frames[-1].filename.rsplit('/reflux/')[-1]}:{frames[-1].name}" if frames else "the check itself"


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
