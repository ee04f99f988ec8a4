"""The size of a variant and the tokens that it sees, computed before training.

Legend: T positions of a row, d `d_model`, D width of the transformer, m width of the MLP, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from indraquantum.ablation.plan import Budget
from indraquantum.config import TrainSettings
from indraquantum.data.prepared import PreparedDataset
from indraquantum.errors import UserError
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.training.plan import RunStage, plan_run, rows_per_step
from indraquantum.trials.costs import products_of_the_head

FLOPS_FORMULA = (
    "6 (L (4 D² + 3 D m + T D) + V D) + F (V P / B + I): forward and backward, a multiply-add is 2, for rows of T "
    "positions that each hold one document; P weights of the projector, applied to the whole table once a step of B "
    "positions; I weights of the inputs' own projector, if there is one; F is 6, or 4 if the "
    "projectors are frozen and need no gradients; V D twice under Born's rule; as if a step "
    "compared all V tokens, though with the sampled softmax it compares fewer"
)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run."""

    parameters: int  # all, frozen ones too
    table_parameters: int  # those of the embedding table
    flops_per_token: float  # forward and backward, FLOPS_FORMULA
    steps: int  # of the optimiser
    tokens: int  # real ones that the run sees


def sizes_of(settings: TrainSettings, dataset: PreparedDataset) -> Sizes:
    """Return the sizes of a run with `settings`, without allocating its model.

    Raises:
        UserError: the model's settings contradict each other.
    """
    model = _outline(settings, dataset)
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        table_parameters=model.embedding.weight.numel(),
        flops_per_token=flops_per_token(model, dataset.row_length, settings.batch_tokens),
        steps=planned_steps(settings, dataset),
        tokens=planned_tokens(settings, dataset),
    )


def _outline(settings: TrainSettings, dataset: PreparedDataset) -> IndraQuantumPhase2:
    """Return the model of `settings` without memory for its weights."""
    tokenizer = dataset.tokenizer
    config = IndraQuantumConfig.from_settings(
        settings, tokenizer.vocabulary_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id
    )
    with torch.device("meta"):
        return IndraQuantumPhase2(config)


def within_budget(settings: TrainSettings, budget: Budget, dataset: PreparedDataset) -> TrainSettings:
    """Return `settings` with the width of the MLP that brings the model nearest to `budget`.

    Raises:
        UserError: even the narrowest MLP costs more, or the model's settings contradict each other.
    """
    wanted = budget.parameters or budget.mflop_per_token * 1e6

    def cost(width: int) -> float:
        model = _outline(settings.model_copy(update={"mlp_width": width}), dataset)
        if budget.parameters:
            return sum(p.numel() for p in model.parameters())
        return flops_per_token(model, dataset.row_length, settings.batch_tokens)

    one, two = cost(1), cost(2)  # the cost grows by the same amount for each unit of width
    width = round(1 + (wanted - one) / (two - one))
    if width < 1:
        unit = "parameters" if budget.parameters else "FLOPs a token"
        raise UserError("budget", f"{wanted:,.0f} {unit}", f"must be at least {one:,.0f} for the other sizes")
    return settings.model_copy(update={"mlp_width": width})


def flops_per_token(model: IndraQuantumPhase2, row_length: int, batch_tokens: int) -> float:
    """Return the floating-point operations of forward and backward for each trained token, by FLOPS_FORMULA."""
    config = model.config
    layers = sum(p.numel() for p in model.backbone.parameters() if p.ndim == 2)
    attention = config.num_hidden_layers * row_length * config.hidden_size
    projector = sum(p.numel() for p in model.projector.parameters() if p.ndim == 2)
    head = config.vocab_size * config.hidden_size * products_of_the_head(model)
    inputs = 0 if model.input_projector is None else projector
    positions = rows_per_step(batch_tokens, row_length) * row_length
    factor = 6 if any(p.requires_grad for p in model.projector.parameters()) else 4
    return 6 * (layers + attention + head) + factor * (config.vocab_size * projector / positions + inputs)


def planned_steps(settings: TrainSettings, dataset: PreparedDataset) -> int:
    """Return the optimiser steps of a run."""
    return plan_run(settings, dataset).total_steps


def planned_tokens(settings: TrainSettings, dataset: PreparedDataset) -> int:
    """Return the real tokens that a run sees, row by row as it draws them."""
    return sum(_tokens_seen(stage) for stage in plan_run(settings, dataset).stages)


def _tokens_seen(stage: RunStage) -> int:
    offsets = stage.train.row_token_offsets
    lengths = offsets[1:] - offsets[:-1]
    epochs, rest = divmod(stage.steps, stage.steps_per_epoch)
    drawn = [stage.rows_of(step) for step in range(stage.end - rest, stage.end)]
    return int(epochs * lengths.sum() + sum(lengths[rows].sum() for rows in drawn))
