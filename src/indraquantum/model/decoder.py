"""Writes several texts at once, one token of each in a step: the layers of InferenceModel, arranged for that.

A step multiplies one state of each text with all weights. So its time goes into reading the weights, and into the calls
of torch, each of which is slow here because the weights push its code out of the caches. Therefore the matrices lie as
these products read them fastest, the weights of the norms are multiplied into them, products of the same states are one
product, and the pairs that a rotary position turns lie side by side, as complex numbers. The table is lifted once, and
keys and values are written in place into memory that is as long as the model's context.

Each text has a slot. The first `active` slots are in use. Rows of a step never mix: each text attends to its own keys.

Legend: B texts, T positions, S positions so far, D real width, H heads of queries, K heads of keys, V vocabulary;
    N states, of B texts or of B*T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indraquantum.model.core import QuantumCore


class PackedLayer(NamedTuple):
    """The matrices of a layer as (inputs, outputs), the first and third with the weights of the norm before them."""

    query_key_value: Tensor
    output: Tensor
    gate_up: Tensor
    down: Tensor


class PackedModel:
    """Copies of a model's weights in the order in which decoding reads them. Later changes of the model are not seen.

    Args:
        model: the model, whose backbone is InferenceModel's.
        gather: also keep the inputs' states of all tokens. It saves time in each step, and takes the time of some
            hundred steps and the memory of one more table.
    """

    @torch.no_grad()
    def __init__(self, model: QuantumCore, gather: bool = False) -> None:
        shape, backbone = model.config, cast(Any, model.backbone)
        self.model, self.epsilon, self.context = model, shape.rms_norm_eps, shape.max_position_embeddings
        self.head_dim, self.heads = shape.head_dim, shape.num_attention_heads
        self.key_heads = shape.key_value_heads
        self.layers = [_packed_layer(layer, shape.head_dim) for layer in backbone.layers]
        self.norm_D: Tensor = backbone.norm.weight
        angles = torch.arange(self.context, device=self.norm_D.device)[:, None, None].float() * backbone.frequencies
        self.turns = torch.polar(torch.ones_like(angles), angles)  # (S, 1, half the width of a head)
        self._input_table_VD = model.input_table() if gather else None
        table_VD = model.lift_table()
        linear = shape.head == "interference"
        self._table_VD = None if linear else table_VD
        self._head_DV = (table_VD * model.scale).T.contiguous() if linear else None

    def input_states(self, ids: Tensor) -> Tensor:
        """Return the inputs' states (..., D) of token ids."""
        if self._input_table_VD is not None:
            return F.embedding(ids.to(self.norm_D.device), self._input_table_VD)
        table = self.model.embedding.weight
        return self.model.input_states(F.embedding(ids.to(table.device), table))

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) of `states` (..., D)."""
        if self._head_DV is None:
            assert self._table_VD is not None
            return self.model.logits(states, self._table_VD)
        if states.dim() == 2 and self.model.bias_V is not None:
            return torch.addmm(self.model.bias_V, states, self._head_DV)
        logits = states @ self._head_DV
        return logits if self.model.bias_V is None else logits.add_(self.model.bias_V)


def _packed_layer(layer: Any, head_dim: int) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    turned = (neighbouring_pairs(projection.weight, head_dim) for projection in (attention.q_proj, attention.k_proj))
    return PackedLayer(
        _matrix(*turned, attention.v_proj.weight, norm_D=layer.input_layernorm.weight),
        _matrix(attention.o_proj.weight),
        _matrix(mlp.gate_proj.weight, mlp.up_proj.weight, norm_D=layer.post_attention_layernorm.weight),
        _matrix(mlp.down_proj.weight),
    )


def _matrix(*weights: Tensor, norm_D: Tensor | None = None) -> Tensor:
    whole = torch.cat(weights)
    return (whole if norm_D is None else whole * norm_D).T.contiguous()


def neighbouring_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of queries or keys: pairs i and i + head_dim / 2 of transformers become pairs 2i and 2i + 1."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


class Decoder:
    """Texts that are being written.

    Args:
        packed: the model.
        slots: the most texts at once.
    """

    def __init__(self, packed: PackedModel, slots: int) -> None:
        self.packed, self.slots, self.lengths = packed, slots, list[int]()  # lengths: positions so far, by slot
        self._caches = [self._empty(slots) for _ in packed.layers]
        self._columns_S = torch.arange(packed.context, device=packed.norm_D.device)

    def _empty(self, slots: int) -> Tensor:
        """Return memory for keys and values of a layer: zeros, since 0 * NaN would be NaN where a mask hides it."""
        packed = self.packed
        # numpy's zeros take no memory before they are written to.
        zeros = np.zeros((slots, 2 * packed.key_heads, packed.context, packed.head_dim), np.float32)
        return torch.from_numpy(zeros).to(packed.norm_D.device)

    @property
    def active(self) -> int:
        """How many texts there are; their slots are 0 to active - 1."""
        return len(self.lengths)

    @torch.inference_mode()
    def begin(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read the beginnings of more texts in one pass, and put them into the next slots.

        Args:
            texts: their token ids. None may be empty or longer than the context.

        Returns:
            (B, T, D) their states. Beyond the end of a text shorter than T they mean nothing.
        """
        packed, count, longest = self.packed, len(texts), max(map(len, texts))
        ids_BT = torch.zeros(count, longest, dtype=torch.long)
        for row, text in enumerate(texts):
            ids_BT[row, : len(text)] = torch.as_tensor(text)
        states_ND = packed.input_states(ids_BT).flatten(0, 1)
        turns = packed.turns[:longest].repeat(count, 1, 1)
        slots = slice(self.active, self.active + count)
        for layer, cache in zip(packed.layers, self._caches, strict=True):
            query, key_value = self._heads(layer, states_ND, turns)
            query, key_value = (heads.unflatten(0, (count, longest)).transpose(1, 2) for heads in (query, key_value))
            cache[slots, :, :longest] = key_value
            # Padding is at the end, where no earlier position looks.
            gathered = self._gathered(query, key_value, None, causal=longest > 1)
            states_ND = self._next_states(layer, states_ND, gathered.transpose(1, 2).flatten(2).flatten(0, 1))
        self.lengths += map(len, texts)
        return self._normed(states_ND).unflatten(0, (count, longest))

    @torch.inference_mode()
    def step(self, ids_B: Tensor) -> Tensor:
        """Read the next token (B,) of each text and return their states (B, D). None may be at the context's end."""
        packed, count, longest = self.packed, self.active, max(self.lengths) + 1
        states_BD = packed.input_states(ids_B)
        if count == 1:
            turns, mask = packed.turns[longest - 1], None
        else:
            places_B = torch.tensor(self.lengths, device=states_BD.device)
            rows_B, turns = torch.arange(count, device=states_BD.device), packed.turns[places_B]
            allowed_BS = self._columns_S[:longest] <= places_B[:, None]
            zeros_BS = torch.zeros(allowed_BS.shape, device=states_BD.device)
            mask = zeros_BS.masked_fill_(~allowed_BS, -math.inf)[:, None, None]
        for layer, cache in zip(packed.layers, self._caches, strict=True):
            query, key_value = self._heads(layer, states_BD, turns)
            if count == 1:
                cache[0, :, longest - 1] = key_value[0]
            else:
                cache[rows_B, :, places_B] = key_value
            gathered = self._gathered(query[:, :, None], cache[:count, :, :longest], mask, causal=False)
            states_BD = self._next_states(layer, states_BD, gathered.reshape(count, -1))
        self.lengths = [length + 1 for length in self.lengths]
        return self._normed(states_BD)

    def release(self, slot: int) -> None:
        """End the text in `slot`. The text in the last slot moves into its place."""
        last = self.active - 1
        if slot != last:
            for cache in self._caches:
                cache[slot, :, : self.lengths[last]] = cache[last, :, : self.lengths[last]]
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    def _normed(self, states_ND: Tensor) -> Tensor:
        """Return the final states."""
        return F.rms_norm(states_ND, (states_ND.shape[-1],), self.packed.norm_D, self.packed.epsilon)

    def _projected(self, states_ND: Tensor, matrix: Tensor) -> Tensor:
        """Return the products of the scaled states with a matrix that has the norm's weights in it."""
        width, epsilon = states_ND.shape[-1], self.packed.epsilon
        if len(states_ND) == 1 and states_ND.device.type == "cpu":  # half the calls
            square = torch.dot(states_ND[0], states_ND[0]).item()
            return (states_ND * (square / width + epsilon) ** -0.5) @ matrix
        return F.rms_norm(states_ND, (width,), None, epsilon) @ matrix

    def _heads(self, layer: PackedLayer, states_ND: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (N, H, width of a head), and keys and values (N, 2K, width of a head)."""
        packed = self.packed
        heads = self._projected(states_ND, layer.query_key_value).unflatten(-1, (-1, packed.head_dim))
        turning = heads[:, : packed.heads + packed.key_heads].unflatten(-1, (-1, 2))
        torch.view_as_complex(turning).mul_(turns)
        return heads[:, : packed.heads], heads[:, packed.heads :]

    def _gathered(self, query: Tensor, key_value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
        """Return what queries (B, H, T, width of a head) gather from keys and values (B, 2K, S, width of a head)."""
        key_heads = self.packed.key_heads
        return F.scaled_dot_product_attention(
            query, key_value[:, :key_heads], key_value[:, key_heads:], attn_mask=mask, is_causal=causal,
            scale=self.packed.head_dim**-0.5, enable_gqa=self.packed.heads != key_heads,
        )  # fmt: skip

    def _next_states(self, layer: PackedLayer, states_ND: Tensor, gathered_ND: Tensor) -> Tensor:
        """Return the layer's states (N, D): what attention gathered, then the MLP."""
        states_ND = torch.addmm(states_ND, gathered_ND, layer.output)
        gate, up = self._projected(states_ND, layer.gate_up).chunk(2, dim=-1)
        return torch.addmm(states_ND, F.silu(gate).mul_(up), layer.down)
