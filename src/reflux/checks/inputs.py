"""Check that the files that a run reads exist, before its directory is made."""

from __future__ import annotations

from reflux.checks import windows
from reflux.checks.stored import stored
from reflux.config.recipe import RunConfig
from reflux.config.registry import within
from reflux.errors import ConfigError, DataError
from reflux.evals.problems import problems


def inputs(cfg: RunConfig) -> None:
    """Check that models, prompts and windows of a run exist and fit, without loading weights. The run calls
    this function before it makes the run directory.

    Raises ModelError for a missing or wrong model folder, ConfigError for a context window that is too small,
    DataError for an evaluation without prompts, and for missing answers or references.
    """
    models(cfg)
    if narrow := list(windows.problems(cfg)):
        raise ConfigError("\n".join(narrow))
    for name, evaluation in cfg.evals.items():
        if evaluation.split is not None and next(problems(cfg.task, evaluation.split), None) is None:
            raise DataError(
                f"evals.{name}: the task has no prompts in its split '{evaluation.split}'. Choose another "
                f"split, or remove the evaluation with evals.{name}=none."
            )
    stored(cfg)


def models(cfg: RunConfig) -> None:
    """Check that the folders of models and adapters that parts name exist and contain what the
    parts load. The hub is not contacted.

    Raises ModelError for the first folder that is missing or holds something else.
    """
    for where, _, part in within(cfg):
        part.inputs(where)
