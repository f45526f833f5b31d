"""The fake vLLM server with a real tiny model in it, whose weights the four calls of an update replace."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fake_vllm import FakeVLLM, Refusal


class ModelFake(FakeVLLM):
    """`net` is a transformers model with a tied head. stale_head: the head stays as it was at start, as in
    vLLM 0.32 on a CPU without the plugin. refused: a path that is answered with an error, once for each
    occurrence.
    """

    def __init__(self, net: Any, *, stale_head: bool = False, refused: tuple[str, ...] = ()):
        self.net, self.stale_head, self.refused = net, stale_head, list(refused)
        self.model_lock = threading.RLock()
        super().__init__(states=self.hidden_states, head_VH=self.head(), label="default")
        self.max_logprobs = 10_000
        # of an update in progress
        self.updating = self.broken = False
        self.paused = self.asleep = False
        # answers of /reset_prefix_cache
        self.resets = True
        # set by a test that wants to look at a moment
        self.going = threading.Event()
        self.going.set()

    def head(self) -> np.ndarray:
        return self.net.get_input_embeddings().weight.detach().double().numpy()

    def hidden_states(self, ids: list[int]) -> np.ndarray:
        with self.model_lock, torch.no_grad():
            return self.net.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()

    def answer(self, path: str, body: Any, fault: str) -> Any:
        if path in self.refused:
            self.refused.remove(path)
            self.broken = path in ("/update_weights", "/finish_weight_update") or self.broken
            raise Refusal(500, "EngineCore encountered an issue.")
        with self.model_lock:
            found = self.controlled(path, body)
        if found is not None:
            return found
        if path == "/inference/v1/generate":
            self.wait_for_turn()
        return super().answer(path, body, fault)

    def wait_for_turn(self) -> None:
        while self.paused or self.asleep:
            self.closing.wait(0.005)
        if self.broken:
            raise Refusal(500, "EngineCore encountered an issue.")

    def controlled(self, path: str, body: Any) -> Any:
        """The answer to a call that changes the server; None for other calls."""
        if path == "/v1/models":
            return {"data": [{"id": "reflux", "max_model_len": self.max_model_len}]}
        if path == "/reset_prefix_cache":
            return {"success": self.resets}
        if path == "/update_weight_version":
            self.label = body["new_version"]
        elif path == "/start_weight_update":
            if self.updating:
                raise Refusal(500, "start_weight_update called while a weight update is already active.")
            self.updating = True
        elif path == "/update_weights":
            self.load(load_file(body["update_info"]["path"]))
        elif path == "/finish_weight_update":
            self.updating = False
            self.label = body["weight_version"]
            if not self.stale_head:
                self.head_VH = self.head()
        elif path in ("/pause", "/resume"):
            self.paused = path == "/pause"
        elif path in ("/sleep", "/wake_up"):
            self.asleep = path == "/sleep"
        elif path == "/v1/load_lora_adapter":
            self.models.add(body["lora_name"])
        else:
            return None
        return {}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        own = dict(self.net.named_parameters())
        if not self.updating:
            raise Refusal(500, "start_weight_update must be called before update_weights")
        with torch.no_grad():
            for name, value in weights.items():
                if own[name].shape != value.shape:
                    self.broken = True
                    raise Refusal(500, f"size of {name} differs")
                own[name].copy_(value)
