"""The tasks of a taskset of the package `verifiers`, and the rewards of a text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from reflux.config.importable import importable
from reflux.errors import DataError
from reflux.tasks.verifiers_texts import first_messages, shown_tools, with_tools
from reflux.types import Message, Prompt, Reward

INSTALL = "pip install 'verifiers>=0.4,<0.5'"
# The most tasks of a taskset without an end that may be read.
_MOST = 100_000


def missing(taskset: str) -> str:
    """Why this taskset cannot be loaded, as a sentence with the remedy; "" if it may be."""
    try:
        found = version("verifiers")
    except PackageNotFoundError:
        return f"the package verifiers is not installed. Install it with: {INSTALL}"
    if not found.startswith("0.4."):
        return (
            f"verifiers {found} is installed, and only version 0.4 is supported. Install it with: {INSTALL}"
        )
    module = taskset.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_").lower()
    if not importable(module) and not importable(f"verifiers.v1.tasksets.{module}"):
        return (
            f"there is no module '{module}' of the taskset '{taskset}'. Install its package, or add the "
            "folder of the module to PYTHONPATH."
        )
    return ""


@dataclass(frozen=True)
class One:
    """One task as a prompt. `task` is the object of the package."""

    id: str
    messages: tuple[Message, ...]
    # the messages with which the environment begins: without the description of the tools
    begins: tuple[Message, ...]
    answer: str | None
    task: Any


@dataclass(frozen=True)
class Loaded:
    """The tasks of a taskset by the id of their prompt. config: the [env] block of the package."""

    taskset: str
    config: Any
    tasks: dict[str, One]
    # the tools that the student was shown, as the package describes them to a model
    tools: list[dict[str, Any]]

    def task_of(self, prompt: Prompt) -> One:
        """ValueError for a prompt of another task. In a mix and among copies an id has an ending."""
        if prompt.id not in self.tasks:
            raise ValueError(f"prompt {prompt.id} is not one of the taskset '{self.taskset}'")
        return self.tasks[prompt.id]


@lru_cache(maxsize=4)
def loaded(taskset: str, env: str, settings: str, seat: str, limit: int, turns: bool) -> Loaded:
    """The tasks of a taskset. settings: JSON of the [env] block. seat: the agent that the student plays.

    DataError for a taskset that cannot be loaded, that has no task, or whose tasks need more than this task
    has.
    """
    if why := missing(taskset):
        raise DataError(f"task verifiers: {why}")
    where = f"task verifiers: taskset '{taskset}'"
    try:
        config, found = _taskset(taskset, env, json.loads(settings), seat)
        tasks = list(_read(found, limit, where))
    except DataError:
        raise
    except Exception as error:
        # A taskset is a program of its author, and may fail in any way.
        raise DataError(f"{where} cannot be loaded ({type(error).__name__}: {error}).") from error
    if not tasks:
        raise DataError(f"{where} has no task.")
    tools = _tools(found)
    if not turns and (needs := _needs(config, tasks[0], tools)):
        raise DataError(f"{where} {needs}. Set task.turns = true.")
    ones = _numbered((_one(task, tools, where) for task in tasks), where)
    return Loaded(taskset, config, ones, tools)


def _taskset(taskset: str, env: str, settings: dict[str, Any], seat: str) -> tuple[Any, Any]:
    """The config of the environment, and the taskset."""
    import verifiers.v1 as vf

    from reflux.tasks.verifiers_harness import register

    block = {**settings, "id": env, "taskset": {**settings.get("taskset", {}), "id": taskset}}
    own = {"runtime": {"type": "subprocess"}, "harness": {"id": register()}}
    block[seat] = {**own, **block.get(seat, {})}
    config = vf.resolve_env_config(block)
    return config, vf.load_taskset(config.taskset)


def _read(taskset: Any, limit: int, where: str) -> Iterator[Any]:
    if not taskset.bounded and not limit:
        raise DataError(f"{where} has no end. Set task.limit to the number of tasks that are read.")
    for number, task in enumerate(taskset.take(limit) if limit else taskset):
        if number == _MOST:
            raise DataError(f"{where} has more than {_MOST:,} tasks. Set task.limit.")
        yield task


def _tools(taskset: Any) -> list[dict[str, Any]]:
    """The tools that the taskset and its tasks offer, in the form of chat requests."""
    kind = type(taskset).task_type()
    servers = [*taskset.toolsets(taskset.config), *kind.toolsets(taskset.config.task)]
    return _run(_listed(servers)) if servers else []


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """The result of `work`, also where an event loop runs in this thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


