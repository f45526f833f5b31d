"""What Reflux adds to a vLLM server: a plugin of the entry point group `vllm.general_plugins`.

vLLM loads it in the API server, in the engine core and in every worker. It adds

1. a weight transfer backend, `reflux_file`: the four calls of vLLM for new weights, with the bytes in a
   safetensors file, for example in shared memory;
2. the hidden states of a prompt: a request with `prompt_logprob_token_ids` and `extra_args =
   {"reflux_hidden": 1}` is answered with the last hidden states, after the final norm, in the place of the
   log-probs, float32 [rows, H];
3. on a CPU, `prompt_logprob_token_ids` itself, which vLLM 0.32 has for its GPU model runner only;
4. on a CPU, an output head that follows weight updates where it is tied to the input embeddings.

This package imports nothing else of Reflux, and vLLM and torch only inside functions.
"""

from __future__ import annotations

# the name of the weight transfer backend
FILE_BACKEND = "reflux_file"
# the key of `extra_args` that selects hidden states
HIDDEN = "reflux_hidden"


def register() -> None:
    """Called by vLLM. A second call changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if FILE_BACKEND in WeightTransferEngineFactory._registry:
        return
    WeightTransferEngineFactory.register_engine(
        FILE_BACKEND, "reflux.engines.plugin.file_transfer", "FileWeightTransferEngine"
    )
    if current_platform.is_cpu():
        from reflux.engines.plugin.cpu_head import follow_tied_head
        from reflux.engines.plugin.cpu_rows import answer_given_ids

        answer_given_ids()
        follow_tied_head()
    else:
        from reflux.engines.plugin.gpu_rows import answer_hidden_states

        answer_hidden_states()
