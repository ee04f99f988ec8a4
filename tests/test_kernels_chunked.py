"""The chunked kernels against float64 autograd of the plain formula: values, all gradients, every option."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from indraquantum.kernels import ObjectiveOptions, fused_linear_objective
from indraquantum.kernels import cpu as cpu_kernel
from indraquantum.kernels.arguments import check_inputs
from indraquantum.kernels.attach import differentiable_objective
from indraquantum.kernels.cpu import cpu_plan, rounded_plan
from indraquantum.kernels.cuda import cuda_plan
from indraquantum.kernels.lanes import Lanes
from indraquantum.kernels.reference import reference_objective

N, D, V, K = 29, 13, 211, 7
INPUTS = ("states", "table", "bias", "scale")


def make_case(seed=0, num_rows=N, width=D, vocabulary=V, kept=K, size=1.0, top_k=False):
    """Float64 inputs with an ignored row, a row without ids, a repeated id and the label among the ids."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * size

    labels = torch.randint(0, vocabulary, (num_rows,), generator=generator)
    ids = torch.rand(num_rows, vocabulary, generator=generator).argsort(dim=1)[:, :kept].contiguous()
    probs = torch.rand(num_rows, kept, generator=generator, dtype=torch.float64)
    probs = probs / probs.sum(dim=1, keepdim=True) * (0.8 if top_k else 1.0)
    if num_rows > 5:
        labels[1], ids[2], ids[4, 0] = -100, -1, labels[4]
        if kept > 1:
            ids[3, 1] = ids[3, 0]
            ids[5, -1] = -1
    return {
        "states": normal(num_rows, width), "table": normal(vocabulary, width), "labels": labels,
        "bias": normal(vocabulary) * 0.3, "scale": torch.tensor(0.31, dtype=torch.float64),
        "ids": ids, "probs": probs, "token_count": None,
    }  # fmt: skip


def evaluate(objective, case, options, dtype=torch.float64):
    """Return values and gradients of one implementation, converted to float64."""
    leaves = {name: None if case[name] is None else case[name].to(dtype).detach().requires_grad_() for name in INPUTS}
    inputs = check_inputs(
        leaves["states"], leaves["table"], case["labels"], bias_V=leaves["bias"], scale=leaves["scale"],
        signal_ids_NK=case["ids"], signal_probs_NK=case["probs"].to(torch.promote_types(dtype, torch.float32)),
        token_count=case["token_count"],
    )  # fmt: skip
    result = objective(inputs, options)
    result.total.backward()
    values = {name: value for name, value in result._asdict().items() if value is not None}
    gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
    return {name: value.detach().double() for name, value in (values | gradients).items()}


def cpu(rows=None, tile=1000, lanes=1):
    """The CPU's kernel with chunks of any size and any number of threads."""

    def objective(inputs, options):
        plan = cpu_plan(inputs.table_VD.shape[0], inputs.states_ND.dtype, rows, tile, lanes)
        return differentiable_objective(inputs, options, plan)

    return objective


def assert_close(actual, expected, tolerance):
    """Largest error of each value and gradient, relative to the largest entry of what is expected."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).abs().max().item()
        assert error <= tolerance * max(value.abs().max().item(), 1e-4), f"{name}: off by {error}"


ALL_OPTIONS = {
    "plain": ObjectiveOptions(),
    "kd": ObjectiveOptions(kd_weight=0.7),
    "warm": ObjectiveOptions(kd_weight=0.7, temperature=2.0),
    "cool": ObjectiveOptions(kd_weight=0.7, temperature=0.3),
    "bucket": ObjectiveOptions(kd_weight=0.7, tail="bucket"),
    "warm bucket": ObjectiveOptions(kd_weight=0.7, temperature=2.0, tail="bucket"),
    "uniform": ObjectiveOptions(kd_weight=0.7, tail="uniform"),
    "warm uniform": ObjectiveOptions(kd_weight=0.7, temperature=3.0, tail="uniform"),
    "reported": ObjectiveOptions(kd_weight=0.0, temperature=2.0, tail="bucket"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL_OPTIONS)
@pytest.mark.parametrize("top_k", [False, True])
def test_float32_equals_the_float64_reference(name, top_k):
    case = make_case(top_k=top_k)
    expected = evaluate(reference_objective, case, ALL_OPTIONS[name])
    assert_close(evaluate(cpu(11, 64, lanes=2), case, ALL_OPTIONS[name], torch.float32), expected, 1e-5)


@pytest.mark.parametrize("name", ALL_OPTIONS)
def test_float64_equals_the_reference_closely(name):
    """Far below float32's rounding: the formulas are the same, not merely near."""
    case = make_case(seed=1, top_k=True)
    expected = evaluate(reference_objective, case, ALL_OPTIONS[name])
    assert_close(evaluate(cpu(7, 50, lanes=3), case, ALL_OPTIONS[name]), expected, 1e-12)


