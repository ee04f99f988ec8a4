"""How the objective behaves as part of autograd, and what its targets mean in expectation."""

import pytest
import torch

from indraquantum.kernels import ObjectiveOptions, fused_linear_objective
from indraquantum.kernels.chunked import Products
from indraquantum.kernels.cuda import Bfloat16Products

N, D, V = 19, 11, 101


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, generator=generator, requires_grad=True)
    table = torch.randn(V, D, generator=generator, requires_grad=True)
    return states, table, torch.randint(0, V, (N,), generator=generator)


def test_same_inputs_same_bits(inputs):
    states, table, labels = inputs
    ids = torch.randint(0, V, (N, 5))
    probs = torch.full((N, 5), 0.2)
    gradients = []
    for _ in range(2):
        total = fused_linear_objective(
            states, table, labels, signal_ids_NK=ids, signal_probs_NK=probs, options=ObjectiveOptions(kd_weight=0.5)
        ).total
        gradients.append((total, *torch.autograd.grad(total, (states, table))))
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_backward_scales(inputs):
    states, table, labels = inputs
    once = torch.autograd.grad(fused_linear_objective(states, table, labels).total, (states, table))
    thrice = torch.autograd.grad(3 * fused_linear_objective(states, table, labels).total, (states, table))
    for gradient, scaled in zip(once, thrice, strict=True):
        torch.testing.assert_close(scaled, 3 * gradient)


def test_backward_through_a_retained_graph(inputs):
    states, table, labels = inputs
    total = fused_linear_objective(states, table, labels).total
    first = torch.autograd.grad(2 * total, (states, table), retain_graph=True)
    second = torch.autograd.grad(total, (states, table))
    for gradient, scaled in zip(second, first, strict=True):
        torch.testing.assert_close(scaled, 2 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, (states, table))


def test_backward_twice_adds_up(inputs):
    states, table, labels = inputs
    total = fused_linear_objective(states, table, labels).total
    total.backward(retain_graph=True)
    alone = table.grad.clone()
    total.backward()
    torch.testing.assert_close(table.grad, 2 * alone)


def test_gradients_are_handed_over_not_copied(inputs, monkeypatch):
    """At V x D a copy would double the memory: the leaf's gradient is the very tensor that the pass filled."""
    states, table, labels = inputs
    seen = set()
    plain = Products.added

    def added(self, out, left, right):
        seen.add(out.data_ptr())
        plain(self, out, left, right)

    monkeypatch.setattr(Products, "added", added)
    fused_linear_objective(states, table, labels).total.backward()
    assert table.grad.data_ptr() in seen


def test_no_gradient_work_without_gradients(inputs, monkeypatch):
    states, table, labels = inputs

    def added(self, out, left, right):
        raise AssertionError("a product of the backward pass")

    monkeypatch.setattr(Products, "added", added)
    with torch.no_grad():
        total = fused_linear_objective(states, table, labels).total
    assert not total.requires_grad
    detached = fused_linear_objective(states.detach(), table.detach(), labels).total
    torch.testing.assert_close(total, detached)


WAYS = {"auto": {}, "reference": {"implementation": "reference"}, "born": {"options": ObjectiveOptions(head="born")}}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_autocast_changes_nothing(inputs, how):
    """Precision follows the inputs; an autocast region around the loss must not round its sums."""
    states, table, labels = inputs
    expected = fused_linear_objective(states, table, labels, **how).total
    with torch.autocast("cpu", torch.bfloat16):
        actual = fused_linear_objective(states, table, labels, **how).total
    assert torch.equal(actual, expected)
    gradients = (torch.autograd.grad(total, (states, table)) for total in (actual, expected))
    assert all(torch.equal(found, wanted) for found, wanted in zip(*gradients, strict=True))


@pytest.mark.parametrize("implementation", ["cpu", "cuda"])
def test_a_loss_scale_saves_gradients_too_small_for_float16(inputs, implementation):
    states, table, labels = inputs
    found = []
    for dtype in (torch.float16, torch.float32):
        rounded = states.detach().half().to(dtype).requires_grad_()
        total = fused_linear_objective(rounded, table, labels, token_count=1e7, implementation=implementation).total
        (gradient,) = torch.autograd.grad(65536 * total, rounded)
        assert gradient.dtype == dtype
        found.append(gradient.float())
    assert found[1].abs().max() / 65536 < 1e-6  # where float16 has only the multiples of 6e-8
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("frozen", [0, 1])
def test_only_wanted_gradients(inputs, frozen):
    inputs[frozen].requires_grad_(False)
    states, table, labels = inputs
    fused_linear_objective(states, table, labels).total.backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad.abs().sum() > 0


