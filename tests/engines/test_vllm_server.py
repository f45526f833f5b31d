"""How vLLM is started: what its interpreter must have, its command, and how the server ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fake_python import PACKAGES, FakePython, fake_python
from processes import alive, wait_for
from reflux import __version__
from reflux.clients.inference import GenerateRequest
from reflux.engines.vllm_command import Installed, ServerSettings, command, environment, installed_in
from reflux.engines.vllm_server import VLLMServer
from reflux.errors import ConfigError, ServerError

CPU = Installed("python", "0.32.0", cpu=True)
GPU = Installed("python", "0.32.0", cpu=False)
# Starts a server and leaves requests in flight: the server is paused.
LIBRARY = """
import asyncio, sys
from pathlib import Path
from reflux.clients.inference import GenerateRequest
from reflux.engines.vllm_command import ServerSettings, installed_in
from reflux.engines.vllm_server import VLLMServer

async def main():
    folder = Path(sys.argv[2])
    settings = ServerSettings(installed=installed_in(sys.argv[1], "k"), model="m", dtype="float32")
    limits = dict(concurrency=8, timeout_s=600, start_timeout_s=200)
    server = await VLLMServer.started(settings, folder / "log", folder=None, **limits)
    await server.pause()
    asks = [GenerateRequest(token_ids=[5, 6], max_tokens=3, seed=seed) for seed in range(8)]
    tasks = [asyncio.create_task(server.requests.generate(ask)) for ask in asks]
    await asyncio.sleep(1)
    (folder / "flying").touch()
    await asyncio.gather(*tasks)

asyncio.run(main())
"""


async def started(python: FakePython, folder: Path, start_timeout_s: float = 100, **more: Any) -> VLLMServer:
    settings = ServerSettings(
        installed=installed_in(python.path, "sampler.python"), model="m", dtype="float32", **more
    )
    return await VLLMServer.started(
        settings, folder / "log", folder=None, concurrency=4, timeout_s=100, start_timeout_s=start_timeout_s
    )


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        ((None, None, None, []), "has no vLLM. `make vllm` makes"),
        ((None, "0.32.0", None, []), f"has no reflux, and its vLLM needs the plugin of reflux {__version__}"),
        ((None, "0.32.0", "0.0.1", PACKAGES[3]), r"has reflux 0\.0\.1, and its vLLM needs"),
        ((None, "0.32.0", __version__, []), "Install it there without its dependencies"),
    ],
)
def test_an_interpreter_that_lacks_something(tmp_path: Path, packages: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        installed_in(fake_python(tmp_path, packages=packages).path, "sampler.python")


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sampler\.python: there is no program /no/python"):
        installed_in("/no/python", "sampler.python")
    with pytest.raises(ConfigError, match="is no Python interpreter that works"):
        installed_in("false", "sampler.python")


def test_both_builds_are_known(tmp_path: Path) -> None:
    cpu = fake_python(tmp_path / "cpu")
    gpu = fake_python(tmp_path / "gpu", packages=("0.33.0", None, *PACKAGES[2:]))
    assert installed_in(cpu.path, "k") == Installed(cpu.path, "0.32.0", cpu=True)
    assert installed_in(gpu.path, "k") == Installed(gpu.path, "0.33.0", cpu=False)


def test_prompts_are_read_whole_on_a_cpu() -> None:
    """A seeded request whose prompt is read in chunks ends the engine of a CPU server."""

    def told(**fields: Any) -> list[str]:
        return command(ServerSettings(model="m", dtype="float32", **fields), 9)

    long = told(installed=CPU, context_tokens=9000)
    assert "--no-enable-chunked-prefill" in long
    assert int(long[long.index("--max-num-batched-tokens") + 1]) >= 9000
    assert "--no-enable-chunked-prefill" not in told(installed=GPU)
    plain = told(installed=GPU)
    assert plain[plain.index("--host") + 1] == "127.0.0.1"
    assert plain[plain.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert {"--enable-sleep-mode", "--enable-lora"}.isdisjoint(plain)
    assert {"--enable-sleep-mode", "--enable-lora"} <= {*told(installed=GPU, sleeps=True, lora_rank=8)}


def test_the_environment_of_a_server() -> None:
    settings = ServerSettings(installed=CPU, model="m", dtype="float32", cache_gib=2)
    base = {"PYTHONPATH": "here", "VLLM_PLUGINS": "", "VLLM_SERVER_DEV_MODE": "0", "OMP_NUM_THREADS": "1"}
    made = environment(settings, base)
    assert "PYTHONPATH" not in made
    assert "VLLM_PLUGINS" not in made
    assert made["VLLM_SERVER_DEV_MODE"] == "1"
    assert made["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert made["OMP_NUM_THREADS"] == "1"
    assert environment(settings, {"VLLM_CPU_KVCACHE_SPACE": "4"})["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in made


def test_a_server_answers_and_leaves_nothing(tmp_path: Path) -> None:
    python = fake_python(tmp_path)

    async def act() -> int:
        server = await started(python, tmp_path)
        answer = await server.requests.generate(GenerateRequest(token_ids=[5, 6], max_tokens=3, seed=1))
        assert all(map(alive, python.processes()))
        assert await server.context_tokens() == 512
        await server.close()
        return len(answer.tokens_T)

    assert asyncio.run(act()) > 0
    assert len(python.processes()) == 2
    assert not any(map(alive, python.processes()))


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(
        ServerError, match=r"ended while it started \(exit status 1\)[\s\S]*Unsupported model"
    ):
        asyncio.run(started(fake_python(tmp_path, start="fails"), tmp_path))


def test_a_server_that_never_answers_is_ended(tmp_path: Path) -> None:
    python = fake_python(tmp_path, start="silent")
    words = r"did not answer within 10 s\. Raise sampler\.start_timeout_s[\s\S]*arguments: "
    with pytest.raises(ServerError, match=words):
        asyncio.run(started(python, tmp_path, start_timeout_s=10))
    assert len(python.processes()) == 2
    assert not any(map(alive, python.processes()))


def test_requests_in_flight_do_not_keep_a_paused_server_from_its_control(tmp_path: Path) -> None:
    """More requests than the client sends at once wait while the server is paused."""
    python = fake_python(tmp_path)

    async def act() -> int:
        server = await started(python, tmp_path)
        await server.pause()
        asks = [GenerateRequest(token_ids=[5, 6], max_tokens=3, seed=seed) for seed in range(20)]
        tasks = [asyncio.create_task(server.requests.generate(ask)) for ask in asks]
        while python.calls().count("/inference/v1/generate") < 4:
            await asyncio.sleep(0.01)
        await server.label(3)
        await server.resume(3)
        found = await asyncio.gather(*tasks)
        await server.close()
        return len(found)

    assert asyncio.run(act()) == 20


def test_a_library_that_is_killed_with_requests_in_flight(tmp_path: Path) -> None:
    python = fake_python(tmp_path)
    library = subprocess.Popen(
        [sys.executable, "-c", LIBRARY, python.path, str(tmp_path)],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
    )
    wait_for((tmp_path / "flying").exists)
    assert len(python.processes()) == 2
    assert all(map(alive, python.processes()))
    library.kill()
    library.wait()
    wait_for(lambda: not any(map(alive, python.processes())))