async def _listed(servers: Iterable[Any]) -> list[dict[str, Any]]:
    from mcp.server.mcpserver import MCPServer

    found = []
    for server in servers:
        offered = MCPServer(server.server_name or "tools")
        server.register(offered)
        for tool in await offered.list_tools():
            name = f"{server.server_name}_{tool.name}" if server.server_name else tool.name
            about = {"description": tool.description or "", "parameters": tool.input_schema}
            found.append({"type": "function", "function": {"name": name, **about}})
    return found


def _needs(config: Any, task: Any, tools: list[dict[str, Any]]) -> str:
    """What the task needs beyond a text that is judged, as the end of a sentence; "" if nothing."""
    import inspect

    import verifiers.v1 as vf

    if vf.environment_class(config.taskset.id, config.id) is not vf.SingleAgentEnv:
        return "has an environment of its own"
    if tools:
        return f"has tools ({', '.join(tool['function']['name'] for tool in tools)})"
    if type(task).setup is not vf.Task.setup or type(task).finalize is not vf.Task.finalize:
        return "prepares a sandbox for each task"
    for reward in task.hooks("reward"):
        asked = inspect.signature(reward).parameters.get("runtime")
        if asked is not None and asked.default is inspect.Parameter.empty:
            return f"has the reward '{reward.__name__}', which needs a sandbox"
    return ""


def _one(task: Any, tools: list[dict[str, Any]], where: str) -> One:
    data = task.data
    name = data.id or data.name or str(data.idx)
    typed = data.prompt if isinstance(data.prompt, list) else ()
    try:
        begins = first_messages(
            data.system_prompt, [message.model_dump() for message in typed] or data.prompt
        )
    except ValueError as error:
        raise DataError(f"{where}: task {name} {error}.") from error
    answer = data.model_dump().get("answer")
    return One(
        id=name,
        messages=with_tools(begins, shown_tools(tools)) if tools else begins,
        begins=begins,
        answer=answer if isinstance(answer, str) and answer else None,
        task=task,
    )


def _numbered(ones: Iterable[One], where: str) -> dict[str, One]:
    found: dict[str, One] = {}
    for one in ones:
        if one.id in found:
            raise DataError(
                f"{where} has two tasks with the id '{one.id}'. Ids seed the sampling, so each must be "
                "unique."
            )
        found[one.id] = one
    return found


def score(one: One, text: str) -> Reward:
    """The rewards of the task for a reply with this text. ValueError where it computes none of a text."""
    trace = _run(_scored(one, text))
    if all(reward is None for reward in trace.rewards.values()):
        raise ValueError(f"task {one.id} has no reward of a text alone. Set task.turns = true")
    return reward_of(trace)


async def _scored(one: One, text: str) -> Any:
    import verifiers.v1 as vf

    task = one.task
    known = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    parsed = [*_typed(one.begins), vf.AssistantMessage(content=text)]
    last = len(parsed) - 1
    nodes = [
        vf.MessageNode(parent=place - 1 if place else None, message=message, sampled=place == last)
        for place, message in enumerate(parsed)
    ]
    trace = vf.Trace(task=known, agent=vf.AgentInfo(config=vf.AgentConfig()), nodes=nodes)
    trace.stop("agent_completed")
    await task.score(trace)
    return trace


def _typed(messages: Iterable[Message]) -> Iterator[Any]:
    from verifiers.v1.dialects import parse_message

    return (parse_message(dict(message)) for message in messages)


def reward_of(trace: Any) -> Reward:
    """The weighted sum of the rewards of a trace, with each reward and metric as a part, unweighted."""
    parts = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
    parts |= {name: value for name, value in trace.metrics.items() if value is not None and name not in parts}
    return Reward(float(trace.reward), parts)
