"""reflux serve-oracle: a server that answers and judges by rule, for trying recipes without a model."""

from __future__ import annotations

import socket
from typing import Any

from rich.console import Console

from reflux.config.overrides import nest, split_override, unpack
from reflux.config.registry import build
from reflux.errors import ConfigError
from reflux.rewards.oracle.rule_answers import Oracle
from reflux.rewards.oracle.rule_server import RuleServer
from reflux.rewards.oracle.server import MODEL, uvicorn_server
from reflux.tasks.base import Task

console = Console()


def serve_oracle(settings: list[str], host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM. settings: `task.KEY=VALUE` for the task, by default word_problems, and
    `faults.KEY=VALUE` for the faults. port: 0 for a free one. ConfigError for other settings, for a task that
    cannot be solved by rule, and for an address that cannot be used.
    """
    table: dict[str, Any] = {"task": {"kind": "word_problems"}, "faults": {}}
    for path, value in map(split_override, settings):
        first, *rest = path.split(".")
        if first not in table or not rest:
            raise ConfigError(f"{path}: write a setting as task.KEY=VALUE or faults.KEY=VALUE")
        table[first] |= nest(rest, unpack(value), table[first])
    task: Task = build("tasks", table["task"], "task")
    endpoint: RuleServer = build("endpoints", {"kind": "local", "faults": table["faults"]}, "endpoint")
    if not task.solves:
        raise ConfigError("task.kind: this task cannot be solved by rule. Use word_problems or chains")
    server = uvicorn_server(Oracle(task, endpoint.faults), host, port, "warning")
    with _listening(host, port) as listener:
        url = f"http://{host}:{listener.getsockname()[1]}/v1"
        use = f'kind = "openai", url = "{url}", model = "{MODEL}"'
        text = f"{url}\nUse it with: {use}\nStop it with Ctrl-C."
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        server.run([listener])


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror}). Choose another --port, or 0 for a free "
            "one."
        ) from error
