"""Born's rule: complex arithmetic and torch's own losses on all logits at once as the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from indraquantum.kernels import ObjectiveOptions, fused_linear_objective
from indraquantum.kernels.born import BORN_EPSILON, BORN_ROWS

D, V, K = 14, 101, 5
NAMES = ("states", "table", "bias", "scale")


def make_case(rows):
    """Row 3 has no label, row 5 has no signals, and each row has its own weight. The numbers are doubles."""
    generator = torch.Generator().manual_seed(11)
    case = {
        "states": torch.randn(rows, D, generator=generator, dtype=torch.float64),
        "table": torch.randn(V, D, generator=generator, dtype=torch.float64),
        "bias": torch.randn(V, generator=generator, dtype=torch.float64),
        "scale": torch.tensor(0.3, dtype=torch.float64),
    }
    case = {name: tensor.requires_grad_() for name, tensor in case.items()}
    labels = torch.randint(0, V, (rows,), generator=generator)
    ids = torch.rand(rows, V, generator=generator).argsort(dim=1)[:, :K].contiguous()
    probs = torch.rand(rows, K, generator=generator, dtype=torch.float64).softmax(dim=1)
    labels[3], ids[5] = -100, -1
    return case, labels, ids, probs


def by_hand(case, labels, ids, probs, kd_weight, temperature):
    """Cross-entropy and KL divergence from the squared moduli of complex inner products."""
    psi, table = (torch.complex(*case[name].chunk(2, dim=1)) for name in ("states", "table"))
    inner = case["scale"] * torch.einsum("vj,nj->nv", table.conj(), psi)
    logits = torch.log(inner.abs() ** 2 + BORN_EPSILON) + case["bias"]
    count = int((labels >= 0).sum())
    taught = (labels >= 0) & (ids >= 0).any(dim=1)
    q = torch.zeros_like(logits[taught]).scatter_add(1, ids[taught], probs[taught])
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / count
    log_p = (logits[taught] / temperature).log_softmax(dim=1)
    kd = temperature**2 * F.kl_div(log_p, q, reduction="sum") / count
    return ce, kd, ce + kd_weight * kd


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rows", [23, 2 * BORN_ROWS + 11])
def test_terms_and_gradients_equal_the_formula(rows, temperature):
    case, labels, ids, probs = make_case(rows)
    ce, kd, total = by_hand(case, labels, ids, probs, 0.7, temperature)
    expected = torch.autograd.grad(total, case.values())
    options = ObjectiveOptions(kd_weight=0.7, temperature=temperature, head="born")
    found = fused_linear_objective(
        case["states"], case["table"], labels, bias_V=case["bias"], scale=case["scale"], signal_ids_NK=ids,
        signal_probs_NK=probs, options=options,
    )  # fmt: skip
    torch.testing.assert_close((found.ce, found.kd), (ce.detach(), kd.detach()))
    gradients = torch.autograd.grad(found.total, case.values())
    for name, gradient, wanted in zip(NAMES, gradients, expected, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, msg=name)


def test_no_rows_and_no_labels_give_zero():
    case, labels, *_ = make_case(7)
    for rows in (0, 7):
        unlabelled, options = torch.full_like(labels[:rows], -100), ObjectiveOptions(head="born")
        found = fused_linear_objective(case["states"][:rows], case["table"], unlabelled, options=options)
        assert found.total.item() == 0
        assert not torch.autograd.grad(found.total, case["table"])[0].any()


def test_halves_are_computed_in_the_higher_precision_of_states_and_table():
    case, labels, *_ = make_case(23)
    states, table = case["states"].detach().bfloat16(), case["table"].detach().float()
    options = ObjectiveOptions(head="born")
    rounded = fused_linear_objective(states.float(), table, labels, options=options)
    assert fused_linear_objective(states, table, labels, options=options).ce == rounded.ce
    narrow = fused_linear_objective(states.float(), table.bfloat16(), labels, options=options)
    assert narrow.ce == fused_linear_objective(states.float(), table.bfloat16().float(), labels, options=options).ce


@pytest.mark.parametrize(("head", "implementation"), [("borne", "auto"), ("born", "cpu")])
def test_what_is_not_served_is_refused(head, implementation):
    case, labels, *_ = make_case(7)
    with pytest.raises(ValueError, match=r"head: got borne|implementation: got cpu; must be auto for the head"):
        fused_linear_objective(
            case["states"], case["table"], labels, options=ObjectiveOptions(head=head), implementation=implementation
        )