def test_scale_of_zero_has_a_gradient(inputs):
    """The gradient to the scale must not be got by dividing through it."""
    states, table, labels = inputs
    scale = torch.zeros(1, requires_grad=True)
    fused_linear_objective(states, table, labels, scale=scale).total.backward()
    products = states.detach() @ table.detach().T
    expected = products.mean() - products[torch.arange(N), labels].mean()
    torch.testing.assert_close(scale.grad, expected.reshape(1), rtol=1e-4, atol=1e-6)


def kd_gradient(states, table, ids, probs):
    """Gradient to the states of the distillation term alone."""
    labels = torch.zeros(len(states), dtype=torch.long)
    count = float(len(states))
    both = fused_linear_objective(
        states, table, labels, signal_ids_NK=ids, signal_probs_NK=probs, token_count=count,
        options=ObjectiveOptions(kd_weight=1.0),
    ).total  # fmt: skip
    alone = fused_linear_objective(states, table, labels, token_count=count).total
    return torch.autograd.grad(both - alone, states)[0]


def test_sampled_counts_are_unbiased_and_top_k_is_not():
    """Averaged over many draws the gradient is the full distribution's; that of the top 5 stays far off."""
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(1, D, generator=generator, dtype=torch.float64)
    table = torch.randn(V, D, generator=generator, dtype=torch.float64)
    teacher = (torch.randn(V, generator=generator, dtype=torch.float64) * 1.5).softmax(0)
    every = torch.arange(V)[None]
    full = kd_gradient(state.clone().requires_grad_(), table, every, teacher[None])[0]

    draws, repeats = 50, 4000
    drawn = teacher.expand(repeats, V).multinomial(draws, replacement=True, generator=generator)
    states = state.expand(repeats, D).clone().requires_grad_()
    each = kd_gradient(states, table, drawn, torch.full(drawn.shape, 1 / draws, dtype=torch.float64)) * repeats
    error_in_sigmas = (each.mean(0) - full) / (each.std(0) / repeats**0.5)
    assert error_in_sigmas.abs().max() < 4

    top = teacher.topk(5)
    renormalised = (top.values / top.values.sum())[None]
    biased = kd_gradient(state.clone().requires_grad_(), table, top.indices[None], renormalised)[0]
    assert (biased - full).norm() > 0.3 * full.norm()
    assert (each.mean(0) - full).norm() < 0.05 * full.norm()


def test_trains_a_table_to_the_teacher():
    """Distillation alone finds the teacher's distribution, and the estimate of the divergence goes to 0."""
    torch.manual_seed(0)
    teacher = torch.randn(7, 23).softmax(1)
    states = torch.eye(7)
    table = torch.zeros(23, 7, requires_grad=True)
    optimiser = torch.optim.Adam([table], lr=0.1)
    ids = torch.arange(23).expand(7, 23)
    labels = torch.zeros(7, dtype=torch.long)
    for _ in range(300):
        optimiser.zero_grad()
        result = fused_linear_objective(
            states, table, labels, signal_ids_NK=ids, signal_probs_NK=teacher, options=ObjectiveOptions(kd_weight=1e4)
        )
        (result.total / 1e4).backward()
        optimiser.step()
    assert result.kd.item() < 1e-4
    torch.testing.assert_close((states @ table.T).softmax(1), teacher, atol=1e-3, rtol=1e-2)


def test_the_accelerators_products_round_to_bfloat16_and_sum_in_float32():
    """1 + 2^-8 is halfway between bfloat16's neighbours of 1 and rounds to 1; float16 would keep it."""
    products = Bfloat16Products()
    left = torch.full((1, 3), 1 + 2.0**-8)
    right = torch.tensor([[1.0], [2.0**-9], [2.0**-11]])
    out = torch.empty(1, 1)
    products.into(out, left, right)
    assert out.item() == 1 + 2.0**-9 + 2.0**-11  # a bfloat16 sum would have lost the small ones
    products.added(out, left, right)
    assert out.item() == 2 * (1 + 2.0**-9 + 2.0**-11)
