"""Writes several texts at once, one token of each in a step: the layers of InferenceModel, arranged for that.

A step multiplies one state of each text with all weights, so its time goes into reading the weights and into calling
torch. Therefore the matrices lie as these products read them fastest, products of the same states are one product,
nothing is computed that an earlier step has computed (the lifted table, the rotary angles), and keys and values are
written in place into memory that is as long as the model's context.

Each text has a slot. The first `active` slots are in use. Rows of a step never mix: each text attends to its own keys.

Legend: B texts, T positions, S positions so far, D real width, H heads of queries, K heads of keys, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indraquantum.model.core import QuantumCore


class PackedLayer(NamedTuple):
    """The weights of a layer; matrices as (inputs, outputs)."""

    norm_D: Tensor
    query_key_value: Tensor
    output: Tensor
    mlp_norm_D: Tensor
    gate_up: Tensor
    down: Tensor


class PackedModel:
    """Copies of a model's weights in the order in which decoding reads them. Later changes of the model are not seen.

    Args:
        model: the model, whose backbone is InferenceModel's.
    """

    @torch.no_grad()
    def __init__(self, model: QuantumCore) -> None:
        shape, backbone = model.config, cast(Any, model.backbone)
        self.model, self.epsilon, self.context = model, shape.rms_norm_eps, shape.max_position_embeddings
        self.head_dim, self.heads = shape.head_dim, shape.num_attention_heads
        self.key_heads = shape.num_key_value_heads or shape.num_attention_heads
        self.layers = [_packed_layer(layer) for layer in backbone.layers]
        self.norm_D: Tensor = backbone.norm.weight
        positions_S1 = torch.arange(self.context, device=self.norm_D.device)[:, None].float()
        angles = positions_S1 * backbone.frequencies
        # A pair turns by (x, y) -> (x cos - y sin, y cos + x sin); the signs are in the table.
        self.cos = torch.cat([angles.cos(), angles.cos()], dim=-1)
        self.sin = torch.cat([-angles.sin(), angles.sin()], dim=-1)
        table_VD = model.lift_table()
        linear = shape.head == "interference"
        self._table_VD = None if linear else table_VD
        self._head_DV = (table_VD * model.scale).T.contiguous() if linear else None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) of `states` (..., D)."""
        if self._head_DV is None:
            assert self._table_VD is not None
            return self.model.logits(states, self._table_VD)
        if states.dim() == 2 and self.model.bias_V is not None:
            return torch.addmm(self.model.bias_V, states, self._head_DV)
        logits = states @ self._head_DV
        return logits if self.model.bias_V is None else logits.add_(self.model.bias_V)


def _packed_layer(layer: Any) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    return PackedLayer(
        layer.input_layernorm.weight,
        _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
        _side_by_side(attention.o_proj),
        layer.post_attention_layernorm.weight,
        _side_by_side(mlp.gate_proj, mlp.up_proj),
        _side_by_side(mlp.down_proj),
    )


def _side_by_side(*projections: nn.Linear) -> Tensor:
    return torch.cat([projection.weight for projection in projections]).T.contiguous()


