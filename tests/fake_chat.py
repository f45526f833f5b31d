"""A server of the chat protocol over a socket. Each request gets the next answer of a script."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 7, "completion_tokens": 3}


@dataclass
class Reply:
    """One answer. text: the content of the message. body: the whole body instead of a completion."""

    text: str | None = "yes"
    status: int = 200
    body: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    finish: str = "stop"
    usage: Mapping[str, Any] | None = field(default_factory=lambda: dict(USAGE))
    delay_s: float = 0.0
    # bytes of the body after which the connection is closed
    cut: int | None = None

    def content(self) -> bytes:
        if self.body is not None:
            return self.body.encode()
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        completion = {"id": "c", "object": "chat.completion", "model": "served", "choices": [choice]}
        return json.dumps({**completion, "usage": self.usage}).encode()


def refused(status: int, message: str = "no", **headers: str) -> Reply:
    shown = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status=status, body=json.dumps({"error": {"message": message}}), headers=shown)


@dataclass
class FakeChat:
    """script: the next answers; after them `otherwise`."""

    script: deque[Reply] = field(default_factory=deque)
    otherwise: Reply = field(default_factory=Reply)
    bodies: list[Any] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    url: str = ""
    # requests in progress, and the most of them at once
    now: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def chatting(*script: Reply, otherwise: Reply | None = None) -> Iterator[FakeChat]:
    fake = FakeChat(deque(script), otherwise or Reply())

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with fake.lock:
                reply = fake.script.popleft() if fake.script else fake.otherwise
                fake.bodies.append(body)
                fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                fake.now += 1
                fake.most = max(fake.most, fake.now)
            time.sleep(reply.delay_s)
            with fake.lock:
                fake.now -= 1
            with suppress(OSError):
                self.send(reply)

        def send(self, reply: Reply) -> None:
            content = reply.content()
            self.send_response(reply.status)
            for name, value in {"content-type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: reply.cut])
            if reply.cut is not None:
                self.close_connection = True

        def log_message(self, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
