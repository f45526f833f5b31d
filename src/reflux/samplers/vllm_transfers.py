"""Weights by vLLM's own transfers between GPUs (NCCL) and within one GPU (CUDA IPC).

vLLM must be installed beside Reflux: its `WeightTransferTrainerFactory` makes the trainer's side. Written by
vLLM's documented names and tested against stand-ins; docs/gpu.md says what a first run on a GPU confirms.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from reflux.engines.process import free_port
from reflux.engines.vllm_server import VLLMServer
from reflux.errors import ConfigError, ServerError
from reflux.samplers.vllm_weights import Layout, ServedAdapter

if TYPE_CHECKING:
    from reflux.runtime.weights import Weights


class TransferDelivery:
    """The weights stay in the learner. So a server that is started again can get them only while the learner
    waits, at max_staleness = 0.
    """

    adapter: ServedAdapter | None = None

    def __init__(
        self, backend: Literal["nccl", "ipc"], layout: Layout, dtype: torch.dtype, max_staleness: int
    ):
        self.backend, self.layout, self.dtype = backend, layout, dtype
        self.max_staleness = max_staleness
        self._weights: Weights | None = None
        self._given = False
        # the server that the trainer's side is connected with
        self._connected: tuple[VLLMServer, Any] | None = None

    def take(self, weights: Weights) -> None:
        # Names and shapes are compared before anything is sent.
        for _ in self.layout.matching(weights):
            pass
        self._weights, self._given = weights, False

    async def give(self, server: VLLMServer) -> None:
        if self._weights is None:
            await server.label(0)
            return
        if self._given and self.max_staleness:
            raise ServerError(
                f'with transfer = "{self.backend}" and max_staleness above 0 a server that is started again '
                "cannot get the weights that it had. Continue the run with --resume."
            )
        self._given = True
        engine = await self._engine(server)
        await server.pause()
        try:
            await asyncio.to_thread(engine.send_weights)
        except Exception as error:
            # vLLM raises errors of its own, of torch and of requests here.
            raise ServerError(f"vLLM's transfer of weights failed: {error}") from error
        await server.label(self._weights.version)
        await server.resume(self._weights.version)

    async def _engine(self, server: VLLMServer) -> Any:
        if self._connected is None or self._connected[0] is not server:
            workers = await server.workers() if self.backend == "nccl" else 0
            self._connected = server, await asyncio.to_thread(self._connect, server.requests.url, workers)
        return self._connected[1]

    def _connect(self, url: str, workers: int) -> Any:
        """The trainer's side, connected with the server."""
        try:
            from vllm.distributed.weight_transfer import (
                HTTPVLLMWeightSyncClient,
                WeightTransferTrainerFactory,
            )
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise ConfigError(
                f'sampler.transfer = "{self.backend}" needs vLLM beside reflux ({error}). Run pip install '
                "'.[vllm]', or use transfer = \"file\"."
            ) from error
        about = (
            NCCLTrainerInitInfo("127.0.0.1", free_port(), 1 + workers, rank=0)
            if self.backend == "nccl"
            else IPCTrainerInitInfo(packed=True, rank=0)
        )
        return WeightTransferTrainerFactory.trainer_init(
            about, client=HTTPVLLMWeightSyncClient(url), source=self._source()
        )

    def _source(self) -> Any:
        """vLLM's view of the weights that were taken last."""
        from vllm.distributed.weight_transfer import ParamMeta, WeightSource

        layout, dtype = self.layout, self.dtype

        def pairs() -> Iterator[tuple[str, Tensor]]:
            assert self._weights is not None
            return ((name, value.detach().to(dtype)) for name, value in layout.matching(self._weights))

        class Source(WeightSource):
            def metadata(self) -> list[Any]:
                return [ParamMeta(name, dtype, tuple(value.shape)) for name, value in pairs()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return pairs()

        return Source()
