"""What a run reads is there: asked before its directory is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reflux.checks import windows
from reflux.config import RunConfig
from reflux.errors import ConfigError, DataError, ModelError
from reflux.flows.adapter_folders import adapter_file, adapter_folder, on_hub
from reflux.learners.flow import Flow as FlowLearner
from reflux.learners.hf import HF
from reflux.models import locate
from reflux.teachers.flow import Flow as FlowTeacher
from reflux.teachers.local import Local

_MODEL_INDEX, _CONFIG = "model_index.json", "config.json"


def inputs(cfg: RunConfig) -> None:
    """What a run reads is there, as far as can be told without loading it: asked before its directory is made.

    Raises ModelError for a folder that is none, ConfigError for a window too small, DataError for an evaluation with nothing to ask.
    """
    models(cfg)
    if narrow := list(windows.problems(cfg)):
        raise ConfigError("\n".join(narrow))
    for name, evaluation in cfg.evals.items():
        if evaluation.split is not None and next(cfg.task.prompts(evaluation.split, 0), None) is None:
            raise DataError(
                f"evals.{name}: the task has no prompts in its split '{evaluation.split}'; choose another split, or evals.{name}=none"
            )


def models(cfg: RunConfig) -> None:
    """The folders of models and adapters that parts name are there, and hold what these parts load. The hub is not asked.

    Raises ModelError for the first that is not.
    """
    for where, part in {"learner": cfg.learner, **{f"teachers.{table}": teacher for table, teacher in cfg.teachers.items()}}.items():
        if "model" in vars(part):
            _model(part, part.model, f"{where}.model")
        if isinstance(part, FlowLearner | FlowTeacher) and part.adapter is not None and not on_hub(part.adapter):
            adapter_file(part.adapter, f"{where}.adapter")
        if isinstance(part, FlowLearner) and part.merge is not None:
            for index, name in enumerate(part.merge.models):
                if on_hub(name) or adapter_folder(name, f"{where}.merge.models[{index}]") is None:
                    _model(part, name, f"{where}.merge.models[{index}]")


def _model(part: Any, name: str, path: str) -> None:
    """A model is where it is said to be, and of the kind that this part loads; parts of a user's own know what they load."""
    folder = Path(locate(name, path))
    if not folder.is_dir():
        return
    if isinstance(part, FlowLearner | FlowTeacher) and not (folder / _MODEL_INDEX).is_file():
        raise ModelError(
            f"{path}: {name} is no flow model: its folder has no {_MODEL_INDEX}. Give a folder in diffusers' format, a run directory of a "
            f'flow, or, for a model of texts, kind = "{"hf" if isinstance(part, FlowLearner) else "local"}".'
        )
    if isinstance(part, HF | Local) and not (folder / _CONFIG).is_file():
        raise ModelError(
            f"{path}: {name} is no model of texts: its folder has a {_MODEL_INDEX} and no {_CONFIG}. Give a folder in Hugging Face format, "
            f'or, to draw pictures, kind = "flow".'
        )
