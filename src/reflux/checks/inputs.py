"""What a run reads is there: asked before its directory is made."""

from __future__ import annotations

from reflux.checks import windows
from reflux.config.recipe import RunConfig
from reflux.config.registry import within
from reflux.errors import ConfigError, DataError
from reflux.evals.problems import problems


def inputs(cfg: RunConfig) -> None:
    """What a run reads is there, as far as can be told without loading it: asked before its directory is
    made.

    Raises ModelError for a folder that is none, ConfigError for a window too small, DataError for an
    evaluation with nothing to ask.
    """
    models(cfg)
    if narrow := list(windows.problems(cfg)):
        raise ConfigError("\n".join(narrow))
    for name, evaluation in cfg.evals.items():
        if evaluation.split is not None and next(problems(cfg.task, evaluation.split), None) is None:
            raise DataError(
                f"evals.{name}: the task has no prompts in its split '{evaluation.split}'; choose another "
                f"split, or evals.{name}=none"
            )


def models(cfg: RunConfig) -> None:
    """The files that parts name are there, such as folders of models and adapters, and hold what these parts
    load. The hub is not asked.

    Raises ModelError for the first that is not.
    """
    for where, _, part in within(cfg):
        part.inputs(where)