@pytest.mark.parametrize("name", ["kd", "warm bucket", "uniform"])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_rows": 1, "kept": 1},
        {"num_rows": 1, "kept": V},
        {"kept": V},
        {"kept": 1},
        {"vocabulary": 2, "kept": 2},
        {"vocabulary": 1, "kept": 1},
        {"width": 1},
    ],
    ids=str,
)
def test_extreme_shapes(name, shape):
    case = make_case(seed=2, top_k=True, **shape)
    expected = evaluate(reference_objective, case, ALL_OPTIONS[name])
    assert_close(evaluate(cpu(rows=5, tile=17), case, ALL_OPTIONS[name]), expected, 1e-11)


@pytest.mark.parametrize("rows", [1, 9, 10, 28, 29, 30])
@pytest.mark.parametrize("tile", [1, 105, 210, 211, 212])
def test_chunk_boundaries(rows, tile):
    case = make_case(seed=3)
    expected = evaluate(reference_objective, case, ALL_OPTIONS["kd"])
    assert_close(evaluate(cpu(rows, tile), case, ALL_OPTIONS["kd"]), expected, 1e-12)


@pytest.mark.parametrize("name", ["plain", "kd", "warm", "warm bucket", "uniform"])
def test_extreme_logits_do_not_overflow(name):
    """Logits up to +-1e4: finite, and the values still agree with float64."""
    case = make_case(seed=4, top_k=True)
    case["states"] *= 1e4 / (case["states"] @ case["table"].T).abs().max()
    case["scale"], case["bias"] = None, None
    case["states"], case["table"] = case["states"].float().double(), case["table"].float().double()
    expected = evaluate(reference_objective, case, ALL_OPTIONS[name])
    actual = evaluate(cpu(rows=11, tile=64), case, ALL_OPTIONS[name], torch.float32)
    assert all(value.isfinite().all() for value in actual.values())
    for value in ("total", "ce", *(["kd"] if "kd" in expected else [])):
        assert actual[value].item() == pytest.approx(expected[value].item(), rel=1e-5)
    assert_close(actual, expected, 2e-2)  # a logit of 1e4 is itself known to 1e-3 only in float32


@pytest.mark.parametrize("size", [0.05, 1.0, 30.0])
def test_both_ways_to_a_safe_exponential(size):
    """Small logits need no maximum, large ones do; the same answer either way."""
    case = make_case(seed=5, size=size)
    expected = evaluate(reference_objective, case, ALL_OPTIONS["kd"])
    assert_close(evaluate(cpu(rows=8, tile=64), case, ALL_OPTIONS["kd"]), expected, 1e-11)


@pytest.mark.parametrize("lanes", [1, 2, 5, 300])
def test_lanes_share_the_vocabulary(lanes):
    threads = torch.get_num_threads()
    case = make_case(seed=12, size=8.0)
    expected = evaluate(reference_objective, case, ALL_OPTIONS["warm bucket"])
    actual = evaluate(cpu(8, 30, lanes), case, ALL_OPTIONS["warm bucket"])
    assert_close(actual, expected, 1e-11)
    again = evaluate(cpu(8, 30, lanes), case, ALL_OPTIONS["warm bucket"])
    assert all(torch.equal(actual[name], again[name]) for name in actual)
    assert torch.get_num_threads() == threads


