"""Environments of the package `verifiers` (version 0.4) as tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.errors import DataError
from reflux.tasks.base import Split, TaskPart
from reflux.tasks.lines import endless, held_out
from reflux.types import Prompt, Reward, Rollout, TokenRollout

if TYPE_CHECKING:
    from reflux.config.recipe import RunConfig
    from reflux.rollouts.environment import Environment
    from reflux.tasks.verifiers_data import Loaded


@dataclass(frozen=True, config=STRICT)
class Verifiers(TaskPart):
    """Tasks of the package `verifiers` (version 0.4): their prompts and rewards, and with `turns` their
    environment.

    The package is installed with `pip install 'reflux[env]'`. It wants other versions of some packages than a
    trainer may need, so give it an environment of its own. `taskset` is the id of an installed taskset: the
    name of its package or module. `env` is the id of an environment that plays it; "": that of the taskset.
    `settings` is the [env] block of `verifiers` without these ids, such as {taskset = {split = "train"}}.

    The prompt is the system prompt and the prompt of each task. Its id is the task's own id, else its number.
    A verdict is the weighted sum of the task's rewards; single rewards and metrics are its parts.

    `turns` false: a prompt is answered in one turn, and the rewards are computed from that text, in a worker
    process. A task whose rewards need a sandbox, or that has tools, is refused. `turns` true: each attempt is
    an episode of the environment, and the student plays the seat `agent`. Tokens and masks are kept by this
    library: the environment sees texts. Its verdict is the reward of kind `environment`; evaluations, which
    judge texts, give none. The tools of the taskset are described in the system message, and the student
    calls them as <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Each attempt starts the tool
    servers of its task, which takes seconds: raise `sampler.environment_timeout_s` where it is not enough.
    The seat has an own loop in this process in place of a harness, unless `settings` names one; its
    programs run on this machine, unless `settings` names another runtime. Other seats need a `client` and a
    `model` in `settings`. An environment is refused while it runs if it does not begin with the prompt of its
    task, if it rewrites earlier turns, or if it shows images.

    validation: the share of the tasks that is held out, by a hash of their ids; "test" is the same. limit:
    read only so many tasks; needed for tasksets without an end. "train" never ends: a new order in each
    epoch.
    """

    taskset: str
    env: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    # True if each attempt is an episode of the environment.
    turns: bool = False
    # The seat of the environment that the student plays.
    agent: str = "agent"
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.05
    # The most tasks that are read; 0: all.
    limit: Annotated[int, Field(ge=0)] = 0
    # Selects the teacher.
    route: str | None = None
    # The share of this task in a `mix`.
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def __post_init__(self) -> None:
        try:
            json.dumps(self.settings)
        except TypeError as error:
            raise ValueError(f"settings holds a value that is no plain one ({error})") from error
        for key in ("id", "taskset"):
            own = self.settings if key == "id" else self.settings.get("taskset", {})
            if "id" in own:
                where = "settings.id" if key == "id" else "settings.taskset.id"
                raise ValueError(f"{where} is given by `{'env' if key == 'id' else 'taskset'}`. Remove it")

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that judges loads the package when it gets the task. In the time limit of a verdict there
        # would be no room for that.
        return _restored, (
            self.taskset,
            self.env,
            self.settings,
            self.turns,
            self.agent,
            self.validation,
            self.limit,
            self.route,
            self.weight,
        )

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        from reflux.tasks.verifiers_data import missing

        if why := missing(self.taskset):
            yield f"{where}: {why}"
        if not self.turns:
            return
        for name, evaluation in cfg.evals.items():
            if evaluation.verifies:
                yield (
                    f"evals.{name} judges texts, and with {where}.turns = true only the environment judges, "
                    f"at the end of an episode. Remove it with evals.{name}=none."
                )

    @property
    def judges(self) -> bool:
        return not self.turns

    @property
    def ends(self) -> bool | None:
        return True

    @property
    def multi_turn(self) -> bool:
        return self.turns

    @property
    def rollouts(self) -> type[Rollout]:
        return TokenRollout

    @property
    def routes(self) -> frozenset[str | None]:
        return frozenset([self.route])

    def prompts(self, split: Split, seed: int, start: int = 0) -> Iterator[Prompt]:
        found = [
            Prompt(one.id, one.messages, answer=one.answer, route=self.route)
            for one in self._loaded().tasks.values()
        ]
        wanted = split != "train"
        prompts = [prompt for prompt in found if held_out(prompt, self.validation) == wanted]
        if not prompts:
            raise DataError(
                f"task verifiers: none of the {len(found)} tasks of '{self.taskset}' is left for the split "
                f"'{split}' at validation = {self.validation}. Choose another share."
            )
        return iter(prompts[start:]) if wanted else endless(prompts, seed, start)

    def verify(self, prompt: Prompt, made: Any) -> Reward:
        """The weighted sum of the task's rewards of the text `made`. ValueError with `turns`, and where no
        reward can be computed from a text.
        """
        if self.turns:
            raise ValueError("with turns = true only the environment judges, at the end of an episode")
        from reflux.tasks.verifiers_data import score

        return score(self._loaded().task_of(prompt), made)

    def open_env(self, prompt: Prompt, step: int) -> Environment | None:
        if not self.turns:
            return None
        from reflux.tasks.verifiers_episode import Episode

        loaded = self._loaded()
        return Episode(loaded, loaded.task_of(prompt), self.agent)

    def _loaded(self) -> Loaded:
        from reflux.tasks.verifiers_data import loaded

        settings = json.dumps(self.settings, sort_keys=True)
        return loaded(self.taskset, self.env, settings, self.agent, self.limit, self.turns)


def _restored(*fields: Any) -> Verifiers:
    """The task in another process."""
    from reflux.tasks.verifiers_data import missing

    task = Verifiers(*fields)
    if not task.turns and not missing(task.taskset):
        next(task.prompts("train", 0))
    return task
