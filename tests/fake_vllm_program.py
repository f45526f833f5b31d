"""A stand-in for an interpreter that has vLLM: it lists its packages, and `-m vllm.entrypoints...` serves the
fake. The model is made of numbers that depend on the weights that were loaded.

The environment variable FAKE_VLLM holds a JSON object: `calls`, a file that gets one line for each request;
`pids`, a file that gets the process ids of the server and its worker; `faults`, a table from the path of a
request to what happens at it, each once in the life of all servers that share the file `calls`: "exit" ends
the process at once, "error" is status 500; `start`, "fails" for a server that ends at its start, "silent" for
one that never answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fake_vllm import FakeVLLM, Refusal, random_head, random_states, serving

# It ignores SIGTERM, as an engine core that has lost its API server does.
WORKER = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print(1, flush=True); time.sleep(600)"
)
GENERATE = "/inference/v1/generate"


class ProgramFake(FakeVLLM):
    def __init__(self, told: dict[str, Any], arguments: dict[str, str]):
        super().__init__()
        self.told, self.arguments = told, arguments
        self.max_logprobs = 10_000
        self.max_model_len = int(arguments.get("--max-model-len", 512))
        self.awake = threading.Event()
        self.awake.set()
        self.reading = threading.Lock()

    def answer(self, path: str, body: Any, fault: str) -> Any:
        with self.reading:
            self.fail(path)
        if path == "/v1/models":
            return {"data": [{"id": "reflux", "max_model_len": self.max_model_len}]}
        if path == "/update_weights":
            self.load(Path(body["update_info"]["path"]).read_bytes())
        elif path == "/update_weight_version":
            self.label = body["new_version"]
        elif path in ("/pause", "/sleep"):
            self.awake.clear()
        elif path in ("/resume", "/wake_up"):
            self.awake.set()
        else:
            if path == GENERATE:
                self.awake.wait()
                body = {key: value for key, value in body.items() if key != "model"}
            return super().answer(path, body, fault)
        return {}

    def fail(self, path: str) -> None:
        """The next fault of this path, where there is one, and the line in the file of calls."""
        calls = Path(self.told["calls"])
        before = Counter(json.loads(line)["path"] for line in calls.read_text().splitlines())
        with calls.open("a") as file:
            file.write(json.dumps({"path": path, "pid": os.getpid()}) + "\n")
        faults = self.told.get("faults", {}).get(path, {})
        kind = faults.get(str(before[path]))
        if kind == "exit":
            os._exit(9)
        if kind == "error":
            raise Refusal(500, "EngineCore encountered an issue.")

    def load(self, content: bytes) -> None:
        seed = int.from_bytes(hashlib.sha256(content).digest()[:4], "little")
        self.states, self.head_VH = random_states(seed), random_head(seed)


def main(arguments: list[str]) -> None:
    if "-c" in arguments:
        print(os.environ["FAKE_VLLM_PACKAGES"])
        return
    told = json.loads(os.environ["FAKE_VLLM"])
    print("arguments:", *arguments, flush=True)
    if told.get("start") == "fails":
        raise SystemExit("Unsupported model")
    given = dict(pairwise(arguments))
    silent = told.get("start") == "silent"
    worker = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    worker.stdout.readline()
    with open(told["pids"], "a") as file:
        file.write(f"{os.getpid()} {worker.pid}\n")
    with nullcontext() if silent else serving(ProgramFake(told, given), port=int(given["--port"])):
        time.sleep(600)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main(sys.argv[1:])
