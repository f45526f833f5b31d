"""Attempts that were made elsewhere, from a file with their token ids and log-probs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic.dataclasses import dataclass

from reflux.config.json_rows import NOTHING
from reflux.config.registry import STRICT, PartOf
from reflux.errors import DataError
from reflux.samplers.base import Sampler
from reflux.samplers.hf import HF
from reflux.samplers.wrapping import WrappingSampler
from reflux.types import Prompt, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services
    from reflux.samplers.imported_file import AttemptFile
    from reflux.samplers.imported_prompts import Asks, Groups, Tried


@dataclass(frozen=True, config=STRICT)
class Imported(WrappingSampler):
    """Training attempts are those of a file, with the log-probs of the policy that sampled them. Evaluations
    sample from the student with `generate`.

    Each line of the file is one attempt in JSON. `response_ids`: the token ids of the response, with the
    sampled end token. `logprobs`: for each of them the log-prob in nats under the distribution it was
    sampled from (temperature and top-p applied), finite and at most 0. `mask`: true where the policy
    sampled the token, false where a tool or a template wrote it; left out: true everywhere. The prompt is
    `prompt_id` (or `id`), the id of a training prompt of the task, or `messages`, a chat that ends before
    the first turn of the policy. A prompt with messages need not be one of the task's; `answer` and
    `route` are then those of the line. Such prompts are not compared with those of evaluations: leave
    held-out ones out of the file. Optional: `prompt_ids`, the token ids of the prompt; `raw_logprobs`,
    the log-probs at temperature 1 without top-p where these are others; `version`, the policy version as
    one number or one for each token (0); `finish`, one of stop, length, max_turns, tool_error and timeout
    (by default stop where the last token ends a turn, else length); `reward`, a number for the reward
    `recorded`. Other fields are ignored. attempts.jsonl of a run can be read as it is, with log-probs
    rounded to 5 digits; its attempts have no `prompt_ids`, so the recipe must render prompts as that run
    did.

    The run trains on the prompts of the file, in an order drawn from the seed. Successive attempts of a
    prompt form groups of `group_size`. Each group is trained on once in an epoch; attempts left over at the
    end of a prompt are not used. The file is checked before the first step. In memory are only the places of
    its lines.

    The attempts are off-policy. `sampled_kl` and `policy_gradient` correct for it with the ratio p(a) /
    behaviour(a), with behaviour(a) from the file, so their ratio "none" is refused. The ratio corrects the
    choice at each visited prefix, and not which prefixes are visited. `divergence` and `nll` need no ratio.
    Parts that need lists of the most likely tokens of the policy that sampled are refused. Staleness counts
    from when the attempt was read, because versions of another run do not compare with those of this one. The
    recorded versions are in imported.jsonl of the run directory, with the line of each attempt.

    `prompt_tokens` rendered: `prompt_ids` must equal the prompt that the student's chat template renders.
    given: the student is conditioned on `prompt_ids`, whatever they are, and teachers on the messages. An
    attempt longer than `generate.max_tokens` is refused. `generate.train_max_tokens` cuts attempts as it
    would end those of the student, and a recorded reward stays that of the whole attempt.
    """

    on_policy: ClassVar[bool] = False
    recorded_logp: ClassVar[bool] = True
    brings_rewards: ClassVar[bool] = True
    rollouts: ClassVar[type[Rollout]] = TokenRollout

    # The file of attempts: JSON lines, not compressed.
    path: str
    # The sampler for evaluations. Its limits are those of the attempts.
    generate: Annotated[Sampler, PartOf("samplers", default="hf")] = HF()
    # Whether the prompts' token ids of the file must be those of the student's chat template.
    prompt_tokens: Literal["rendered", "given"] = "rendered"

    def inputs(self, where: str) -> None:
        if not Path(self.path).expanduser().is_file():
            raise DataError(
                f"{where}.path: there is no file {self.path}; {NOTHING}. It must hold one attempt per line, "
                "as JSON (docs/methods.md)."
            )

    def advice(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if not Path(self.path).expanduser().is_file():
            # `inputs` refuses it.
            return
        entries = [entry for asked in self.file.asked for entry in asked.entries]
        bare = [entry for entry in entries if not entry.rewarded]
        if bare and any(reward.reads_recorded for reward in cfg.rewards.values()):
            yield (
                f"{where}: {len(bare)} of the {len(entries)} attempts in {self.path} have no recorded reward "
                f"(the first is in line {bare[0].number}). They get no verdict."
            )
        if left := self.groups(self.tried(cfg.task, cfg.seed), cfg.group_size, cfg.seed).left_over:
            yield (
                f"{where}: {left} of the {len(entries)} attempts in {self.path} are not used, because "
                f"group_size = {cfg.group_size} does not divide the number of attempts of their prompts."
            )

    @cached_property
    def file(self) -> AttemptFile:
        """The places of the attempts. The file is read once by each process."""
        from reflux.samplers.imported_file import AttemptFile

        return AttemptFile(self.path)

    def tried(self, task: Asks, seed: int) -> list[Tried]:
        """The prompts of the file with their attempts."""
        from reflux.samplers.imported_prompts import tried

        return tried(self.file, task, seed)

    def groups(self, prompts: list[Tried], size: int, seed: int) -> Groups:
        from reflux.samplers.imported_prompts import Groups

        return Groups(prompts, size, seed)

    def training_prompts(self, cfg: RunConfig, start: int) -> Iterator[Prompt]:
        return self.groups(self.tried(cfg.task, cfg.seed), cfg.group_size, cfg.seed).stream(start)

    def check_stored(self, cfg: RunConfig) -> None:
        from reflux.samplers.imported_checks import check

        check(self.file, self.tried(cfg.task, cfg.seed), cfg, self.prompt_tokens == "given")

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.imported_engine import OpenImported

        return OpenImported.opened(self, context, services)
