"""A context that shows other attempts must fit into the teacher's context window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from reflux.config.context import StudentSpec
from reflux.config.recipe import RunConfig
from reflux.contexts.base import Context
from reflux.models.chat.naming import about_prompt
from reflux.models.chat.renderer import Renderer
from reflux.models.sizes import size_of
from reflux.models.text import load_tokenizer

# number of training prompts whose length is measured
_PROMPTS = 64


def problems(cfg: RunConfig) -> Iterator[str]:
    """Yield a problem for each teacher whose context window is smaller than a prompt, other attempts, the
    text around these attempts and an answer together. Tokens are counted with the teacher's tokenizer.

    A prompt counts as `sampler.max_prompt_tokens`. If that is not set, it counts as the longest of
    the first 64 training prompts. Feedback, longer prompts and other attempts that have more tokens when
    their text is tokenised again are not counted here; they raise an error when they occur. A model whose
    files are not local yet is not checked. Imports transformers if a teacher is shown other attempts.
    """
    for table, teacher in cfg.teachers.items():
        reader = teacher.reader(cfg.learner.student)
        if reader is not None and teacher.context.min_group > 1:
            path = "learner.model" if teacher.is_student else f"teachers.{table}.model"
            yield from _too_narrow(cfg, table, teacher.context, reader, path)


def _too_narrow(
    cfg: RunConfig, table: str, context: Context, reader: StudentSpec, path: str
) -> Iterator[str]:
    window = size_of(reader.model, path, base=reader.base_model).context_tokens
    if window is None:
        return
    tokenizer = load_tokenizer(reader.model, path, reader.trust_remote_code, reader.base_model)
    limit = cfg.sampler.generation.max_prompt_tokens
    prompt = limit or _longest_prompt(
        cfg, Renderer(tokenizer, reader.system, reader.template, reader.prompt_suffix)
    )
    whose = "sampler.max_prompt_tokens" if limit else f"the longest of the first {_PROMPTS}"

    def added(longest: int) -> int:
        return context.most_added(
            longest, lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
        )

    def needed(longest: int) -> int:
        # minus 1, because nothing is predicted after the last token
        return prompt + added(longest) + longest - 1

    longest = cfg.training_positions
    if needed(longest) > window:
        yield (
            f"teachers.{table}.context: a prompt of {prompt} tokens ({whose}), up to {added(longest)} "
            "tokens of other attempts and the text "
            f"around them, and an answer of up to {longest} take {needed(longest)} tokens, but the context "
            f"window of the teacher's model has {window}. "
            f"{_remedy(needed, longest, window)} teachers.{table}.context.peer_tokens, successes or failures"
            f"{', or sampler.max_prompt_tokens' if limit else ', or shorten the prompts'}."
        )


def _remedy(needed: Callable[[int], int], longest: int, window: int) -> str:
    fits = next((limit for limit in range(longest, 0, -1) if needed(limit) <= window), None)
    return (
        "Even answers of 1 token do not fit. Lower"
        if fits is None
        else f"Lower sampler.max_tokens to {fits}, or lower"
    )


def _longest_prompt(cfg: RunConfig, renderer: Renderer) -> int:
    longest = 0
    for prompt in islice(cfg.task.prompts("train", cfg.seed), _PROMPTS):
        with about_prompt(prompt.id):
            longest = max(longest, len(renderer.ids(prompt.messages)))
    return longest
