"""The processes that share a student, as torchrun starts them, and the messages between them.

Rank 0 leads: it runs the loop and sends the others what they have to do. torchrun describes the group in the
environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without it, this process is a group of
its own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from reflux.errors import ConfigError

Value = TypeVar("Value")

# A rank waits for the next message while the others sample and evaluate, which has no limit in time.
_NEVER = timedelta(days=365)
# Seconds in which a thread that watches a rank notices its end.
_NOTICED_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RankGroup:
    """One group from `join` to `leave`. The tensors of the model go over the device's own connections (nccl
    on GPUs, else gloo). Messages go over gloo, on the CPU.
    """

    def __init__(self, device: torch.device):
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        self.messages, self._goodbyes = (
            cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_NEVER)) for _ in range(2)
        )
        # True while ranks compute together. After an error in such a time no message is expected.
        self.busy = False
        # True after an error of this process: the other ranks may end then.
        self.failed = False
        watched = range(1, self.size) if self.leads else ()
        self._watches = [threading.Thread(target=self._watch, args=(rank,), daemon=True) for rank in watched]
        for watch in self._watches:
            watch.start()

    @classmethod
    def join(cls, device: str) -> RankGroup:
        """Wait for all ranks. device: as in the recipe; of several GPUs each rank takes the one with the
        number LOCAL_RANK. ConfigError if this process already uses torch.distributed.
        """
        if dist.is_initialized():
            raise ConfigError(
                "learner.kind = 'fsdp' makes its own process group, but this process has one already. Call "
                "torch.distributed.destroy_process_group() before the run."
            )
        gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(place)
        backend = "nccl" if gpu else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        return cls(place)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def scatter(self, messages: Sequence[Any]) -> Any:
        """Send each rank its message, and return that of this rank. Only rank 0 calls it."""
        return self._scattered(list(messages))

    def receive(self) -> Any:
        """Wait for the message of rank 0."""
        return self._scattered(None)

    def _scattered(self, messages: list[Any] | None) -> Any:
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, messages, src=0, group=self.messages)
        return mine[0]

    def together(self, value: Value) -> list[Value]:
        """The values of all ranks, in the order of the ranks. All ranks call it."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.messages)
        return values

    def leave(self) -> None:
        """End the group. Rank 0 tells the others by the message None, unless they compute and do not listen.
        Another rank calls this when it has received None.
        """
        if self.leads and self.busy and self.size > 1:
            # The others notice when this process ends.
            self.failed = True
            return
        if self.leads:
            self.scatter([None] * self.size)
        else:
            dist.send(torch.zeros(1), 0, group=self._goodbyes)
        for watch in self._watches:
            watch.join()
        dist.barrier(group=self.messages)
        dist.destroy_process_group()

    def wait_for_lost_rank(self) -> None:
        """Wait, after an error while ranks computed together. If the reason is a rank that has ended, this
        process ends meanwhile, with a sentence.
        """
        for watch in self._watches[:1]:
            watch.join(_NOTICED_S)

    def _watch(self, rank: int) -> None:
        """Wait for the good-bye of a rank. If the rank ends without it, end this process at once: it may be
        in the middle of a long model call, and files are never half written.
        """
        try:
            dist.recv(torch.zeros(1), rank, group=self._goodbyes)
        except RuntimeError:
            if self.failed:
                # This process ends with an error of its own, which must be heard.
                return
            end_process(rank, self.size)


def end_process(rank: int, size: int) -> None:
    """End this process with a sentence, after another rank has ended: a part of the weights is gone."""
    sys.stderr.write(
        f"\nreflux: rank {rank} of {size} has ended, and the run ends with it. Unless it was killed, its own "
        "message is above. The last checkpoint is kept. Continue with --resume, with this number of "
        "processes or another one.\n"
    )
    sys.stderr.flush()
    os._exit(2)


def ignore_signals() -> None:
    """Leave Ctrl-C and SIGTERM to rank 0, which ends the others when its step is done."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
