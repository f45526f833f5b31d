"""Which way a model is decoded, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reflux.config.step_context import SamplingParams
from reflux.kernels.triton_launch import unusable_because
from reflux.models.cache_argument import cache_argument, cache_layers
from reflux.models.cpu.decoder import CpuDecoder, cpu_decoder
from reflux.models.grouped_attention import ungroup_heads
from reflux.models.static_decoder import StaticDecoder
from reflux.models.text import Model, first_line
from reflux.models.turns import TurnRequest

# tolerated difference of log-probs in the trial, nats, in float32 and in 16 bits
_CLOSE, _CLOSE_NARROW = 1e-3, 0.25
# how the sentence on a slower way begins
_EAGER = "eager, because"
_ATTENTION = ("sdpa", "eager", "sdpa_grouped")


@dataclass(frozen=True)
class Way:
    """A faster decoder than the general one, where there is one, and what is taken, for the user."""

    decoder: CpuDecoder | StaticDecoder | None
    sentence: str

    @property
    def text(self) -> str:
        failure = self._failure
        return f"{_EAGER} the capture of a CUDA graph failed: {failure}" if failure else self.sentence

    @property
    def slow(self) -> bool:
        """True if a GPU waits for the host at each operation."""
        return self.sentence.startswith(_EAGER) or self._failure is not None

    @property
    def _failure(self) -> str | None:
        return self.decoder.graphs.failure if isinstance(self.decoder, StaticDecoder) else None


def sampling_way(model: Model) -> Way:
    if model.device.type == "cuda":
        decoder, why = static_decoder(model), unusable_because(model.device)
        without = (
            f". Draws and losses take more time and memory without Triton's kernels: {why}" if why else ""
        )
        if isinstance(decoder, StaticDecoder):
            return Way(decoder, f"CUDA graphs over a static key-value cache{without}")
        return Way(None, f"{_EAGER} {decoder}{without}")
    short = cpu_decoder(model)
    if short:
        return Way(short, "the library's decoder for a CPU")
    return Way(None, "transformers, one token at a time")


def static_decoder(model: Model) -> StaticDecoder | str:
    """The decoder over a static cache, or why this model has none."""
    reason = _other_kind(model)
    if reason:
        return reason
    decoder = StaticDecoder(model)
    reason = _trial(decoder)
    if reason is None:
        return decoder
    ungroup_heads(model.net)
    return reason


def _trial(decoder: StaticDecoder) -> str | None:
    """Why the model's steps cannot be made over a static cache; None if they agree with its own pass."""
    close = _CLOSE if decoder.model.net.dtype == torch.float32 else _CLOSE_NARROW
    try:
        gap = trial_gap(decoder)
    except Exception as error:
        # The code of an architecture that does not know such a cache may fail in any way.
        return f"a trial step over a static cache failed ({type(error).__name__}: {first_line(error)})"
    if gap <= close:
        return None
    return (
        f"log-probs over a static cache differ by {gap:.2g} nats from the model's own forward pass, "
        f"more than {close:g}"
    )


def _other_kind(model: Model) -> str | None:
    """Why a model cannot have a static cache; None if it may."""
    net = model.net
    if cache_argument(model) != "past_key_values":
        return "the state of this architecture is no key-value cache of transformers"
    kinds = {type(layer) for layer in cache_layers(net.config)}
    if not kinds or kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        return "some layers of this architecture keep another state than keys and values"
    if net.config._attn_implementation not in _ATTENTION:
        return f"the attention {net.config._attn_implementation!r} takes no mask over a static cache"
    if not net._can_compile_fullgraph:
        return "transformers declares that this architecture waits for the device within a step"
    if len({parameter.device for parameter in net.parameters()}) > 1:
        return "the layers of this model are on several devices"
    return None


@torch.inference_mode()
def trial_gap(decoder: StaticDecoder) -> float:
    """The largest difference in nats between log-probs of drawn tokens and those of the model's own forward
    pass of the same text, for two prompts of unequal lengths.
    """
    model, draw = decoder.model, SamplingParams(0, "preflight", 6)
    prompts = [[token % model.vocabulary for token in ids] for ids in ((3, 4, 5, 6, 7), (8, 9))]
    asks = [TurnRequest(ids, 6, 17 * len(ids), draw) for ids in prompts]
    tokens_CB, _, raw_CB = decoder.rows(asks).draw()
    gaps = []
    for row, ids in enumerate(prompts):
        text = torch.tensor([*ids, *tokens_CB[:, row].tolist()], device=model.device)
        h_LH = model.trunk(input_ids=text[None], use_cache=False).last_hidden_state[0]
        own_T = model.head.logp_of(h_LH[len(ids) - 1 : -1], text[len(ids) :])
        gaps.append((own_T - torch.from_numpy(raw_CB[:, row]).to(own_T)).abs().max())
    return float(torch.stack(gaps).max())
