"""The rows that the plugin takes from vLLM's model runners, with stand-ins for the runners."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from reflux.engines import plugin
from reflux.engines.plugin.cpu_rows import CpuRows
from reflux.engines.plugin.gpu_rows import HiddenRows, _adding, _computing

WIDTH, VOCABULARY = 4, 7
rng = torch.Generator().manual_seed(0)
HEAD_VH = torch.randn(VOCABULARY, WIDTH, generator=rng)


def states_of(length: int) -> torch.Tensor:
    return torch.randn(length, WIDTH, generator=torch.Generator().manual_seed(length))


def request(length: int, start: int | None, ids: Any, done: int = 0, hidden: bool = False) -> Any:
    params = SimpleNamespace(
        prompt_logprob_token_ids=None if ids is None else np.asarray(ids, dtype=np.int32),
        prompt_logprob_start=start,
        extra_args={"reflux_hidden": 1} if hidden else None,
    )
    return SimpleNamespace(
        sampling_params=params, prompt_token_ids=list(range(length)), num_computed_tokens=done
    )


def runner(requests: dict[str, Any], starts: list[int]) -> Any:
    return SimpleNamespace(
        requests=requests,
        input_batch=SimpleNamespace(req_id_to_index={name: row for row, name in enumerate(requests)}),
        query_start_loc=SimpleNamespace(np=np.asarray(starts)),
        model=SimpleNamespace(compute_logits=lambda h_NH: h_NH @ HEAD_VH.T),
    )


def expected(states: torch.Tensor, start: int, ids: Any) -> torch.Tensor:
    logp_LV = (states @ HEAD_VH.T).log_softmax(-1)[start : len(states) - 1]
    ids_RK = torch.tensor(ids)
    return logp_LV.gather(-1, ids_RK.clamp_min(0)).masked_fill(ids_RK < 0, -torch.inf)


def test_rows_of_two_prompts_in_one_step() -> None:
    one, other = states_of(5), states_of(3)
    ids = {"a": [[1, 2], [3, -1]], "b": [[4], [5]]}
    requests = {"a": request(5, 2, ids["a"]), "b": request(3, None, ids["b"]), "c": request(3, None, None)}
    rows = CpuRows()
    rows.add(runner(requests, [0, 5, 8]), torch.cat([one, other, states_of(3)]), {"a": 5, "b": 3, "c": 3})
    assert sorted(rows.complete) == ["a", "b"]
    torch.testing.assert_close(rows.complete["a"], expected(one, 2, ids["a"]))
    torch.testing.assert_close(rows.complete["b"], expected(other, 0, ids["b"]))
    assert rows.unfinished == {}


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("cuts", [(0, 6), (0, 1, 6), (0, 3, 4, 6), (0, 5, 6)])
def test_rows_of_a_prompt_in_chunks(cuts: tuple[int, ...], hidden: bool) -> None:
    states, ids, start = states_of(6), [[1], [2], [3]], 2
    rows, found = CpuRows(), None
    for low, high in pairwise(cuts):
        assert found is None
        asked = request(6, start, ids, done=low, hidden=hidden)
        rows.add(runner({"a": asked}, [0]), states[low:high], {"a": high - low})
        found = rows.complete.get("a")
    assert found is not None
    torch.testing.assert_close(found, states[2:5] if hidden else expected(states, start, ids))


def test_rows_that_came_from_the_cache_are_not_answered() -> None:
    rows = CpuRows()
    for low, high in ((3, 5), (5, 6)):
        rows.add(
            runner({"a": request(6, 2, [[1], [2], [3]], done=low)}, [0]),
            states_of(6)[low:high],
            {"a": high - low},
        )
        assert rows.complete == {}
    rows.add(runner({}, []), states_of(1), {})
    assert rows.given_up == set()


def test_a_request_that_is_gone_is_forgotten() -> None:
    rows = CpuRows()
    rows.add(runner({"a": request(6, 0, [[1]] * 5)}, [0]), states_of(2), {"a": 2})
    assert list(rows.unfinished) == ["a"]
    rows.add(runner({}, []), states_of(1), {})
    assert rows.unfinished == {}


def test_answering_a_token_takes_no_rows() -> None:
    rows = CpuRows()
    rows.add(runner({"a": request(6, 0, [[1]] * 5, done=6)}, [0]), states_of(1), {"a": 1})
    assert rows.complete == {}
    assert rows.unfinished == {}


class GpuWorker:
    """As vLLM's: a table by request, and rows of log-probs; here the answer is one number."""

    def __init__(self) -> None:
        self.token_id_scores: dict[str, Any] = {}

    def add_request(self, req_id: str, req_idx: int, sampling_params: Any) -> None:
        ids = sampling_params.prompt_logprob_token_ids
        if ids is not None:
            of_ids = SimpleNamespace(token_ids=torch.tensor(ids), start=sampling_params.prompt_logprob_start)
            self.token_id_scores[req_id] = of_ids

    def compute(self, logits_fn: Any, states: Any, batch: Any, prompt_lens: Any) -> dict[str, Any]:
        assert not any(isinstance(state, HiddenRows) for state in self.token_id_scores.values())
        return {name: "log-probs" for name in batch.req_ids if name in self.token_id_scores}


def batch_of(rows: dict[str, tuple[int, int]], lengths: list[int]) -> Any:
    """name -> positions computed before, and in this step."""
    counts = [count for _, count in rows.values()]
    return SimpleNamespace(
        req_ids=list(rows),
        idx_mapping_np=np.arange(len(rows)),
        num_computed_prefill_tokens_np=np.asarray([done for done, _ in rows.values()]),
        num_scheduled_tokens=np.asarray(counts),
        query_start_loc_np=np.concatenate([[0], np.cumsum(counts)]),
        prefill_len_np=np.asarray(lengths),
    )


def test_hidden_states_on_the_second_runner() -> None:
    worker, states = GpuWorker(), states_of(6)
    add, compute = _adding(GpuWorker.add_request), _computing(GpuWorker.compute)
    add(worker, "a", 0, request(6, 1, [[0]] * 4, hidden=True).sampling_params)
    add(worker, "b", 1, request(2, 0, [[0]]).sampling_params)
    add(worker, "c", 2, request(2, None, None).sampling_params)
    lengths = np.asarray([6, 2, 2])
    first = batch_of({"a": (0, 3), "b": (0, 2)}, [6, 2])
    assert compute(worker, None, torch.cat([states[:3], states_of(2)]), first, lengths) == {"b": "log-probs"}
    assert isinstance(worker.token_id_scores["a"], HiddenRows)
    found = compute(worker, None, states[3:], batch_of({"a": (3, 3)}, [6]), lengths)
    torch.testing.assert_close(found["a"], states[1:5])
    assert "a" not in worker.token_id_scores


def test_hidden_states_that_came_from_the_cache_are_not_answered() -> None:
    worker = GpuWorker()
    _adding(GpuWorker.add_request)(worker, "a", 0, request(6, 1, [[0]] * 4, hidden=True).sampling_params)
    late = batch_of({"a": (2, 4)}, [6])
    assert _computing(GpuWorker.compute)(worker, None, states_of(6)[2:], late, np.asarray([6])) == {}
    assert worker.token_id_scores == {}


def test_the_plugin_imports_nothing_of_reflux_but_itself() -> None:
    """vLLM loads it into every process."""
    folder = Path(plugin.__file__).parent
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert all(
                not name.startswith("reflux")
                or name == "reflux.engines.plugin"
                or name.startswith("reflux.engines.plugin.")
                for name in names
            )
