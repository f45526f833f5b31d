"""The checks of a file of attempts that need the student's tokenizer and the sizes of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reflux.config.json_rows import NOTHING
from reflux.errors import DataError
from reflux.models.chat.naming import about_prompt
from reflux.models.chat.renderer import Renderer
from reflux.models.sizes import size_of
from reflux.models.text import load_tokenizer
from reflux.samplers.imported_file import AttemptFile, Entry, hash_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reflux.config.recipe import RunConfig
    from reflux.samplers.imported_prompts import Tried


def check(file: AttemptFile, prompts: Sequence[Tried], cfg: RunConfig, given: bool) -> None:
    """DataError, with the file and the line, for an attempt that this run cannot train on. given: the token
    ids of prompts in the file may differ from those of the student's template.
    """
    import numpy as np

    student, path = cfg.learner.student, "learner.model"
    tokenizer = load_tokenizer(student.model, path, student.trust_remote_code, student.base_model)
    renderer = Renderer(tokenizer, student.system, student.template, student.prompt_suffix)
    window = size_of(student.model, path, base=student.base_model).context_tokens
    checks = _Checks(file, cfg.evaluation_positions, len(tokenizer), window)
    for one in prompts:
        with about_prompt(one.prompt.id):
            ids = renderer.ids(one.prompt.messages)
        checks.group(one, cfg.group_size)
        rendered = hash_of(np.asarray(ids))
        for entry in one.entries:
            checks.entry(entry)
            if not given and entry.prompt_hash not in (None, rendered):
                checks.refuse_prompt(entry, one.prompt.id, ids)
            read = len(ids) if entry.prompt_hash in (None, rendered) else checks.prompt_length(entry)
            checks.window(entry, read)
    if any(reward.reads_recorded for reward in cfg.rewards.values()) and not any(
        entry.rewarded for one in prompts for entry in one.entries
    ):
        raise DataError(
            f"{file.where}: a reward of the recipe is the recorded one, and no line has a 'reward'; "
            f'{NOTHING}. Write it into the lines, or use kind = "verifier".'
        )


class _Checks:
    """The checks of single attempts. most: the most sampled tokens of an attempt. vocabulary: the number of
    tokens. window: tokens of the student's context window; None: not known.
    """

    def __init__(self, file: AttemptFile, most: int, vocabulary: int, window: int | None):
        self.file, self.most, self.vocabulary, self._window = file, most, vocabulary, window

    def group(self, one: Tried, size: int) -> None:
        if len(one.entries) < size:
            raise DataError(
                f"{self.file.line(one.entries[0].number)}: the prompt {one.prompt.id} has "
                f"{len(one.entries)} attempts in the file, and group_size = {size} needs as many; {NOTHING}. "
                "Add attempts, lower group_size, or leave the prompt out."
            )

    def entry(self, entry: Entry) -> None:
        if entry.largest >= self.vocabulary:
            raise DataError(
                f"{self.file.line(entry.number)} has the token id {entry.largest}, and the student's "
                f"tokenizer has the ids 0 to {self.vocabulary - 1}; {NOTHING}. The attempts must be sampled "
                "with the tokenizer of learner.model."
            )
        if entry.chosen > self.most:
            raise DataError(
                f"{self.file.line(entry.number)} has {entry.chosen} sampled tokens, and "
                f"sampler.generate.max_tokens = {self.most}; {NOTHING}. Raise it, or leave the line out."
            )

    def window(self, entry: Entry, prompt_length: int) -> None:
        if self._window is not None and prompt_length + entry.length > self._window:
            raise DataError(
                f"{self.file.line(entry.number)}: prompt and response have {prompt_length + entry.length} "
                f"tokens, and the student's context window holds {self._window}; {NOTHING}. "
                "Leave the line out."
            )

    def prompt_length(self, entry: Entry) -> int:
        tokens = self.file.read(entry).prompt_tokens
        return 0 if tokens is None else len(tokens)

    def refuse_prompt(self, entry: Entry, prompt: str, rendered: list[int]) -> None:
        tokens = self.file.read(entry).prompt_tokens
        found = [] if tokens is None else tokens.tolist()
        pairs = enumerate(zip(found, rendered, strict=False))
        at = next((at for at, (one, other) in pairs if one != other), min(len(found), len(rendered)))
        raise DataError(
            f"{self.file.line(entry.number)} has other 'prompt_ids' than the student's chat template renders "
            f"for the prompt {prompt}: {len(found)} tokens for {len(rendered)}, and they differ from "
            f"position {at} (from 0) on; {NOTHING}. Set learner.system, learner.template and "
            'learner.prompt_suffix as they were, or set sampler.prompt_tokens = "given" to train behind the '
            "tokens of the file."
        )
