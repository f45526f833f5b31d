"""A context that shows other attempts must leave room for them in the teacher's window."""

from __future__ import annotations

from collections.abc import Iterator

from reflux.config import RunConfig
from reflux.contexts.peers import Peers
from reflux.model_files import size_of
from reflux.samplers.hf import HF
from reflux.teachers.local import Local


def problems(cfg: RunConfig) -> Iterator[str]:
    """As far as config files tell; words between the attempts and unbounded prompts come on top, and are refused when they are met."""
    for table, teacher in cfg.teachers.items():
        if not isinstance(teacher.context, Peers):
            continue
        model, path = (teacher.model, f"teachers.{table}.model") if isinstance(teacher, Local) else (cfg.learner.model, "learner.model")
        window = size_of(model, path).context_tokens
        prompt = cfg.sampler.max_prompt_tokens if isinstance(cfg.sampler, HF) else 0
        added = teacher.context.most_added(cfg.longest, lambda text: 0)
        if window is not None and max(prompt, 1) + added + cfg.longest > window:
            yield (
                f"teachers.{table}.context may add {added} tokens of other attempts to a prompt, and answers take up to {cfg.longest}: "
                f"with prompts of {max(prompt, 1)} or more that is beyond the {window} its model holds. Lower "
                f"teachers.{table}.context.peer_tokens, sampler.max_tokens or sampler.max_prompt_tokens."
            )
