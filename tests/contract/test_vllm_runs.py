"""Whole runs on the vLLM sampler: what the preflight and `reflux doctor` find in a server that takes weights
over only in part.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from contract.test_vllm_sampler import server
from reflux.errors import ConfigError, ModelError
from reflux.inspection.doctor import examine
from reflux.loop import train
from reflux.training import Options

ON: dict[str, Any] = {"task": {"kind": "outside:Chat"}, "steps": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return tuple(tiny.save(tiny.net(seed).cpu(), folder / str(seed)) for seed in (1, 2))  # type: ignore[return-value]


def config(folders: tuple[str, str], url: str, **fields: Any) -> Any:
    sampler = {"kind": "vllm", "mode": "url", "url": url, "max_tokens": 12}
    return tiny.config("opd", *folders, **{**ON, "sampler": sampler, **fields})


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_a_run_samples_from_the_weights_it_trains(
    folders: tuple[str, str], tmp_path: Path, max_staleness: int
) -> None:
    """The preflight compares sampler and learner before the first step and after the first update."""
    with server(folders[0]) as fake:
        cfg = config(folders, fake.url, skip_checks=[], max_staleness=max_staleness)
        asyncio.run(train(cfg, Options(tmp_path / "run")))
        assert fake.label == "3"
        assert fake.paths().count("/finish_weight_update") == 4
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(row["staleness_max"] for row in rows) <= max_staleness
    assert sum(row["seconds"].get("sample", 0) for row in rows) > 0
    # Four prompts a step, and eight answers of the preflight, which measures the same twice. Each has an id
    # of its own.
    asked = [json.dumps({**body, "request_id": None}) for body in fake.bodies()]
    assert (len(asked), len(set(asked))) == (3 * 4 + 2 * 8, 3 * 4 + 8)


def test_a_head_that_goes_stale_is_found_after_the_first_update(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    """The server confirms the update, and labels the tokens with the new version."""
    words = "parity, measured after the first update: the log-probs of sampler and learner"
    with server(folders[0], stale_head=True) as fake:
        cfg = config(folders, fake.url, skip_checks=[], learner__lr=1e-2)
        with pytest.raises(ModelError, match=words):
            asyncio.run(train(cfg, Options(tmp_path / "run")))


@pytest.mark.parametrize("stale", [False, True])
def test_doctor_tries_an_update(folders: tuple[str, str], stale: bool) -> None:
    async def act(url: str) -> dict[str, tuple[str, str]]:
        found = [finding async for finding in examine(config(folders, url), prompts=2)]
        return {finding.check: (finding.verdict, finding.text) for finding in found}

    with server(folders[0], stale_head=stale) as fake:
        before = {name: value.clone() for name, value in fake.net.state_dict().items()}
        found = asyncio.run(act(fake.url))
        for name, value in fake.net.state_dict().items():
            assert bool((value == before[name]).all())
    assert found["parity"][0] == "ok"
    assert found["update"][0] == ("failed" if stale else "ok")
    assert found["update"][1].startswith("after an update of all weights: the log-probs")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler__mode": "colocated", "max_staleness": 1}, "Set max_staleness = 0, or use another mode"),
        ({"sampler__lora_rank": 8}, "is for a LoRA student, and the learner trains all weights"),
        ({"deterministic": True}, "depends on timing"),
    ],
)
def test_combinations_that_cannot_work(folders: tuple[str, str], fields: dict[str, Any], words: str) -> None:
    from reflux import checks

    cfg = tiny.config("opd", *folders, **{**ON, "sampler": {"kind": "vllm"}, **fields})
    with pytest.raises(ConfigError, match=words):
        checks.join(cfg)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"mode": "url"}, 'mode = "url" needs the address'),
        ({"url": "http://h:1"}, 'url is for mode = "url", and mode is "managed"'),
        ({"token_variable": "TOKEN"}, "A managed server has no token"),
        ({"stop": [""]}, "stop has an empty text"),
        ({"max_tokens": {"kind": "linear", "start": 1, "stop": 2}}, "max_tokens is one whole number"),
    ],
)
def test_tables_that_cannot_be(folders: tuple[str, str], table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny.config("opd", *folders, **{**ON, "sampler": {"kind": "vllm", **table}})