def test_lanes_give_threads_back_after_an_error():
    threads = torch.get_num_threads()

    def fail(tiles):
        raise ArithmeticError(f"in {tiles}")

    with pytest.raises(ArithmeticError, match="slice"), Lanes(V, 50, 2) as lanes:
        lanes.map(fail)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("vocabulary", "tile", "count"), [(211, 50, 3), (7, 1, 9), (1, 10, 1), (100, 100, 1)])
def test_lanes_cover_the_vocabulary_once(vocabulary, tile, count):
    tiles = [tile for lane in Lanes(vocabulary, tile, count).tiles for tile in lane]
    assert [token for piece in tiles for token in range(piece.start, piece.stop)] == list(range(vocabulary))
    assert max(piece.stop - piece.start for piece in tiles) <= tile


def test_all_rows_ignored():
    case = make_case()
    case["labels"].fill_(-100)
    for options in (ALL_OPTIONS["kd"], ALL_OPTIONS["warm bucket"]):
        assert all((value == 0).all() for value in evaluate(cpu(), case, options).values())
        assert all((value == 0).all() for value in evaluate(reference_objective, case, options).values())


def test_no_rows_at_all():
    table = torch.randn(V, D, requires_grad=True)
    result = fused_linear_objective(torch.zeros(0, D), table, torch.zeros(0, dtype=torch.long))
    result.total.backward()
    assert result.total.item() == 0
    assert (table.grad == 0).all()


def test_plain_cross_entropy_is_torchs():
    case = make_case(seed=6)
    logits = 0.31 * case["states"] @ case["table"].T + case["bias"]
    actual = evaluate(cpu(rows=6), case, ObjectiveOptions())
    expected = F.cross_entropy(logits, case["labels"])
    torch.testing.assert_close(actual["total"], expected)


def test_non_contiguous_inputs():
    case = make_case(seed=7)
    expected = evaluate(cpu(rows=6), case, ALL_OPTIONS["kd"])
    case["states"] = case["states"].T.contiguous().T
    case["table"] = torch.stack((case["table"], case["table"]), dim=1)[:, 1]
    case["ids"], case["probs"] = (case[name].T.contiguous().T for name in ("ids", "probs"))
    case["labels"] = torch.stack((case["labels"], case["labels"]), dim=1)[:, 0]
    assert_close(evaluate(cpu(rows=6), case, ALL_OPTIONS["kd"]), expected, 1e-13)


@settings(max_examples=40)
@given(
    num_rows=st.integers(1, 13),
    width=st.integers(1, 9),
    vocabulary=st.integers(2, 37),
    kept=st.integers(1, 6),
    rows=st.integers(1, 14),
    tile=st.integers(1, 40),
    seed=st.integers(0, 999),
    name=st.sampled_from(sorted(ALL_OPTIONS)),
    masked=st.lists(st.booleans(), min_size=13, max_size=13),
    silent=st.lists(st.booleans(), min_size=13, max_size=13),
)
def test_any_shape_and_mask(num_rows, width, vocabulary, kept, rows, tile, seed, name, masked, silent):
    case = make_case(seed, num_rows, width, vocabulary, min(kept, vocabulary), top_k=True)
    case["labels"][torch.tensor(masked[:num_rows])] = -100
    case["ids"][torch.tensor(silent[:num_rows])] = -1
    case["ids"][:, 0] = case["ids"][:, -1]  # repeated in every row
    expected = evaluate(reference_objective, case, ALL_OPTIONS[name])
    assert_close(evaluate(cpu(rows, tile), case, ALL_OPTIONS[name]), expected, 1e-10)


