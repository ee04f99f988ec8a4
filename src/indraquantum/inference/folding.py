"""Folds a trained model into a plain Llama: the lifted tables become its input and output matrices.

Both projectors act on the table alone, so their results can be written out: input states (V, D), and output states
(V, D) with the scale folded in. The layers are a Llama's already. What is left is the head's bias, for which a Llama
has no place. A constant channel would carry it, but the last norm divides every channel by the root mean square r of
the states. So `with_bias_layer` adds a layer that makes r constant first. Its gates are constant (`mlp_bias`), which
makes its MLP linear: it adds beta * h / r to the states h, with a beta so large that the states then have the root mean
square beta, up to a few parts in a million. Next to them a constant channel stays constant, and its column in the
output matrix is the bias. The error is at most r / beta of the bias.

Legend: V vocabulary, D real width, W width of the folded model, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from indraquantum.errors import UserError
from indraquantum.model.exports import folded_width
from indraquantum.model.inference_model import InferenceModel

GATE = 16.0  # silu(16) is 16 but for two parts in ten million
# The states are scaled down by a power of two, which changes no digit, so that beta and the states fit float16.
SHRINK = 2.0**-12
LARGEST = 2.0**15  # of a state after the added layer, in float16's range


@dataclass(frozen=True)
class FoldedModel:
    """A plain Llama: its sizes, and its weights by transformers' names."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    mlp_width: int
    context: int
    rope_theta: float
    epsilon: float
    weights: dict[str, Tensor]
    bias_V: Tensor | None  # of the head, if it is not folded in
    mlp_bias: bool = False


def fold(model: InferenceModel) -> FoldedModel:
    """Return `model` as a Llama, with the head's bias apart.

    Raises:
        UserError: its logits are not linear in the states.
    """
    shape = model.config
    if shape.head != "interference":
        allowed = f"must be transformers, onnx or page for a model with --head {shape.head}"
        raise UserError("--as", "llama or gguf", allowed)
    weights = {f"model.{name}": value for name, value in model.backbone.state_dict().items() if name != "frequencies"}
    with torch.no_grad():
        weights["model.embed_tokens.weight"] = model.input_table()
        weights["lm_head.weight"] = model.lift_table() * model.scale
    return FoldedModel(
        vocab_size=shape.vocab_size,
        width=shape.hidden_size,
        layers=shape.num_hidden_layers,
        heads=shape.num_attention_heads,
        key_value_heads=shape.key_value_heads,
        head_dim=shape.head_dim,
        mlp_width=shape.intermediate_size,
        context=shape.max_position_embeddings,
        rope_theta=shape.rope_theta,
        epsilon=shape.rms_norm_eps,
        weights=weights,
        bias_V=model.bias_V,
    )


def with_bias_layer(folded: FoldedModel) -> FoldedModel:
    """Return a Llama with one layer more, which gives the head's bias too; without a bias, `folded` itself."""
    if folded.bias_V is None:
        return folded
    width, wide = folded.width, folded_width(folded.width, folded.heads, has_bias=True)
    mlp_width = max(folded.mlp_width, width)
    beta = 2.0 ** math.floor(math.log2(LARGEST / math.sqrt(width)))  # |h_j| / r is at most sqrt(D)
    # A mean over W channels, of which W - D are 0, is D / W of that over D.
    norm = math.sqrt(width / wide)
    weights = {}
    for name, value in folded.weights.items():
        value = value.double()
        if name.endswith("norm.weight"):
            value = _padded(value * norm, wide)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value = _padded(value.T * SHRINK, wide).T
            value = _padded(value, mlp_width) if "down_proj" in name else value
        elif "embed_tokens" in name:
            value = _padded(value * SHRINK, wide)
        else:
            value = _padded(value, wide)
            value = _padded(value.T, mlp_width).T if "gate_proj" in name or "up_proj" in name else value
        weights[name] = value
    for number in range(folded.layers):
        weights |= _mlp_biases(number, mlp_width, wide)
    last = f"model.layers.{folded.layers}"
    of_heads = {"q": folded.heads, "k": folded.key_value_heads, "v": folded.key_value_heads}
    for name, heads in of_heads.items():
        weights[f"{last}.self_attn.{name}_proj.weight"] = torch.zeros(heads * folded.head_dim, wide)
    weights[f"{last}.self_attn.o_proj.weight"] = torch.zeros(wide, folded.heads * folded.head_dim)
    weights[f"{last}.input_layernorm.weight"] = torch.ones(wide)
    weights[f"{last}.post_attention_layernorm.weight"] = torch.full((wide,), norm)
    weights |= _mlp_biases(folded.layers, mlp_width, wide)
    units = torch.eye(width, dtype=torch.float64)
    silu_of_gate = F.silu(torch.tensor(GATE, dtype=torch.float64))
    weights[f"{last}.mlp.gate_proj.weight"] = torch.zeros(mlp_width, wide)
    weights[f"{last}.mlp.gate_proj.bias"] = torch.full((mlp_width,), GATE)
    weights[f"{last}.mlp.up_proj.weight"] = _padded(_padded(units, wide).T, mlp_width).T
    weights[f"{last}.mlp.down_proj.weight"] = _padded(_padded(units * beta / silu_of_gate, mlp_width).T, wide).T
    weights[f"{last}.mlp.down_proj.bias"][width] = beta
    # Now the states have the root mean square beta in D channels, and beta in the constant one.
    last_norm = math.sqrt((width + 1) / wide)
    weights["model.norm.weight"] = _padded(folded.weights["model.norm.weight"].double() * last_norm, wide)
    weights["model.norm.weight"][width] = last_norm
    weights["lm_head.weight"][:, width] = folded.bias_V.double()
    return replace(
        folded,
        width=wide,
        layers=folded.layers + 1,
        mlp_width=mlp_width,
        epsilon=folded.epsilon * SHRINK**2 * width / wide,
        weights={name: value.float().contiguous() for name, value in weights.items()},
        bias_V=None,
        mlp_bias=True,
    )


def _padded(value: Tensor, size: int) -> Tensor:
    """Return `value` with zeros at the end of its last axis, up to `size`."""
    return F.pad(value, (0, size - value.shape[-1]))


def _mlp_biases(layer: int, mlp_width: int, wide: int) -> dict[str, Tensor]:
    sizes = {"gate_proj": mlp_width, "up_proj": mlp_width, "down_proj": wide}
    return {f"model.layers.{layer}.mlp.{name}.bias": torch.zeros(size) for name, size in sizes.items()}
