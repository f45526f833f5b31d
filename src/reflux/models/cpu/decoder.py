"""Computes one new token per row with a decoder of the Llama family on the CPU, in float32, with only the
arithmetic of the layers.

In a decode step of a small model, most of the time goes to the calls around the matrix products. In
addition, transformers repeats the keys of grouped heads at every step. Here products with the same input are
one product (`kernels.merged`), the keys are stored transposed, and grouped heads share them. The mathematics
is the same; the order of summation is different.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reflux.kernels.merged import MergedLinear
from reflux.models.packed_attention import why_padded
from reflux.models.text import Model

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# families whose queries and keys have their own norms
_NORMED = ("qwen3",)
# rope types whose angles do not depend on the length of the text
_STEADY_ROPE = ("default", "linear", "llama3", "yarn")
# largest difference between this step and the model's own step, as a share of the largest hidden state
_CLOSE = 1e-4


class _Products:
    """The matrix products of one layer. The weights are read from the model here."""

    def __init__(self, layer: Any, rows: int, room: int):
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv, self.out, self.gate_up, self.down = (
            MergedLinear(layers, rows, room)
            for layers in (
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (attention.o_proj,),
                (mlp.gate_proj, mlp.up_proj),
                (mlp.down_proj,),
            )
        )


@dataclass
class Memory:
    """The keys and values of all rows: one buffer per layer, all of the same length."""

    keys_BKDL: list[Tensor]
    values_BKLD: list[Tensor]
    # -inf on left padding, else 0
    bias_BKL: Tensor
    # cosines and signed sines by position
    angles_PD: tuple[Tensor, Tensor]
    # number of positions in use
    written: int
    # by layer
    products: list[_Products]

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows, one layer at a time, so that the peak memory is one layer's copy."""
        for buffers in (self.keys_BKDL, self.values_BKLD):
            for number, buffer in enumerate(buffers):
                buffers[number] = buffer[rows]
        self.bias_BKL = self.bias_BKL[rows]