@pytest.mark.parametrize("name", ["kd", "warm bucket", "uniform"])
def test_gradcheck_of_the_reference(name):
    case = make_case(seed=9, num_rows=7, width=3, vocabulary=11, kept=3, top_k=True)
    leaves = [case[part].requires_grad_() for part in INPUTS]

    def total(states, table, bias, scale):
        return fused_linear_objective(
            states, table, case["labels"], bias_V=bias, scale=scale, signal_ids_NK=case["ids"],
            signal_probs_NK=case["probs"], options=ALL_OPTIONS[name], implementation="reference",
        ).total  # fmt: skip

    assert torch.autograd.gradcheck(total, leaves)


def test_cuda_arithmetic_emulated():
    """Bfloat16 operands and float32 sums: as near to the exact answer as rounding the operands allows."""
    case = make_case(seed=10)
    case |= {name: case[name].bfloat16().double() for name in INPUTS}
    expected = evaluate(reference_objective, case, ALL_OPTIONS["kd"])

    def emulated(inputs, options):
        return differentiable_objective(inputs, options, cuda_plan(inputs, rows=6))

    actual = evaluate(emulated, case, ALL_OPTIONS["kd"], torch.bfloat16)
    assert_close(actual, expected, 2e-2)
    for value in ("total", "ce", "kd"):  # forward, operands that are bfloat16 already lose little: the scaled states
        assert actual[value].item() == pytest.approx(expected[value].item(), rel=1e-3)
    full = evaluate(emulated, case, ALL_OPTIONS["kd"])
    assert_close(full, expected, 1e-12)


@pytest.mark.parametrize("name", ALL_OPTIONS)
@pytest.mark.parametrize("size", [0.3, 1.0, 8.0])  # logits up to 1, 12 and 800
def test_products_in_bfloat16_on_a_cpu(name, size):
    """As near to the exact answer as rounding the operands and the exponentials allows, with and without keeping them.

    Processors without units for bfloat16 multiply more exactly.
    """
    case = make_case(seed=13, top_k=True, size=size)
    case |= {name: case[name].bfloat16().double() for name in INPUTS}
    expected = evaluate(reference_objective, case, ALL_OPTIONS[name])

    def rounded(inputs, options):
        return differentiable_objective(inputs, options, rounded_plan(V, rows=6, tile=64, lanes=2))

    actual = evaluate(rounded, case, ALL_OPTIONS[name], torch.bfloat16)
    assert_close(actual, expected, 2e-2 if size < 8 else 0.2)
    for value in {"total", "ce", "kd"} & expected.keys():
        assert actual[value].item() == pytest.approx(expected[value].item(), rel=3e-3)


@pytest.mark.parametrize(("units", "dtype", "rounds"), [
    (True, torch.bfloat16, True), (True, torch.float32, False), (False, torch.bfloat16, False)
])  # fmt: skip
def test_bfloat16_states_ask_for_such_products_where_the_processor_has_them(monkeypatch, units, dtype, rounds):
    monkeypatch.setattr(cpu_kernel, "has_16_bit_units", lambda: units)
    case, seen = make_case(seed=14), []
    original = cpu_kernel.differentiable_objective
    monkeypatch.setattr(
        cpu_kernel, "differentiable_objective",
        lambda inputs, options, plan: (seen.append(plan), original(inputs, options, plan))[1],
    )  # fmt: skip
    fused_linear_objective(case["states"].to(dtype), case["table"].float(), case["labels"])
    (plan,) = seen
    assert (plan.kept is torch.bfloat16) == rounds
    assert plan.dtype is torch.float32


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "reference"])
def test_the_choice_can_be_forced(name):
    case = make_case(seed=11)
    arguments = (case["states"], case["table"], case["labels"])
    result = fused_linear_objective(*arguments, implementation=name)
    torch.testing.assert_close(result.total, F.cross_entropy(case["states"] @ case["table"].T, case["labels"]))


def test_an_unknown_implementation_is_named():
    case = make_case()
    with pytest.raises(ValueError, match="implementation: got tpu; must be one of auto, reference, cpu, cuda"):
        fused_linear_objective(case["states"], case["table"], case["labels"], implementation="tpu")
