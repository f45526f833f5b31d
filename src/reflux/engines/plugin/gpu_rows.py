"""Hidden states on vLLM's second model runner, the one of GPUs, through the channel of
`prompt_logprob_token_ids`. Written from the source of vLLM 0.32; docs/gpu.md says what a first run confirms.
"""

from __future__ import annotations

from typing import Any

from reflux.engines.plugin import HIDDEN


def answer_hidden_states() -> None:
    """Answer requests whose `extra_args` select hidden states."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    PromptLogprobsWorker.add_request = _adding(PromptLogprobsWorker.add_request)
    PromptLogprobsWorker.compute_prompt_token_id_logprobs = _computing(
        PromptLogprobsWorker.compute_prompt_token_id_logprobs
    )


def _adding(add: Any) -> Any:
    def add_request(self: Any, req_id: str, req_idx: int, sampling_params: Any) -> None:
        add(self, req_id, req_idx, sampling_params)
        if (sampling_params.extra_args or {}).get(HIDDEN) and req_id in self.token_id_scores:
            self.token_id_scores[req_id] = HiddenRows(self.token_id_scores[req_id])

    return add_request


class HiddenRows:
    """The state of one request in the worker's table `token_id_scores`."""

    def __init__(self, of_ids: Any):
        self.count, self.start = len(of_ids.token_ids), of_ids.start
        # float32 [count, H]; None before the first chunk
        self.rows: Any = None

    def add(self, states: Any, begin: int, end: int, length: int) -> Any:
        """Take the chunk [begin, end) of a prompt of `length` positions. Returns the rows once they are
        complete, False if they can never be, and else None.
        """
        if self.rows is None:
            if begin > self.start:
                return False
            self.rows = states.new_empty(self.count, states.shape[-1]).float()
        low, high = max(self.start, begin), min(end, length - 1)
        if low < high:
            self.rows[low - self.start : high - self.start] = states[low - begin : high - begin].float()
        return self.rows if end >= length else None


def _computing(compute: Any) -> Any:
    def compute_prompt_token_id_logprobs(
        self: Any, logits_fn: Any, hidden_states: Any, input_batch: Any, prompt_lens: Any
    ) -> dict[str, Any]:
        table = self.token_id_scores
        hidden = {name: state for name, state in table.items() if isinstance(state, HiddenRows)}
        for name in hidden:
            del table[name]
        answered = compute(self, logits_fn, hidden_states, input_batch, prompt_lens)
        for row, name in enumerate(input_batch.req_ids):
            if name not in hidden:
                continue
            length = int(prompt_lens[input_batch.idx_mapping_np[row]])
            begin = int(input_batch.num_computed_prefill_tokens_np[row])
            end = begin + int(input_batch.num_scheduled_tokens[row])
            first = int(input_batch.query_start_loc_np[row])
            state, found = hidden.pop(name), None
            # A request that goes on after a preemption has been answered before.
            if begin < length and length >= input_batch.prefill_len_np[row]:
                found = state.add(hidden_states[first : first + end - begin], begin, end, length)
            else:
                found = False
            if found is None:
                table[name] = state
            elif found is not False:
                answered[name] = found
        # Requests without a part in this step wait.
        table.update(hidden)
        return answered

    return compute_prompt_token_id_logprobs
