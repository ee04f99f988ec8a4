"""Products through oneDNN are exact or not used."""

from __future__ import annotations

import pytest
import torch

from indraquantum.kernels import onednn
from indraquantum.kernels.onednn import agrees_with_float64, is_exact, onednn_products

CPU = torch.device("cpu")


def test_a_product_that_rounds_its_operands_is_found_out():
    assert agrees_with_float64(torch.mm)
    assert not agrees_with_float64(lambda left, right: left.bfloat16().float() @ right)
    assert not agrees_with_float64(lambda left, right: (left @ right).bfloat16().float())


def test_only_a_transposed_operand_rounds():
    def product(left, right):
        return left @ (right if right.is_contiguous() else right.bfloat16().float())

    assert not agrees_with_float64(product)


@pytest.mark.parametrize(("exact", "inside"), [(True, "bf16"), (False, None)])
def test_torch_is_told_only_where_the_probe_agrees_and_told_back(monkeypatch, exact, inside):
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    monkeypatch.setattr(onednn, "is_exact", lambda: exact)
    seen = []

    @onednn_products(CPU)
    def work():
        seen.append(settings.fp32_precision)
        raise KeyError

    with pytest.raises(KeyError):
        work()
    assert seen == [inside or before]
    assert settings.fp32_precision == before


def test_products_on_this_machine_are_exact_inside():
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(997, 251, generator=generator), torch.randn(251, 127, generator=generator)
    exact = left.double() @ right.double()
    with onednn_products(CPU):
        inside = left @ right
        added = torch.ones(997, 127).addmm_(left, right)
    assert (inside - exact).norm() <= 1e-6 * exact.norm()
    assert (added - 1 - exact).norm() <= 1e-6 * exact.norm()


def test_the_probe_is_made_once():
    is_exact()
    hits = is_exact.cache_info().hits
    is_exact()
    assert is_exact.cache_info().hits == hits + 1
