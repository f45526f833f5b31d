"""A server that speaks as vLLM 0.32.0 does, over a socket, with a model of a few numbers. It fails on demand
in the ways that were measured on the real one.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

VOCABULARY, WIDTH = 102, 12
# what the plain controls answer
CONTROLS: dict[str, Any] = {
    "/pause": {"status": "paused"},
    "/resume": {"status": "resumed"},
    "/reset_prefix_cache": {"success": True},
    "/init_weight_transfer_engine": {},
    "/start_weight_update": {},
    "/update_weights": {},
}


class Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def random_states(seed: int = 0) -> Callable[[list[int]], np.ndarray]:
    """Hidden states that depend on the token, the one before, and the position."""
    rng = np.random.default_rng(seed)
    token_VH, place_PH = rng.normal(size=(VOCABULARY, WIDTH)), rng.normal(size=(7, WIDTH))

    def states(ids: list[int]) -> np.ndarray:
        before = [0, *ids[:-1]]
        places = np.arange(len(ids)) % len(place_PH)
        return token_VH[ids] + 0.5 * token_VH[before] + 0.5 * place_PH[places]

    return states


def random_head(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 1000).normal(size=(VOCABULARY, WIDTH)) * 0.4


@dataclass
class FakeVLLM:
    """states(ids) are the hidden states [L, H] of a text, head_VH the output head. `faults` holds the names
    of failures for the next requests, one each ("" for none); `always` is a failure of every request.
    """

    states: Callable[[list[int]], np.ndarray] = field(default_factory=random_states)
    head_VH: np.ndarray = field(default_factory=random_head)
    # "native", "ignored" (an older server: status 200), or "refused" (400, the V1 runner without the plugin)
    given_ids: str = "native"
    hidden: bool = True
    processed: bool = True
    label: str | None = "default"
    max_logprobs: int = 20
    max_model_len: int = 512
    eos: int = 1
    token: str | None = None
    # the names that requests may give
    models: set[str] = field(default_factory=lambda: {"m", "adapter"})
    faults: deque[str] = field(default_factory=deque)
    always: str = ""
    # every answer comes so much later
    delay_s: float = 0.0
    # every request as (path, query, body), and how many were in flight at most
    served: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    most_at_once: int = 0
    # set when the server closes, for handlers that hang
    closing: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def __post_init__(self) -> None:
        self._lock, self._at_once = threading.Lock(), 0

    def paths(self) -> list[str]:
        return [path for path, _, _ in self.served]

    def bodies(self) -> list[Any]:
        return [body for path, _, body in self.served if path == "/inference/v1/generate"]

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def next_fault(self, path: str) -> str:
        if path != "/inference/v1/generate":
            return ""
        with self._lock:
            return self.faults.popleft() if self.faults else self.always

    # --- the model

    def logp(self, ids: list[int]) -> np.ndarray:
        """[L, V]: row i is the distribution after ids[: i + 1]."""
        return normalised(self.states(ids) @ self.head_VH.T)

    # --- the answers

    def answer(self, path: str, body: Any, fault: str) -> Any:
        if path == "/inference/v1/generate":
            return self.generate(body, fault)
        if path == "/finish_weight_update":
            self.label = body["weight_version"]
            return {}
        if path == "/weight_info":
            return {"weight_version": self.label}
        if path == "/health":
            return ""
        if path in CONTROLS:
            return CONTROLS[path]
        raise Refusal(404, "Not Found")

    def generate(self, body: Any, fault: str) -> Any:
        ids, params = body["token_ids"], body["sampling_params"]
        if "model" in body and body["model"] not in self.models:
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        if not ids:
            raise Refusal(400, "The prompt is empty")
        if bad := [token for token in ids if not 0 <= token < len(self.head_VH)]:
            raise Refusal(400, f"Token id {bad[0]} is out of vocabulary")
        if len(ids) > self.max_model_len:
            raise Refusal(400, f"The prompt of {len(ids)} tokens is longer than the maximum model length")
        if params.get("max_tokens", 16) < 1:
            raise Refusal(400, "max_tokens must be at least 1")
        given = self.given(ids, params, fault)
        return {
            "request_id": "generate-tokens-" + ("1" if fault == "crossed" else body.get("request_id", "1")),
            "model": "m",
            "choices": [self.choice(ids, params, fault)],
            "prompt_logprobs": self.prompt_logprobs(ids, params, fault),
            "prompt_token_id_logprobs": given,
        }

    def choice(self, ids: list[int], params: Mapping[str, Any], fault: str) -> Any:
        entries, tokens, finish, reason = [], [], "length", None
        room = min(params["max_tokens"], self.max_model_len - len(ids))
        for position in range(room):
            raw_V = self.logp([*ids, *tokens])[-1]
            token, logp_V = drawn(raw_V, params, position)
            shown_V = logp_V if self.processed else raw_V
            if fault == "nan":
                token = 0
            tokens.append(token)
            entries.append(entry(token, shown_V, params.get("logprobs", 0), fault == "nan"))
            if token == self.eos or token in params.get("stop_token_ids", ()):
                finish, reason = "stop", None if token == self.eos else token
                break
        if fault == "foreign":
            entries[0] = {**entries[0], "token_id": entries[0]["token_id"] + 1}
        if fault == "lost":
            entries = entries[:-1]
        label = self.label
        spans = None if label is None else [{"version": label, "start": 0, "end": len(tokens)}]
        return {
            "index": 0,
            "finish_reason": finish,
            "stop_reason": reason,
            "token_ids": tokens,
            "weight_versions": spans,
            "logprobs": {"content": entries},
        }

    def prompt_logprobs(self, ids: list[int], params: Mapping[str, Any], fault: str) -> Any:
        k = params.get("prompt_logprobs")
        if k is None:
            return None
        if k > self.max_logprobs:
            raise Refusal(400, f"Requested prompt logprobs of {k}, which is greater than max allowed")
        if fault == "nan":
            raise Refusal(400, "Out of range float values are not JSON compliant: nan")
        logp_LV = self.logp(ids)
        if fault == "uniform":
            logp_LV = np.full_like(logp_LV, -np.log(logp_LV.shape[1]))
        rows: list[Any] = [None]
        for token, logp_V in zip(ids[1:], logp_LV, strict=False):
            order = np.argsort(-logp_V, kind="stable").tolist()
            listed = [token, *(other for other in order[:k] if other != token)]
            rows.append({str(i): {"logprob": float(logp_V[i]), "rank": order.index(i) + 1} for i in listed})
        return rows[:-1] if fault == "short" else rows

    def given(self, ids: list[int], params: Mapping[str, Any], fault: str) -> Any:
        asked = params.get("prompt_logprob_token_ids")
        if asked is None or self.given_ids == "ignored":
            return None
        if self.given_ids == "refused":
            raise Refusal(400, "prompt_logprob_token_ids requires the V2 model runner")
        start = params.get("prompt_logprob_start", 0)
        if len(asked) != len(ids) - 1 - start:
            raise Refusal(400, f"prompt_logprob_token_ids has {len(asked)} rows")
        if self.hidden and (params.get("extra_args") or {}).get("reflux_hidden"):
            values = self.states(ids)[start:-1] * (fault != "uniform")
        else:
            values = np.take_along_axis(self.logp(ids)[start:-1], np.asarray(asked), axis=1)
            if fault == "uniform":
                values = np.full_like(values, -np.log(len(self.head_VH)))
        if fault == "nan":
            values = values * np.nan
        if fault == "swapped":
            values = values[::-1]
        if fault == "short":
            values = values[:-1]
        return None if fault == "none" else npy(values.astype(np.float32))


def fake_vllm_of(model: Any, **settings: Any) -> FakeVLLM:
    """A server with the weights of a model (`reflux.models.text.Model`) on the CPU."""
    import torch

    def states(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            made = model.trunk(input_ids=torch.tensor([ids]), use_cache=False)
        return made.last_hidden_state[0].double().numpy()

    return FakeVLLM(states=states, head_VH=model.head.matrix[0].detach().double().numpy(), **settings)


def normalised(logits_LV: np.ndarray) -> np.ndarray:
    top_L1 = logits_LV.max(-1, keepdims=True)
    return logits_LV - top_L1 - np.log(np.exp(logits_LV - top_L1).sum(-1, keepdims=True))


def drawn(logp_V: np.ndarray, params: Mapping[str, Any], position: int) -> tuple[int, np.ndarray]:
    """A token from (seed, position), and the log-probs of the distribution that it is drawn from."""
    if params.get("temperature", 1.0) == 0:
        return int(logp_V.argmax()), logp_V
    logp_V = normalised(logp_V[None] / params.get("temperature", 1.0))[0]
    order = np.argsort(-logp_V, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(np.exp(logp_V[order]))[:-1]])
    kept = order[before < params.get("top_p", 1.0)]
    kept = kept[: params["top_k"]] if params.get("top_k", 0) > 0 else kept
    logp_V = normalised(np.where(np.isin(np.arange(len(logp_V)), kept), logp_V, -np.inf)[None])[0]
    noise_V = np.random.default_rng((params["seed"], position)).gumbel(size=len(logp_V))
    return int((logp_V + noise_V).argmax()), logp_V


def entry(token: int, logp_V: np.ndarray, top: int, broken: bool) -> Any:
    order = np.argsort(-logp_V, kind="stable").tolist()

    def one(other: int) -> Any:
        value = float(logp_V[other])
        shown = -9999.0 if broken or not np.isfinite(value) else value
        return {"token_id": other, "logprob": shown, "rank": None if broken else order.index(other) + 1}

    # As many as were asked for, the sampled token among them: it takes the place of the least likely one.
    listed = [token, *(other for other in order if other != token)][: max(top, 1)]
    return {**one(token), "top_logprobs": [one(other) for other in listed]}


def npy(values: np.ndarray) -> str:
    data = io.BytesIO()
    np.save(data, values)
    return base64.b64encode(data.getvalue()).decode()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Any

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self.respond(None)

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        self.respond(json.loads(self.rfile.read(length) or b"{}"))

    def respond(self, body: Any) -> None:
        fake, parts = self.fake, urlsplit(self.path)
        fault = fake.next_fault(parts.path)
        with fake.counted():
            fake.served.append((parts.path, dict(parse_qsl(parts.query)), body))
            fake.closing.wait(fake.delay_s)
            if fake.token and self.headers.get("authorization") != f"Bearer {fake.token}":
                self.send(401, {"error": "Unauthorized"})
            elif fault == "hang":
                fake.closing.wait()
                self.close_connection = True
            elif fault == "drop":
                self.close_connection = True
            elif fault == "error":
                self.send(500, {"error": {"message": "EngineCore encountered an issue."}})
            elif fault == "busy":
                self.send(503, {"error": {"message": "overloaded"}})
            else:
                self.send_answer(parts.path, body, fault)

    def send_answer(self, path: str, body: Any, fault: str) -> None:
        try:
            self.send(200, self.fake.answer(path, body, fault), cut=fault == "cut")
        except Refusal as refusal:
            self.send(refusal.status, {"error": {"message": str(refusal), "code": refusal.status}})

    def send(self, status: int, answer: Any, cut: bool = False) -> None:
        text = json.dumps(answer).encode() if answer != "" else b""
        # a client that gave up has closed the connection
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            if text:
                self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[: len(text) // 2] if cut else text)
        if cut:
            self.close_connection = True


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@contextmanager
def serving(fake: FakeVLLM | None = None, port: int = 0) -> Iterator[FakeVLLM]:
    """The fake behind a port of this machine, chosen by the system."""
    fake = fake or FakeVLLM()
    server = Listener(("127.0.0.1", port), type("Bound", (Handler,), {"fake": fake}))
    fake.closing.clear()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        fake.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
