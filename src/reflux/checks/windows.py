"""A context that shows other attempts must leave room for them in the teacher's window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from reflux.config import RunConfig
from reflux.contexts.peers import Peers
from reflux.model_files import size_of
from reflux.models import load_tokenizer
from reflux.samplers.hf import HF
from reflux.samplers.stored import Stored
from reflux.teachers.local import Local
from reflux.tokens import Renderer

_PROMPTS = 64  # of the training prompts, asked for their length


def problems(cfg: RunConfig) -> Iterator[str]:
    """Prompt, other attempts, the words around them and the answer, counted with the teacher's tokenizer against its window.

    A prompt takes `sampler.max_prompt_tokens`, or, where that is not set, what the longest of the first 64 training prompts takes.
    Feedback, longer prompts and peers that are longer when read as text come on top, and are refused when they are met. A model whose
    files are not here yet is not checked. Imports transformers where a teacher is shown other attempts.
    """
    for table, teacher in cfg.teachers.items():
        if isinstance(teacher.context, Peers):
            yield from _too_narrow(cfg, table, teacher)


def _too_narrow(cfg: RunConfig, table: str, teacher: Any) -> Iterator[str]:
    part, path = (teacher, f"teachers.{table}.model") if isinstance(teacher, Local) else (cfg.learner, "learner.model")
    window = size_of(part.model, path).context_tokens
    if window is None:
        return
    sampler = cfg.sampler.generate if isinstance(cfg.sampler, Stored) else cfg.sampler
    asks = teacher if isinstance(teacher, Local) else sampler if isinstance(sampler, HF) else HF()
    tokenizer = load_tokenizer(part.model, path, part.trust_remote_code)
    limit = sampler.max_prompt_tokens if isinstance(sampler, HF) else 0
    prompt = limit or _longest_prompt(cfg, Renderer(tokenizer, asks.system, asks.template))
    whose = "sampler.max_prompt_tokens" if limit else f"the longest of the first {_PROMPTS}"

    def added(longest: int) -> int:
        return teacher.context.most_added(longest, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def needed(longest: int) -> int:
        return prompt + added(longest) + longest - 1  # nothing is asked about what follows the last token

    longest = cfg.training_positions
    if needed(longest) > window:
        yield (
            f"teachers.{table}.context: a prompt of {prompt} tokens ({whose}), up to {added(longest)} of other attempts and the words "
            f"around them, and an answer of up to {longest} take {needed(longest)} tokens, but the teacher's model holds {window}. "
            f"{_remedy(needed, longest, window)} teachers.{table}.context.peer_tokens, successes or failures"
            f"{', or sampler.max_prompt_tokens' if limit else ', or shorten the prompts'}."
        )


def _remedy(needed: Callable[[int], int], longest: int, window: int) -> str:
    fits = next((limit for limit in range(longest, 0, -1) if needed(limit) <= window), None)
    return "Not even answers of 1 token fit: lower" if fits is None else f"Lower sampler.max_tokens to {fits}, or lower"


def _longest_prompt(cfg: RunConfig, renderer: Renderer) -> int:
    prompts = islice(cfg.task.prompts("train", cfg.seed), _PROMPTS)
    return max((len(renderer.ids(prompt.messages)) for prompt in prompts), default=0)
