"""The exceptions of the library. Each is also a subclass of a standard exception."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class RefluxError(Exception):
    """An error that the user can correct. Its text says how."""


class ConfigError(RefluxError, ValueError):
    """A recipe, an override or a combination of parts that is invalid. Raised before any weight is loaded."""


class DataError(RefluxError, ValueError):
    """A data file that is empty, malformed or lacks a field. The text names the file and the line."""


class ModelError(RefluxError, ValueError):
    """A model folder or tokenizer that is missing, or that does not match the other model's."""


class RunError(RefluxError, FileExistsError):
    """A run directory that cannot be used: it belongs to another run, or there is nothing to resume."""


class StepRefused(RefluxError, ArithmeticError):
    """An optimiser step whose loss or gradient is not finite. No weight was changed.

    why: the numbers that are not finite, in a short text. records: what the step computed for each attempt
    (`StepRecord`, or None), in order. The loop writes the batch to a file and adds its path to the text.
    """

    def __init__(self, text: str, why: str = "", records: Sequence[Any] = ()):
        super().__init__(text)
        self.why, self.records = why, records

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.why, self.records)


class Stopped(RefluxError):
    """The user asked the run to stop (Ctrl-C or SIGTERM). Its state is saved."""


class StoppedByAlarm(Stopped):
    """An alarm of `health.stop_on` began, so the run has ended. Its state is saved."""


class ServerError(RefluxError, ConnectionError):
    """A server of models that gave no answer, although the request was sent again where that is possible."""


class ServerRefused(ServerError):
    """A request that the server answered with an error of the caller, such as 400. It is never sent again.

    status: the HTTP status. reason: what the server said, in a short text.
    """

    def __init__(self, text: str, status: int, reason: str = ""):
        super().__init__(text)
        self.status, self.reason = status, reason

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.status, self.reason)


class BadAnswer(ServerError):
    """An answer with a status of success that does not contain what was requested."""
