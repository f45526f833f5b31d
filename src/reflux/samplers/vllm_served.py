"""The server of one sampler, with the student's weights in it: opened, updated, put to sleep and closed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reflux.clients.probe import logprobs_mode, probed_ids
from reflux.engines.supervisor import Supervisor
from reflux.engines.vllm_server import VLLMServer
from reflux.errors import ModelError
from reflux.models.sizes import size_of
from reflux.samplers.vllm_adapters import AdapterDelivery
from reflux.samplers.vllm_files import ServedModel, served_model
from reflux.samplers.vllm_transfers import TransferDelivery
from reflux.samplers.vllm_weights import Delivery, FileDelivery, Layout, shared_folder

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.engines.vllm_command import ServerSettings
    from reflux.runtime.services import Services
    from reflux.runtime.weights import Weights
    from reflux.samplers.vllm import VLLM

# the context window of a model without a limit
_NO_LIMIT = 1 << 30


class Served:
    """folder: of weight files. The server's watcher removes it where the library is killed."""

    def __init__(self, cfg: VLLM, services: Services, folder: Path, delivery: Delivery):
        self.cfg, self.services, self.folder, self.delivery = cfg, services, folder, delivery
        # set by `open`
        self.supervisor: Supervisor
        self.context_tokens = 0
        # of mode "colocated": attempts in progress, and whether the server sleeps and has old weights
        self._acting, self._asleep, self._stale = 0, False, False
        self._turning = asyncio.Lock()
        # True once a server that somebody else has started is known to report the right log-probs
        self._proved = cfg.managed

    @classmethod
    async def open(cls, cfg: VLLM, context: PartContext, services: Services, stack: AsyncExitStack) -> Served:
        """stack: closes what is opened. Errors of the server, ConfigError where vLLM is not installed."""
        model = await services.run_model(served_model, cfg.managed, cfg.python, cfg.dtype, context)
        folder = stack.enter_context(shared_folder(cfg.weights_folder))
        served = cls(cfg, services, folder, delivery_of(cfg, context, model, folder))
        if model.installed is not None:
            window = size_of(str(model.folder), "learner.model").context_tokens or 0
            trusted = context.student.trust_remote_code
            settings = cfg.settings(model.installed, str(model.folder), model.dtype_name, window, trusted)
            start = partial(served._started, settings, context.folder / "server.log")
        else:
            start = served._found
        served.supervisor = Supervisor(
            start, served.delivery.give, cfg.restarts if cfg.managed else None, services.listener.noted
        )
        stack.push_async_callback(served.supervisor.close)
        server = await served.supervisor.open()
        own = size_of(context.student.model, "learner.model", base=context.student.base_model).context_tokens
        # An answer that is read once more needs room for the token that the server samples in vain.
        served.context_tokens = min(own or _NO_LIMIT, await server.context_tokens()) - 1
        return served

    async def _started(self, settings: ServerSettings, log: Path) -> VLLMServer:
        began = time.perf_counter()
        server = await VLLMServer.started(
            settings,
            log,
            folder=self.folder,
            concurrency=self.cfg.concurrency,
            timeout_s=self.cfg.timeout_s,
            start_timeout_s=self.cfg.start_timeout_s,
        )
        device = "a CPU" if settings.installed.cpu else "the GPU"
        self.services.listener.noted(
            f"vLLM {settings.installed.version} serves the student on {device}, started in "
            f"{time.perf_counter() - began:.0f} s"
        )
        self._asleep = self._stale = False
        return server

    async def _found(self) -> VLLMServer:
        return await VLLMServer.found(
            self.cfg.url or "",
            self.cfg.token_variable,
            concurrency=self.cfg.concurrency,
            timeout_s=self.cfg.timeout_s,
        )

    async def publish(self, weights: Weights) -> None:
        """Give the server these weights, or remember them for a server that sleeps."""
        await self.services.run_model(self.delivery.take, weights)
        if self._asleep:
            self._stale = True
            return
        await self.supervisor.change(self.delivery.give)
        if not self._proved:
            await self._prove()

    async def _prove(self) -> None:
        """ModelError for a server whose log-probs are not those of the distribution that it samples from.

        This is measured after the first update. A run that was killed may have left the server paused, or
        with half of its weights replaced, and then it answers only after an update.
        """
        adapter = self.delivery.adapter
        client = (await self.supervisor.ready()).requests
        ids = probed_ids(self.services.tokenizer)
        mode = await logprobs_mode(client, ids, None if adapter is None else adapter.name)
        if mode in ("raw", "other"):
            what = "the model's own log-probs" if mode == "raw" else "numbers that are no log-probs"
            raise ModelError(
                f"sampler: the server at {client.url} reports {what} instead of those of the distribution "
                "that it samples from. Start it with --logprobs-mode processed_logprobs."
            )
        self._proved = True

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Inside, the server answers. In mode "colocated" it sleeps while no attempt is in progress."""
        if self.cfg.mode != "colocated":
            yield
            return
        self._acting += 1
        try:
            async with self._turning:
                if self._asleep:
                    await self.supervisor.change(self._wake)
            yield
        finally:
            self._acting -= 1
            if not self._acting:
                async with self._turning:
                    # A server that is replaced because it could not sleep is awake.
                    while not self._acting and not self._asleep:
                        await self.supervisor.change(self._sleep)

    async def _wake(self, server: VLLMServer) -> None:
        """Where the weights were dropped or are old, they come before the memory of the cache."""
        renewed = self._stale or self.cfg.sleep_level == 2
        await server.wake(["weights"])
        if renewed:
            await self.delivery.give(server)
        await server.wake(["kv_cache"])
        self._asleep = self._stale = False

    async def _sleep(self, server: VLLMServer) -> None:
        await server.sleep(self.cfg.sleep_level)
        self._asleep = True


def delivery_of(cfg: VLLM, context: PartContext, model: ServedModel, folder: Path) -> Delivery:
    layout = Layout.of(model.folder)
    if cfg.transfer != "file":
        return TransferDelivery(cfg.transfer, layout, model.dtype, context.numbers.max_staleness)
    files = FileDelivery(folder, layout, model.dtype)
    return AdapterDelivery(folder, files, context.numbers.max_staleness) if cfg.lora_rank else files
