"""The few exceptions of the library; each is also the standard exception it specialises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RefluxError(Exception):
    """Anything the user can act on. Its text says what to do."""


class ConfigError(RefluxError, ValueError):
    """A recipe, an override or a combination of parts that cannot work. Raised before any weight is loaded."""


class DataError(RefluxError, ValueError):
    """A data file that is empty, malformed or lacks a field. Names the file and the line."""


class ModelError(RefluxError, ValueError):
    """A model folder or tokenizer that is missing or does not fit the other one."""


class RunError(RefluxError, FileExistsError):
    """A run directory that cannot be used: it belongs to another run, or there is nothing to resume."""


class StepRefused(RefluxError, ArithmeticError):
    """A step whose loss or gradient is not finite. Nothing was changed.

    why: the numbers, in a few words. records: what the step computed along each attempt (`StepRecord`, or
    None), in order. The loop writes the batch to a file and adds its path to the text.
    """

    def __init__(self, text: str, why: str = "", records: Sequence[Any] = ()):
        super().__init__(text)
        self.why, self.records = why, records


class Stopped(RefluxError):
    """The user asked the run to stop (Ctrl-C or SIGTERM). Its state is saved."""