class Decoder:
    """Texts that are being written.

    Args:
        packed: the model.
        slots: the most texts at once.
    """

    def __init__(self, packed: PackedModel, slots: int) -> None:
        self.packed, self.slots, self.lengths = packed, slots, list[int]()  # lengths: positions so far, by slot
        self._memories = [(self._empty(slots), self._empty(slots)) for _ in packed.layers]
        self._columns_S = torch.arange(packed.context, device=packed.norm_D.device)

    def _empty(self, slots: int) -> Tensor:
        """Return memory for the keys or values of a layer: zeros, since 0 * NaN would be NaN where a mask hides it."""
        packed = self.packed
        # numpy's zeros take no memory before they are written to.
        zeros = np.zeros((slots, packed.key_heads, packed.context, packed.head_dim), np.float32)
        return torch.from_numpy(zeros).to(packed.norm_D.device)

    @property
    def active(self) -> int:
        """How many texts there are; their slots are 0 to active - 1."""
        return len(self.lengths)

    @torch.no_grad()
    def begin(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read the beginnings of more texts in one pass, and put them into the next slots.

        Args:
            texts: their token ids. None may be empty or longer than the context.

        Returns:
            (B, T, D) their states. Beyond the end of a text shorter than T they mean nothing.
        """
        first, longest = self.active, max(map(len, texts))
        ids_BT = torch.zeros(len(texts), longest, dtype=torch.long)
        for row, text in enumerate(texts):
            ids_BT[row, : len(text)] = torch.as_tensor(text)
        cos, sin = self.packed.cos[:longest, None], self.packed.sin[:longest, None]
        states = self._input_states(ids_BT)
        for layer, memory in zip(self.packed.layers, self._memories, strict=True):
            query, key, value = self._heads(layer, states, cos, sin)
            for cache, new in zip(memory, (key, value), strict=True):
                cache[first : first + len(texts), :, :longest] = new
            # Padding is at the end, where no earlier position looks.
            states = self._mixed(layer, states, query, key, value, None, causal=longest > 1)
        self.lengths += map(len, texts)
        return self._normed(states, self.packed.norm_D)

    @torch.no_grad()
    def step(self, ids_B: Tensor) -> Tensor:
        """Read the next token (B,) of each text and return their states (B, D). None may be at the context's end."""
        longest, count = max(self.lengths) + 1, self.active
        alone = count == 1
        states = self._input_states(ids_B.reshape(count, 1))
        if alone:
            place, mask = slice(longest - 1, longest), None
            cos, sin = self.packed.cos[place, None], self.packed.sin[place, None]
        else:
            places_B = torch.tensor(self.lengths, device=states.device)
            rows_B = torch.arange(count, device=states.device)
            cos, sin = self.packed.cos[places_B, None, None], self.packed.sin[places_B, None, None]
            allowed_BS = self._columns_S[:longest] <= places_B[:, None]
            zeros_BS = torch.zeros(allowed_BS.shape, device=states.device)
            mask = zeros_BS.masked_fill_(~allowed_BS, -math.inf)[:, None, None]
        for layer, memory in zip(self.packed.layers, self._memories, strict=True):
            query, *new = self._heads(layer, states, cos, sin)
            for cache, latest in zip(memory, new, strict=True):
                if alone:
                    cache[0, :, place] = latest[0]
                else:
                    cache[rows_B, :, places_B] = latest[:, :, 0]
            key, value = (cache[:count, :, :longest] for cache in memory)
            states = self._mixed(layer, states, query, key, value, mask, causal=False)
        self.lengths = [length + 1 for length in self.lengths]
        return self._normed(states, self.packed.norm_D)[:, 0]

    def release(self, slot: int) -> None:
        """End the text in `slot`. The text in the last slot moves into its place."""
        last = self.active - 1
        if slot != last:
            for cache in (cache for memory in self._memories for cache in memory):
                cache[slot, :, : self.lengths[last]] = cache[last, :, : self.lengths[last]]
            self.lengths[slot] = self.lengths[last]
        self.lengths.pop()

    def _input_states(self, ids: Tensor) -> Tensor:
        model = self.packed.model
        return model.input_states(F.embedding(ids.to(model.embedding.weight.device), model.embedding.weight))

    def _normed(self, states: Tensor, weight_D: Tensor) -> Tensor:
        return F.rms_norm(states, (len(weight_D),), weight_D, self.packed.epsilon)

    def _heads(self, layer: PackedLayer, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, width of a head), keys and values (B, K, T, width of a head)."""
        packed = self.packed
        heads = (self._normed(states, layer.norm_D) @ layer.query_key_value).unflatten(-1, (-1, packed.head_dim))
        turned = heads[..., : packed.heads + packed.key_heads, :]
        turned = torch.addcmul(turned * cos, turned.roll(packed.head_dim // 2, -1), sin).transpose(1, 2)
        value = heads[..., packed.heads + packed.key_heads :, :].transpose(1, 2)
        return turned[:, : packed.heads], turned[:, packed.heads :], value

    def _mixed(
        self, layer: PackedLayer, states: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        *, causal: bool,
    ) -> Tensor:  # fmt: skip
        """Return the layer's states (B, T, D): attention, then the MLP."""
        gathered = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=self.packed.head_dim**-0.5,
            enable_gqa=self.packed.heads != self.packed.key_heads,
        )  # fmt: skip
        states = _added(states, gathered.transpose(1, 2).flatten(2), layer.output)
        gate, up = (self._normed(states, layer.mlp_norm_D) @ layer.gate_up).chunk(2, dim=-1)
        return _added(states, F.silu(gate) * up, layer.down)


def _added(states: Tensor, inputs: Tensor, matrix: Tensor) -> Tensor:
    """Return states + inputs @ matrix, for one position of each row as one operation."""
    if states.shape[1] == 1:
        return torch.addmm(states[:, 0], inputs[:, 0], matrix)[:, None]
    return states + inputs @ matrix
