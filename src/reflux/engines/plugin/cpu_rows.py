"""`prompt_logprob_token_ids` and hidden states on vLLM's first model runner, the one of CPUs.

Row i of an answer belongs to the state at position `prompt_logprob_start + i`, which predicts the token after
it. The last position of the prompt has no row. The prompt may be computed in several chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reflux.engines.plugin import HIDDEN


@dataclass
class Wanted:
    """One request and its rows so far."""

    # int, [rows, K]; -1 is padding
    ids_RK: Any
    # position of the first row
    start: int
    hidden: bool
    # float32, [rows, K] or [rows, H]; None before the first chunk
    rows: Any = None


class CpuRows:
    """The rows of all requests of one worker."""

    def __init__(self) -> None:
        self.unfinished: dict[str, Wanted] = {}
        # requests whose rows can never be complete
        self.given_up: set[str] = set()
        # rows that were completed in the current step
        self.complete: dict[str, Any] = {}

    def add(self, runner: Any, hidden_states: Any, scheduled: Mapping[str, int]) -> None:
        """Take the rows that this step of `runner` computed. scheduled: number of positions by request."""
        self.complete = {}
        for gone in self.unfinished.keys() - runner.requests.keys():
            del self.unfinished[gone]
        self.given_up &= runner.requests.keys()
        for name, count in scheduled.items():
            request = runner.requests[name]
            done, length = request.num_computed_tokens, len(request.prompt_token_ids or ())
            if name in self.given_up or done >= length:
                continue
            wanted = self.unfinished.get(name) or _wanted(request.sampling_params)
            if wanted is None:
                continue
            if wanted.rows is None and done > wanted.start:
                # Its first rows were read from the prefix cache, so they are not computed.
                self.given_up.add(name)
                continue
            self.unfinished[name] = wanted
            low, high = max(wanted.start, done), min(done + count, length - 1)
            if low < high:
                row = runner.input_batch.req_id_to_index[name]
                first = runner.query_start_loc.np[row].item() - done
                states = hidden_states[first + low : first + high]
                _fill(wanted, slice(low - wanted.start, high - wanted.start), states, runner.model)
            if done + count >= length:
                self.complete[name] = self.unfinished.pop(name).rows


def _wanted(params: Any) -> Wanted | None:
    if params is None or params.prompt_logprob_token_ids is None:
        return None
    hidden = bool((params.extra_args or {}).get(HIDDEN))
    return Wanted(params.prompt_logprob_token_ids, params.prompt_logprob_start or 0, hidden)


def _fill(wanted: Wanted, rows: slice, states: Any, model: Any) -> None:
    import torch

    if wanted.rows is None:
        width = states.shape[-1] if wanted.hidden else wanted.ids_RK.shape[1]
        wanted.rows = torch.empty(len(wanted.ids_RK), width, dtype=torch.float32)
    if wanted.hidden:
        wanted.rows[rows] = states.float().cpu()
        return
    logp_RV = model.compute_logits(states).float().log_softmax(-1)
    ids_RK = torch.as_tensor(wanted.ids_RK[rows].copy(), dtype=torch.int64, device=logp_RV.device)
    found_RK = logp_RV.gather(-1, ids_RK.clamp_min(0))
    wanted.rows[rows] = found_RK.masked_fill(ids_RK < 0, -torch.inf).cpu()


def answer_given_ids() -> None:
    """Let requests with `prompt_logprob_token_ids` pass, and answer them."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    rows = CpuRows()
    check = InputProcessor._validate_params
    read_prompts = GPUModelRunner._get_prompt_logprobs_dict
    sample = GPUModelRunner.sample_tokens

    def checked(self: Any, params: Any, supported_tasks: Any) -> Any:
        """vLLM's checks without the one that refuses this field on this runner."""
        if not isinstance(params, SamplingParams) or params.prompt_logprob_token_ids is None:
            return check(self, params, supported_tasks)
        # Checks the ids and makes them an array.
        params.verify(
            self.model_config, self.speculative_config, self.structured_outputs_config, self.tokenizer
        )
        ids, start = params.prompt_logprob_token_ids, params.prompt_logprob_start
        params.prompt_logprob_token_ids = params.prompt_logprob_start = None
        try:
            return check(self, params, supported_tasks)
        finally:
            params.prompt_logprob_token_ids, params.prompt_logprob_start = ids, start

    def prompts_read(self: Any, hidden_states: Any, num_scheduled_tokens: Mapping[str, int]) -> Any:
        rows.add(self, hidden_states, num_scheduled_tokens)
        return read_prompts(self, hidden_states, num_scheduled_tokens)

    def sampled(self: Any, grammar_output: Any) -> Any:
        output = sample(self, grammar_output)
        complete, rows.complete = rows.complete, {}
        if complete and output is not None:
            output.prompt_token_id_logprobs_dict = complete
        return output

    InputProcessor._validate_params = checked
    GPUModelRunner._get_prompt_logprobs_dict = prompts_read
    GPUModelRunner.sample_tokens = sampled
