"""The trained model as an ONNX graph with a KV cache, for onnxruntime on a computer or in a browser.

torch.onnx writes the graph from InferenceModel, so there is no second version of the layers. The names of inputs and
outputs are those of optimum and transformers.js. Two outputs are added: magnitude and phase of each position.

Both projectors can be in the graph. Then it holds only the table of embeddings, and onnxruntime lifts the whole
vocabulary once, when it loads the graph: it folds what depends on constants alone. In int8 the lift would depend on the
rounding of activations, which is not folded, so that graph must hold the lifted table. docs/LOG.md has measurements.

Legend: B batch, T positions that are read, S positions with those in the cache, D real width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from indraquantum.errors import UserError
from indraquantum.model.inference_model import InferenceModel, Memory

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18  # onnxruntime has it since 1.14
LARGEST = 2_000_000_000  # bytes of weights: a file of protobuf holds 2 GiB
# An exporter may take a size of 1 for a constant, and equal sizes for the same one.
EXAMPLE_BATCH, EXAMPLE_READ, EXAMPLE_CACHED = 2, 3, 5
BATCH, READ, CACHED = "batch_size", "sequence_length", "past_sequence_length"
WHOLE = f"{CACHED} + {READ}"


class Graph(nn.Module):
    """What the graph computes, in torch. With `lifted` it holds the lifted table."""

    table_VD: Tensor | None

    def __init__(self, model: InferenceModel, lifted: bool) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("table_VD", model.lift_table().detach().clone() if lifted else None)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Memory]
    ) -> tuple[Tensor, list[Memory], Tensor, Tensor]:
        """Read tokens after those in the cache.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, S) 1 for text, 0 for padding; of the cached positions too.
            position_ids: (B, T) positions within each text.
            past: each layer's keys and values (B, heads, S - T, width of a head).

        Returns:
            Logits (B, T, V), each layer's keys and values for all S positions, magnitudes and phases (B, T).
        """
        model = self.model
        states_BTD = self.input_states(input_ids)
        mask = _mask(attention_mask, input_ids.shape[1])
        states_BTD, memories = model.backbone(states_BTD, position_ids, mask, past)
        amplitude_BT = model.amplitude(states_BTD)
        phase_BT = phase_of(amplitude_BT.real, amplitude_BT.imag)
        table_VD = model.lift_table() if self.table_VD is None else self.table_VD
        return model.logits(states_BTD, table_VD), memories, amplitude_BT.abs(), phase_BT

    def input_states(self, input_ids: Tensor) -> Tensor:
        """Return the states (B, T, D) of token ids."""
        return self.model.input_states(self.model.embedding(input_ids))


def _mask(attention_mask: Tensor, read: int) -> Tensor:
    """Return (B, 1, T, S) bool: True at (b, 0, i, j) means that token i of the T read may attend to position j of S.

    Padding attends to itself, because a row without any True would give NaN.
    """
    whole = attention_mask.shape[1]
    key_S = torch.arange(whole)
    query_T1 = torch.arange(read)[:, None] + (whole - read)
    return (key_S <= query_T1) & (attention_mask[:, None, None] != 0) | (key_S == query_T1)


def phase_of(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return the angle of complex numbers in (-pi, pi].

    ONNX has no atan2, and the exporter's substitute gives -pi on the negative real axis, where torch gives pi.
    """
    is_zero = real == 0
    angle = torch.atan(imaginary / torch.where(is_zero, 1.0, real))
    other_half = torch.where(imaginary < 0, -math.pi, math.pi)
    angle = torch.where(real < 0, angle + other_half, angle)
    return torch.where(is_zero, imaginary.sign() * (math.pi / 2), angle)


def onnx_graph(model: InferenceModel, lifted: bool) -> ModelProto:
    """Return `model` as an ONNX graph in float32, which holds the `lifted` table or lifts it.

    Raises:
        UserError: it is too large for a file of ONNX.
    """
    graph = Graph(model, lifted).eval()
    size = sum(value.numel() * value.element_size() for value in graph.state_dict().values())
    if size > LARGEST:
        raise UserError("--as", "onnx", f"must be another form: its weights take {size / 1e9:.1f} GB, and ONNX holds 2")
    inputs, outputs = names(model)
    dynamic = torch.export.Dim.DYNAMIC
    of_cache = {0: dynamic, 2: dynamic}
    rows = {0: dynamic, 1: dynamic}
    with quiet():
        program = torch.onnx.export(
            graph, _example(model), dynamo=True, opset_version=OPSET, input_names=inputs, output_names=outputs,
            dynamic_shapes=(rows, rows, rows, [(of_cache, of_cache)] * len(model.backbone.layers)), verbose=False,
        )  # fmt: skip
    assert program is not None
    return _with_readable_sizes(program.model_proto)


def names(model: InferenceModel) -> tuple[list[str], list[str]]:
    """Return the names of the graph's inputs and outputs."""
    layers = range(len(model.backbone.layers))
    past = [f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")]
    present = [f"present.{layer}.{part}" for layer in layers for part in ("key", "value")]
    return ["input_ids", "attention_mask", "position_ids", *past], ["logits", *present, "magnitude", "phase"]


def _example(model: InferenceModel) -> tuple[Tensor, Tensor, Tensor, list[Memory]]:
    """Return inputs of the right shapes."""
    shape = model.config
    heads = shape.key_value_heads
    cached = torch.zeros(EXAMPLE_BATCH, heads, EXAMPLE_CACHED, shape.head_dim)
    return (
        torch.zeros(EXAMPLE_BATCH, EXAMPLE_READ, dtype=torch.long),
        torch.ones(EXAMPLE_BATCH, EXAMPLE_CACHED + EXAMPLE_READ, dtype=torch.long),
        torch.arange(EXAMPLE_CACHED, EXAMPLE_CACHED + EXAMPLE_READ).expand(EXAMPLE_BATCH, -1).clone(),
        [(cached.clone(), cached.clone()) for _ in model.backbone.layers],
    )


def _with_readable_sizes(proto: ModelProto) -> ModelProto:
    """Name the sizes that change, which the exporter calls s26 or s26 + s70."""
    axes = {"attention_mask": (BATCH, WHOLE), "logits": (BATCH, READ)}
    for value in (*proto.graph.input, *proto.graph.output):
        is_cache, is_past = "." in value.name, value.name.startswith("past")
        of_cache = (BATCH, None, CACHED if is_past else WHOLE)
        chosen = of_cache if is_cache else axes.get(value.name, (BATCH, READ))
        for dimension, name in zip(value.type.tensor_type.shape.dim, chosen, strict=False):
            if name is not None:
                dimension.dim_param = name
    del proto.graph.value_info[:]  # of the tensors between, with the old names
    return proto


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, the exporter and the quantiser say nothing below an error: they warn of what is no fault here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", None)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
