"""The cost of a model and its training step: parameters by part, FLOPs and bytes.

A multiply-add counts as two FLOPs, and a backward pass as two forward passes. Element-wise work is not counted.

Legend: B rows, T positions, N labelled tokens, D real width, V vocabulary, R reference states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from indraquantum.kernels.born import BORN_ROWS
from indraquantum.kernels.cpu import cpu_plan
from indraquantum.kernels.cuda import cuda_plan_rows
from indraquantum.model.modeling import IndraQuantumPhase2

# The modules of each part, by their names in the model.
PARTS = {
    "table": ("embedding",),
    "projector": ("projector", "input_projector"),
    "layers": ("backbone",),
    "head": ("head",),
    "readout": ("readout",),
}

BORN_KEPT = 7  # tensors as large as the logits: both products, their sum of squares, softmaxes, targets


def parameter_counts(model: IndraQuantumPhase2) -> dict[str, int]:
    """Return the parameters of each part and of the whole model, including frozen ones."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[next(part for part, modules in PARTS.items() if name.split(".")[0] in modules)] += parameter.numel()
    return {**counts, "all": sum(counts.values())}


@dataclass(frozen=True)
class StepSize:
    """The sizes of one optimiser step."""

    rows: int  # B
    row_length: int  # T
    labelled: int  # N, of the B * T positions
    compared: int | None = None  # tokens that the step compares, with sampled softmax; None means all V


def step_flops(model: IndraQuantumPhase2, size: StepSize) -> dict[str, int]:
    """Return the FLOPs of one optimiser step, forward and backward, by part and together.

    Attention is counted over whole rows, as it is computed. The table is lifted once in each step. `inputs` is 0 if the
    inputs come from that table, which must then be whole, or have no projector.
    """
    config, width = model.config, model.config.hidden_size
    positions = size.rows * size.row_length
    compared, of_inputs = config.vocab_size, model.input_projector
    if size.compared is not None:
        compared, of_inputs = size.compared, of_inputs or model.projector
    forward = {
        "lift": 2 * compared * _matrix_elements(model.projector),
        "inputs": 2 * positions * _matrix_elements(of_inputs),
        "layers": 2 * positions * _matrix_elements(model.backbone),
        "attention": 4 * positions * size.row_length * width * config.num_hidden_layers,
        "objective": 2 * size.labelled * compared * width * products_of_the_head(model),
        "readout": 2 * size.labelled * 2 * sum(p.numel() for p in model.readout.parameters()),
    }
    # A frozen projector passes the gradient on to the table, but gets none itself.
    backward = {part: flops * 2 for part, flops in forward.items()}
    if not any(p.requires_grad for p in model.projector.parameters()):
        backward |= {part: forward[part] for part in ("lift", "inputs")}
    if config.head == "born":  # its logits are computed again in the backward pass
        backward["objective"] += forward["objective"]
    flops = {part: forward[part] + backward[part] for part in forward}
    return {**flops, "all": sum(flops.values())}


def products_of_the_head(model: IndraQuantumPhase2) -> int:
    """Return how many products with the lifted table the logits need: one, or two with Born's rule."""
    return 2 if model.config.head == "born" else 1


def _matrix_elements(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters() if p.ndim == 2)


def objective_bytes(model: IndraQuantumPhase2, size: StepSize, device: torch.device) -> int:
    """Return the bytes of the objective's buffer: a chunk's logits, or with Born's rule all that autograd keeps."""
    vocabulary, labelled = size.compared or model.config.vocab_size, size.labelled
    if model.config.head == "born":
        return min(BORN_ROWS, max(1, labelled)) * vocabulary * torch.float32.itemsize * BORN_KEPT
    rows = cpu_plan(vocabulary, torch.float32).rows if device.type == "cpu" else cuda_plan_rows(vocabulary)
    # On CUDA, where --precision auto takes 16 bits, a copy in bfloat16 stands beside the buffer.
    itemsize = torch.float32.itemsize + (torch.bfloat16.itemsize if device.type == "cuda" else 0)
    return min(rows, max(1, labelled)) * vocabulary * itemsize
