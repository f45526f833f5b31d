"""What a run reads is there: asked before its directory is made."""

from __future__ import annotations

from reflux.checks import windows
from reflux.config import RunConfig
from reflux.errors import ConfigError, DataError
from reflux.models import locate


def inputs(cfg: RunConfig) -> None:
    """What a run reads is there, as far as can be told without loading it: asked before its directory is made.

    Raises ModelError for a folder that is none, ConfigError for a window too small, DataError for an evaluation with nothing to ask.
    """
    for name, part in {"learner": cfg.learner, **{f"teachers.{table}": teacher for table, teacher in cfg.teachers.items()}}.items():
        if "model" in vars(part):
            locate(part.model, f"{name}.model")
    if narrow := list(windows.problems(cfg)):
        raise ConfigError("\n".join(narrow))
    for name, evaluation in cfg.evals.items():
        if evaluation.split is not None and next(cfg.task.prompts(evaluation.split, 0), None) is None:
            raise DataError(
                f"evals.{name}: the task has no prompts in its split '{evaluation.split}'; choose another split, or evals.{name}=none"
            )
