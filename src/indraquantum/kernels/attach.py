"""Attaches the gradients that were computed with a total to autograd: backward only scales them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from indraquantum.kernels.arguments import LinearInputs, ObjectiveOptions, ObjectiveResult
from indraquantum.kernels.chunked import ChunkedObjective, Outcome, Plan, Wanted

_GRADIENTS_OF = ("states_ND", "table_VD", "bias_V", "scale")


def differentiable_objective(inputs: LinearInputs, options: ObjectiveOptions, plan: Plan) -> ObjectiveResult:
    """Run the chunked objective, and compute only the gradients that autograd will ask for."""
    tensors = [getattr(inputs, name) for name in _GRADIENTS_OF]
    wanted = Wanted(*(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors))

    def run(*inputs_again: Tensor | None) -> Outcome:
        again = inputs._replace(**dict(zip(_GRADIENTS_OF, inputs_again, strict=True)))
        # Inference mode is this thread's alone, so the lanes' threads could not write into buffers made in it. Leaving
        # it turns gradients on. Autocast would round some of the sums; the plan alone decides on precision.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(again.states_ND.device.type, enabled=False),
            plan.products.setting(again.states_ND.device),
        ):
            return ChunkedObjective(again, options, plan, wanted).run()

    outcome = run(*tensors)
    if not any(wanted):
        return outcome.result
    total = _Attached.apply(outcome.result.total, list(outcome.gradients), run, *tensors)
    return outcome.result._replace(total=total)


class _Attached(torch.autograd.Function):
    """The total as a function of its inputs, whose gradients are already computed.

    The first backward hands the gradients over without a copy, because V x D numbers are too many to hold twice. A
    second backward through a retained graph computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, total: Tensor, gradients: list[Tensor | None], run: Callable[..., Any], *tensors: Tensor | None
    ) -> Tensor:
        ctx.gradients, ctx.run = gradients, run
        ctx.save_for_backward(*tensors)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if gradients is None:
            gradients = list(ctx.run(*ctx.saved_tensors).gradients)
        ctx.gradients = None
        is_one = grad_total.device.type == "cpu" and grad_total.item() == 1  # elsewhere asking would wait
        for index, (gradient, tensor) in enumerate(zip(gradients, ctx.saved_tensors, strict=True)):
            if gradient is not None:
                scaled = gradient if is_one else gradient.mul_(grad_total)
                gradients[index] = scaled.to(tensor.dtype)
        return None, None, None, *gradients