class CpuDecoder:
    """`begin` takes over the cache that read the prompts; `step` returns the hidden states of one more
    token per row. `begin` also reads the weights of the model.
    """

    def __init__(self, trunk: Any, packs: bool = False):
        """packs: True if the model can read the prompts packed."""
        config, self.packs = trunk.config, packs
        self.trunk, self.kv_heads = trunk, config.num_key_value_heads
        self.layers = [_Layer(layer, self.kv_heads, config.model_type in _NORMED) for layer in trunk.layers]

    def begin(self, cache: Any, mask_BP: Tensor, room: int) -> Memory:
        """Move the keys and values of the prompts from `cache` into a new `Memory` with space for `room` more
        tokens per row. `cache` is empty afterwards. mask_BP: 0 on left padding, else 1.
        """
        width = mask_BP.shape[1]
        bias_BL = F.pad(torch.zeros(mask_BP.shape).masked_fill_(mask_BP == 0, -torch.inf), (0, room))
        products = [_Products(layer, len(mask_BP), room) for layer in self.trunk.layers]
        bias_BKL = bias_BL[:, None].repeat(1, self.kv_heads, 1)
        memory = Memory([], [], bias_BKL, self._angles(width + room), width, products)
        for layer in cache.layers:
            memory.keys_BKDL.append(F.pad(layer.keys.transpose(2, 3), (0, room)))
            memory.values_BKLD.append(F.pad(layer.values, (0, 0, 0, room)))
            layer.reset()
        return memory

    def _angles(self, places: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions, so that a step only selects its own. The sign of rotate_half
        is moved into the sines, so that rotating only swaps the two halves.
        """
        cos_1PD, sin_1PD = self.trunk.rotary_emb(self.trunk.embed_tokens.weight, torch.arange(places)[None])
        half = sin_1PD.shape[-1] // 2
        return cos_1PD[0], torch.cat([-sin_1PD[0, :, :half], sin_1PD[0, :, half:]], -1)

    def step(self, memory: Memory, tokens_B: Tensor, place_B: Tensor) -> Tensor:
        """h_BH after the final norm, for `tokens_B` at the positions `place_B` in their own texts. It uses
        one more position of `memory`.
        """
        h_BH = F.embedding(tokens_B, self.trunk.embed_tokens.weight)
        turn = (memory.angles_PD[0][place_B, None], memory.angles_PD[1][place_B, None])
        memory.written += 1
        bias_S1L = memory.bias_BKL.flatten(0, 1)[:, None, : memory.written]
        for layer, products, keys_BKDL, values_BKLD in zip(
            self.layers, memory.products, memory.keys_BKDL, memory.values_BKLD, strict=True
        ):
            h_BH = layer.step(h_BH, products, turn, keys_BKDL, values_BKLD, bias_S1L)
        return _rms(h_BH, self.trunk.norm)


class _Layer:
    """One layer. S counts (row, key-value head) pairs, G the query heads that share one key-value head, and
    N all heads of queries and keys.
    """

    def __init__(self, layer: Any, kv_heads: int, normed: bool):
        self.layer, self.attention = layer, layer.self_attn
        self.kv_heads, self.normed = kv_heads, normed

    def step(
        self,
        h_BH: Tensor,
        products: _Products,
        turn: tuple[Tensor, Tensor],
        keys_BKDL: Tensor,
        values_BKLD: Tensor,
        bias_S1L: Tensor,
    ) -> Tensor:
        qkv = products.qkv(_rms(h_BH, self.layer.input_layernorm))
        h_BH = h_BH + products.out(self._attend(qkv, turn, keys_BKDL, values_BKLD, bias_S1L))
        gate, up = products.gate_up(_rms(h_BH, self.layer.post_attention_layernorm)).chunk(2, -1)
        return h_BH + products.down(F.silu(gate).mul_(up))

    def _attend(
        self,
        qkv: Tensor,
        turn: tuple[Tensor, Tensor],
        keys_BKDL: Tensor,
        values_BKLD: Tensor,
        bias_S1L: Tensor,
    ) -> Tensor:
        rows, heads, size, _ = keys_BKDL.shape
        written = bias_S1L.shape[-1]
        queries, keys, values = self._heads(qkv, turn)
        keys_BKDL[..., written - 1] = keys
        values_BKLD[:, :, written - 1] = values
        keys_SDL = keys_BKDL.flatten(0, 1)[..., :written]
        scores_SGL = torch.baddbmm(
            bias_S1L, queries.reshape(rows * heads, -1, size), keys_SDL, alpha=self.attention.scaling
        )
        return torch.bmm(scores_SGL.softmax(-1), values_BKLD.flatten(0, 1)[:, :written]).view(rows, -1)

    def _heads(self, qkv: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the first two normalised where the family does so, with the rotary
        embedding applied to both at once.
        """
        attention, size = self.attention, self.attention.head_dim
        all_BMD = qkv.view(len(qkv), -1, size)
        both_BND, values = all_BMD[:, : -self.kv_heads], all_BMD[:, -self.kv_heads :]
        if self.normed:
            queries, keys = both_BND[:, : -self.kv_heads], both_BND[:, -self.kv_heads :]
            both_BND = torch.cat([_rms(queries, attention.q_norm), _rms(keys, attention.k_norm)], 1)
        turned_BND = torch.addcmul(both_BND * turn[0], both_BND.roll(size // 2, -1), turn[1])
        return turned_BND[:, : -self.kv_heads], turned_BND[:, -self.kv_heads :], values


def _rms(x: Tensor, norm: Any) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def cpu_decoder(model: Model) -> CpuDecoder | None:
    """The decoder for a model. None where the model is of another kind, or where a trial step differs from
    the model's own step.
    """
    if not model.plain_attention or not _known(model.trunk):
        return None
    decoder = CpuDecoder(model.trunk, packs=not why_padded(model, nullcontext()))
    return decoder if _agrees(decoder) else None


def _known(trunk: Any) -> bool:
    config = trunk.config
    if config.model_type not in _FAMILIES or not type(trunk).__module__.startswith(
        f"transformers.models.{config.model_type}."
    ):
        return False
    plain = all(type(m) is nn.Linear for m in trunk.modules() if isinstance(m, nn.Linear))
    ready = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in trunk.parameters())
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    return plain and ready and config.hidden_act == "silu" and rope in _STEADY_ROPE


@torch.inference_mode()
def _agrees(decoder: CpuDecoder) -> bool:
    """True if one step after two tokens agrees with the model's own output. One of the two rows is padded."""
    from transformers import DynamicCache

    trunk = decoder.trunk
    ids_BL = torch.arange(6).view(2, 3) % trunk.config.vocab_size
    mask_BL = torch.tensor([[1, 1, 1], [0, 1, 1]])
    places_BL = torch.tensor([[0, 1, 2], [0, 0, 1]])
    cache = DynamicCache(config=trunk.config)
    own_BH = trunk(
        input_ids=ids_BL, attention_mask=mask_BL, position_ids=places_BL, use_cache=False
    ).last_hidden_state[:, -1]
    trunk(
        input_ids=ids_BL[:, :2],
        attention_mask=mask_BL[:, :2],
        position_ids=places_BL[:, :2],
        past_key_values=cache,
        use_cache=True,
    )
    made_BH = decoder.step(decoder.begin(cache, mask_BL[:, :2], 1), ids_BL[:, 2], places_BL[:, 2])
    return bool((made_BH - own_BH).abs().max() <= _CLOSE * own_BH.abs().max())
