"""A model for writing and evaluating text, in plain torch, which starts much faster than IndraQuantumPhase2.

Importing transformers takes longer than writing a short text. So Llama's layers are repeated here in a few lines, with
the names of transformers' parameters and its operations in the same order. The numbers are the same to the bit;
tests/test_inference_model.py compares both. Text is written by a Decoder, whose logits agree up to rounding. Use
IndraQuantumPhase2 itself for training, export and adapters.

Legend: B batch, T positions, D real width, H heads, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indraquantum.model.core import QuantumCore
from indraquantum.model.decoder import Decoder, PackedModel
from indraquantum.model.shape import ModelShape

Memory = tuple[Tensor, Tensor]  # keys and values (B, H, positions so far, width of a head) of one layer


class Place(NamedTuple):
    """The rotary angles of a pass's positions, and what each position may attend to."""

    cos_BT: Tensor  # (B, 1, T, width of a head), of the rotary angles
    sin_BT: Tensor
    mask: Tensor | None  # (B, 1, T, T) bool; None: all earlier positions


class RMSNorm(nn.Module):
    """Scales each state to a root mean square of 1, then each direction by its weight."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.hidden_size))
        self.epsilon = shape.rms_norm_eps

    def forward(self, states: Tensor) -> Tensor:
        """Return the scaled states (..., D)."""
        return self.weight * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.epsilon))


class Attention(nn.Module):
    """Attention of several heads with rotary positions."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        of_keys = shape.key_value_heads * shape.head_dim
        self.shared_keys = shape.num_key_value_heads != shape.num_attention_heads
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, of_keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, of_keys, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, states_BTD: Tensor, place: Place, past: Memory | None) -> tuple[Tensor, Memory]:
        """Return the output (B, T, D), and the keys and values so far."""
        query, key, value = (
            project(states_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotated(query, place), _rotated(key, place)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=-2), torch.cat([past[1], value], dim=-2)
        gathered = F.scaled_dot_product_attention(
            query, key, value, attn_mask=place.mask, is_causal=place.mask is None and query.shape[2] > 1,
            scale=self.head_dim**-0.5, enable_gqa=self.shared_keys,
        )  # fmt: skip
        return self.o_proj(gathered.transpose(1, 2).flatten(2)), (key, value)


class MLP(nn.Module):
    """The gated MLP of a layer."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Return the output (..., D), which is added to the states."""
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


class Layer(nn.Module):
    """One layer: attention, then the MLP. Each reads normalised states and is added to the states."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), MLP(shape)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(shape), RMSNorm(shape)

    def forward(self, states_BTD: Tensor, place: Place, past: Memory | None) -> tuple[Tensor, Memory]:
        """Return the layer's states (B, T, D), and its keys and values so far."""
        gathered_BTD, memory = self.self_attn(self.input_layernorm(states_BTD), place, past)
        states_BTD = states_BTD + gathered_BTD
        return states_BTD + self.mlp(self.post_attention_layernorm(states_BTD)), memory


class Layers(nn.Module):
    """Llama's layers on given states."""

    frequencies: Tensor  # of the rotary angles, one for each pair of a head's width

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape)
        # On the CPU also where the weights are made on the meta device: no checkpoint holds them.
        exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float, device="cpu") / shape.head_dim
        self.register_buffer("frequencies", 1.0 / (shape.rope_theta**exponents), persistent=False)

    def forward(
        self, states_BTD: Tensor, position_ids_BT: Tensor, mask: Tensor | None, past: list[Memory] | None = None
    ) -> tuple[Tensor, list[Memory]]:
        """Return the states psi (B, T, D), and each layer's keys and values for the positions that follow."""
        angles = position_ids_BT[..., None].float() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        place, memories = Place(angles.cos(), angles.sin(), mask), []
        known: Sequence[Memory | None] = past or [None] * len(self.layers)
        for layer, memory in zip(self.layers, known, strict=True):
            states_BTD, memory = layer(states_BTD, place, memory)
            memories.append(memory)
        return self.norm(states_BTD), memories


class InferenceModel(QuantumCore, nn.Module):
    """A trained model, as `indra test` and `indra eval` use it.

    Args:
        shape: sizes and variant.
        weights: a state_dict of IndraQuantumPhase2. Its tensors are used without a copy.

    Raises:
        RuntimeError: the weights do not fit this shape.
    """

    def __init__(self, shape: ModelShape, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.config = shape
        with torch.device("meta"):  # no memory is filled with what the weights replace
            # Drawing an embedding on the meta device would import torch's compiler.
            embedding = nn.Embedding.from_pretrained(torch.empty(shape.vocab_size, shape.d_model))
            self._add_parts(shape, embedding, lambda: Layers(shape))
        self.load_state_dict(weights, assign=True)
        self.requires_grad_(False).eval()
        self._packed: PackedModel | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.weight.device

    def _run_layers(self, states_BTD: Tensor, mask: Tensor | None, position_ids_BT: Tensor | None) -> Tensor:
        if position_ids_BT is None:
            position_ids_BT = torch.arange(states_BTD.shape[1], device=states_BTD.device)[None]
        elif mask is None:  # a document begins where positions restart
            restarts_BT = F.pad(position_ids_BT.diff(dim=-1) != 1, (1, 0)).cumsum(dim=-1)
            mask = self._document_mask(restarts_BT) if restarts_BT.any() else None
        return self.backbone(states_BTD, position_ids_BT, mask)[0]

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, lift the table and pack the weights once for all calls of `next_logits`."""
        self._packed = PackedModel(self)
        try:
            yield
        finally:
            self._packed = None

    def next_logits(self, ids_BT: Tensor, past: Decoder | None = None) -> tuple[Tensor, Decoder]:
        """Return the logits (B, V) of the token after `ids_BT`, and what to pass together with that token.

        Args:
            ids_BT: (B, T) the beginnings of B texts, or with `past` the next token (B, 1) of each.
            past: what the last call returned, which this call changes; None at the beginning.
        """
        if past is None:
            past = Decoder(PackedModel(self) if self._packed is None else self._packed, len(ids_BT))
            states_BD = past.begin(ids_BT.tolist())[:, -1]
        else:
            states_BD = past.step(ids_BT[:, 0])
        return past.packed.logits(states_BD), past


def _rotated(heads: Tensor, place: Place) -> Tensor:
    """Rotate the queries or keys (B, H, T, width of a head) by their positions' angles."""
    first, second = heads.chunk(2, dim=-1)
    return heads * place.cos_BT + torch.cat([-second, first], dim=-1) * place.sin_BT
