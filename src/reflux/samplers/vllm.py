"""Samples texts with a vLLM server: one that the library starts, or one that runs already."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from reflux.config.registry import STRICT
from reflux.engines.plugin import FILE_BACKEND
from reflux.engines.vllm_command import LORA_RANKS, Installed, ServerSettings
from reflux.samplers.text_sampler import TextSampler

if TYPE_CHECKING:
    from reflux.config.context import PartContext
    from reflux.config.recipe import RunConfig
    from reflux.runtime.services import Services

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class VLLM(TextSampler):
    """Samples with a vLLM server. All attempts of a step are in flight at once, one request for each turn.

    mode "managed": the library starts a server on this machine, supervises it and ends it; the server never
    outlives the library. "url": a server that runs already; docs/running.md says how it must be started.
    "colocated": a managed server on the learner's GPU that gives its memory back while the student learns;
    needs max_staleness = 0.

    After each optimiser step the server gets the new weights without a restart. Requests in flight go on with
    them, and each token carries the version that it was sampled from. A managed server that ends, or in which
    an update fails, is started again with the current weights, and the lost requests are sent again.

    A request is seeded by (run seed, purpose, step, prompt, sample, turn), so a request that is sent again
    gives the same tokens. On a CPU in float32 a run then repeats; on a GPU the composition of a batch changes
    the last digits. So `deterministic` is refused with this sampler.

    The limits and the settings of sampling are those of kind "hf". At a temperature other than 1 or a top_p
    below 1 each answer is read once more, for its log-probs at temperature 1.
    """

    instead_of: ClassVar[str] = "hf"
    # Who runs the server, see above.
    mode: Literal["managed", "url", "colocated"] = "managed"
    # Address of a server that runs already, with its port and "http" or "https" before it, for mode "url".
    url: str | None = None
    # Name of the environment variable that holds the server's token, for mode "url"; not set: no token.
    token_variable: str | None = None
    # Path of the Python interpreter that has vLLM; not set: the one that runs Reflux.
    python: str | None = None
    # How weights come to the server. "file": through files in shared memory, on any device of this machine.
    # "nccl", "ipc": vLLM's own transfers between GPUs, and within one GPU. They need vLLM beside Reflux.
    transfer: Literal["file", "nccl", "ipc"] = "file"
    # Folder for the files of "file", which hold one copy of the weights; not set: shared memory.
    weights_folder: str | None = None
    # Longest text in tokens that the server is started for; 0: the student's context window.
    context_tokens: Annotated[int, Field(ge=0)] = 0
    # Requests in flight; further ones wait.
    concurrency: Annotated[int, Field(ge=1)] = 256
    # Seconds for one answer of the server.
    timeout_s: Seconds = 600.0
    # Seconds for the start of a managed server.
    start_timeout_s: Seconds = 900.0
    # Restarts of a managed server without an answer between them, after which the run ends.
    restarts: Annotated[int, Field(ge=0)] = 3
    # What a sleeping server of mode "colocated" does with its weights. 1: keeps them in host memory.
    # 2: drops them, and gets them again.
    sleep_level: Literal[1, 2] = 1
    # Share of the GPU's memory that a managed server takes.
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.9
    # GiB of the key-value cache of a managed server on a CPU.
    cache_gib: Annotated[float, Field(gt=0)] = 1.0
    # Rank of the adapters that the server takes: a LoRA student is then sent as its adapter alone, under a
    # name with its version, where the server can compute it. 0: it is sent merged, as full weights.
    lora_rank: Annotated[int, Field(ge=0, le=512)] = 0
    # Further arguments of a managed server, such as ["--tensor-parallel-size", "2"].
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.mode == "url") != (self.url is not None):
            raise ValueError(
                'mode = "url" needs the address of the server in url'
                if self.mode == "url"
                else f'url is for mode = "url", and mode is "{self.mode}". Remove one of them'
            )
        if self.token_variable and self.mode != "url":
            raise ValueError('token_variable is for mode = "url". A managed server has no token')

    @property
    def server_memory(self) -> str:
        if self.mode == "url":
            return ""
        awake = " while it is awake" if self.mode == "colocated" else ""
        return (
            f"vLLM takes {self.gpu_memory:.0%} of a GPU{awake} (sampler.gpu_memory), or on a CPU the "
            f"student's weights and {self.cache_gib:g} GiB of key-value cache (sampler.cache_gib)"
        )

    def refusals(self, where: str, cfg: RunConfig) -> Iterable[str]:
        if self.mode == "colocated" and cfg.max_staleness:
            yield (
                f'{where}: mode = "colocated" shares a device by turns, so nothing may be sampled while the '
                "student learns. Set max_staleness = 0, or use another mode."
            )
        if cfg.order == "strict" and cfg.max_staleness:
            yield (
                f'{where}: order = "strict" lets weights change between the groups of two steps only, and a '
                'server takes new weights between two tokens. Use order = "ready".'
            )
        if cfg.max_staleness and (self.temperature != 1 or self.top_p != 1):
            yield (
                f"{where}: with a temperature or top_p other than 1 each answer is read once more for its "
                "log-probs, and with max_staleness above 0 that may be with newer weights than those that "
                "sampled it. Use temperature = 1 and top_p = 1, or max_staleness = 0."
            )
        if self.lora_rank and cfg.learner.trains_all:
            yield (
                f"{where}: lora_rank = {self.lora_rank} is for a LoRA student, and the learner trains all "
                "weights. Remove it, or give the learner a lora table."
            )
        if self.lora_rank and (self.temperature != 1 or self.top_p != 1):
            yield (
                f"{where}: with lora_rank the temperature and top_p must be 1. With others each answer is "
                "read once more, and vLLM 0.32 with adapters ends at such a request. Remove lora_rank."
            )
        if self.lora_rank and cfg.extrapolation is not None:
            yield (
                f"{where}: with lora_rank the adapter alone is sent, and extrapolation changes the weights "
                "below it. Remove lora_rank, so that the student is sent merged."
            )

    @property
    def one_process_because(self) -> str:
        if self.mode != "managed":
            return f'sampler.mode = "{self.mode}" is one server, and each actor starts a server of its own'
        if self.transfer != "file":
            return f'sampler.transfer = "{self.transfer}" sends from the process of the learner'
        return ""

    @property
    def managed(self) -> bool:
        """True if the library starts the server."""
        return self.mode != "url"

    def settings(
        self, installed: Installed, model: str, dtype: str, window: int, trust_remote_code: bool
    ) -> ServerSettings:
        """Of a managed server. model: the folder that it serves. window: the context window of the model in
        tokens; 0: no limit.
        """
        return ServerSettings(
            installed=installed,
            model=model,
            dtype=dtype,
            context_tokens=min(self.context_tokens or window, window or self.context_tokens),
            transfer=FILE_BACKEND if self.transfer == "file" else self.transfer,
            cache_gib=self.cache_gib,
            gpu_memory=self.gpu_memory,
            sleeps=self.mode == "colocated",
            lora_rank=next((rank for rank in LORA_RANKS if rank >= self.lora_rank > 0), 0),
            trust_remote_code=trust_remote_code,
            arguments=self.arguments,
        )

    @property
    def exact_rng(self) -> bool:
        return False

    def open(self, context: PartContext, services: Services) -> AbstractAsyncContextManager[Any]:
        from reflux.samplers.vllm_engine import VLLMSampler

        return VLLMSampler.opened(self, context, services)
