"""A server that speaks SGLang's native `/generate` as its documentation and source describe it, for scoring:
lists of (log-prob, id, text) from `logprob_start_len` on, the first of them empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fake_vllm import FakeVLLM, Refusal


@dataclass
class FakeSGLang(FakeVLLM):
    """`faults` and `always` also know "short" (an entry too few) and "other" (another text's answer)."""

    def next_fault(self, path: str) -> str:
        return super().next_fault("/inference/v1/generate") if path == "/generate" else ""

    def answer(self, path: str, body: Any, fault: str) -> Any:
        if path != "/generate":
            raise Refusal(404, "Not Found")
        ids, start = body["input_ids"], body["logprob_start_len"]
        assert body["return_logprob"]
        rows = self.logp(ids)[start:-1]
        if fault == "nan":
            rows = rows * np.nan
        shift = int(fault == "foreign")
        top = body.get("top_logprobs_num", 0)
        meta = {
            "prompt_tokens": len(ids) + (fault == "other"),
            "weight_version": self.label,
            "input_token_logprobs": [
                [None, ids[start], None],
                *(
                    [float(row[token]), token + shift, None]
                    for row, token in zip(rows, ids[start + 1 :], strict=True)
                ),
            ],
        }
        if top:
            best = [np.argsort(-row, kind="stable")[:top] for row in rows]
            meta["input_top_logprobs"] = [None, *map(triples, rows, best)]
        if (asked := body.get("token_ids_logprob")) is not None:
            meta["input_token_ids_logprobs"] = [None, *(triples(row, asked) for row in rows)]
        if fault == "short":
            meta = {name: kept[:-1] if isinstance(kept, list) else kept for name, kept in meta.items()}
        return {"text": "", "meta_info": meta}


def triples(row: np.ndarray, ids: Any) -> list[list[Any]]:
    return [[float(row[token]), int(token), None] for token in ids]
