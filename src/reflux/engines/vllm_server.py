"""One vLLM server: started by the library or found, its clients, and the calls that control it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from reflux.clients.inference import InferenceClient
from reflux.engines.process import ServerProcess, free_port
from reflux.engines.vllm_command import ServerSettings, command, environment
from reflux.errors import BadAnswer, ServerError, ServerRefused

# seconds between two looks at a server that starts
_LOOK_S = 0.2
# seconds that a server may take to abort its requests before it is ended
_ABORT_S = 5.0


class VLLMServer:
    """`requests` is the client for sampling. `control` is another one, because the requests of a paused
    server would keep its calls waiting.
    """

    def __init__(
        self,
        requests: InferenceClient,
        control: InferenceClient,
        process: ServerProcess | None,
        closing: AsyncExitStack,
    ):
        self.requests, self.control, self.process, self._closing = requests, control, process, closing
        # True once the engine for weight transfers has been told to start
        self.transfers = False

    @classmethod
    async def started(
        cls,
        settings: ServerSettings,
        log: Path,
        *,
        folder: Path | None,
        concurrency: int,
        timeout_s: float,
        start_timeout_s: float,
    ) -> VLLMServer:
        """Start a server and wait until it answers. folder: removed where the library is killed. ServerError,
        with the end of the log, if it does not start.
        """
        port = free_port()
        try:
            process = await ServerProcess.start(
                command(settings, port), environment(settings, os.environ), log, folder=folder
            )
        except OSError as error:
            raise ServerError(f"the vLLM server does not start: {error}") from error
        # Failed requests are not sent again by the client: a server that has ended is first started again.
        server = await cls._opened(
            f"http://127.0.0.1:{port}", process, concurrency, timeout_s, patience_s=0.0, tries=1
        )
        try:
            await server._until_it_answers(process, start_timeout_s)
        except BaseException:
            await server.close()
            raise
        return server

    async def _until_it_answers(self, process: ServerProcess, seconds: float) -> None:
        """ServerError, with the end of the log, if no answer comes within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while process.running and not await self.answers():
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            raise ServerError(
                f"the vLLM server did not answer within {seconds:g} s. Raise sampler.start_timeout_s, or "
                f"look into {process.log}, which ends so:\n{process.tail()}"
            ) from None
        if not process.running:
            raise ServerError(
                f"the vLLM server ended while it started (exit status {process.code}). Its log is "
                f"{process.log}, which ends so:\n{process.tail()}"
            )

    @classmethod
    async def found(
        cls, url: str, token_variable: str | None, *, concurrency: int, timeout_s: float
    ) -> VLLMServer:
        """A server that somebody else has started. ServerError if it does not answer."""
        server = await cls._opened(url, None, concurrency, timeout_s, token_variable=token_variable)
        try:
            await server.requests.health()
        except BaseException:
            await server.close()
            raise
        return server

    @classmethod
    async def _opened(
        cls,
        url: str,
        process: ServerProcess | None,
        concurrency: int,
        timeout_s: float,
        *,
        patience_s: float = 300.0,
        tries: int = 3,
        token_variable: str | None = None,
    ) -> VLLMServer:
        closing = AsyncExitStack()
        both = [
            await closing.enter_async_context(
                InferenceClient(
                    url,
                    concurrency=width,
                    read_timeout_s=timeout_s,
                    patience_s=patience_s,
                    tries=tries,
                    token_variable=token_variable,
                )
            )
            for width in (concurrency, 2)
        ]
        return cls(both[0], both[1], process, closing)

    @property
    def running(self) -> bool:
        """False if its processes are known to have ended."""
        return self.process is None or self.process.running

    async def answers(self) -> bool:
        try:
            await self.control.get("/health")
        except ServerError:
            return False
        return True

    async def context_tokens(self) -> int:
        """The longest text in tokens."""
        models = await self.control.get("/v1/models")
        try:
            return int(models["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadAnswer(f"{self.requests.url}/v1/models does not tell max_model_len.") from error

    async def load_files(self, files: Sequence[Path], version: int) -> None:
        """New weights from safetensors files of the backend `reflux_file`. Requests in flight wait, and go on
        with the new weights. ServerError if any call fails; the model in the server is then broken.
        """
        if not self.transfers:
            await self.control.control("/init_weight_transfer_engine", {"init_info": {}})
            self.transfers = True
        await self.pause()
        await self._start_update()
        for file in files:
            await self.control.control("/update_weights", {"update_info": {"path": str(file)}})
        await self.control.control("/finish_weight_update", {"weight_version": str(version)})
        await self.resume(version)

    async def _start_update(self) -> None:
        try:
            await self.control.control("/start_weight_update")
        except ServerError as error:
            if "already active" not in str(error):
                raise
            # vLLM 0.32 ends where such an update is finished, and would keep a part of it otherwise.
            raise ServerError(
                "an update that another run began was never finished, because that run was killed."
            ) from error

    async def load_adapter(self, name: str, folder: Path) -> None:
        """A LoRA adapter in peft's format, in place of one of the same name."""
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        await self.control.control("/v1/load_lora_adapter", body)

    async def forget_adapter(self, name: str) -> None:
        # A server that was started again does not know it.
        with suppress(ServerRefused):
            await self.control.control("/v1/unload_lora_adapter", {"lora_name": name})

    async def pause(self) -> None:
        """Requests in flight wait, and keep what they have."""
        await self.control.control("/pause", query={"mode": "keep"})

    async def resume(self, version: int) -> None:
        """Forget what the old weights computed, and go on. ServerError where the server does not confirm both
        the reset and the version.
        """
        # A status of 200 also comes with {"success": false}: texts would then be continued from old values.
        if (await self.control.control("/reset_prefix_cache")).get("success") is not True:
            raise BadAnswer(f"{self.requests.url} did not reset its prefix cache after new weights.")
        await self.control.control("/resume")
        told = (await self.control.get("/weight_info")).get("weight_version")
        if told != str(version):
            raise BadAnswer(f"{self.requests.url} has weights of version {told} instead of {version}.")

    async def label(self, version: int) -> None:
        """Name the weights that the server has."""
        await self.control.control("/update_weight_version", {"new_version": str(version)})

    async def workers(self) -> int:
        """Number of processes that hold a part of the model."""
        return int((await self.control.get("/get_world_size"))["world_size"])

    async def sleep(self, level: int) -> None:
        await self.control.control("/sleep", query={"level": str(level)})

    async def wake(self, tags: Sequence[str]) -> None:
        """tags: "weights", "kv_cache". Requests are answered once both are awake."""
        for tag in tags:
            await self.control.control("/wake_up", query={"tags": tag})

    async def close(self) -> None:
        """End a server of the library: abort its requests, end its process, after a grace kill the group."""
        if self.process is not None and self.process.running:
            with suppress(ServerError, TimeoutError):
                async with asyncio.timeout(_ABORT_S):
                    await self.control.control("/pause", query={"mode": "abort"})
            await self.process.stop()
        await self._closing.aclose()

    async def kill(self) -> None:
        """End a server of the library that is of no more use."""
        if self.process is not None:
            await self.process.kill()
        await self._closing.aclose()
