"""The contract of SemanticDistillationLoss, from outside: values by hand, masks, errors, accumulation."""

import math

import pytest
import torch
import torch.nn.functional as F

from indraquantum.kernels import softmax
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals

N, D, V, K = 23, 7, 101, 5


def make_case(seed=0, dtype=torch.float64, num_rows=N):
    """Row 3 has no label, row 5 no signals, row 7 a repeated id, row 11 the label among its ids."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(num_rows, D, generator=generator, dtype=dtype).requires_grad_()
    table = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (num_rows,), generator=generator)
    ids = torch.rand(num_rows, V, generator=generator).argsort(dim=1)[:, :K].contiguous()
    probs = torch.rand(num_rows, K, generator=generator, dtype=dtype).softmax(dim=1)
    labels[3], ids[5], ids[11, 2] = -100, -1, labels[11]
    ids[7, 1] = ids[7, 0]
    ids[13, 4], probs[13, 3] = -1, probs[13, 3] + probs[13, 4]
    entropy = torch.rand(num_rows, generator=generator, dtype=dtype) * 4
    confidence = torch.rand(num_rows, generator=generator, dtype=dtype)
    amplitude = torch.randn(
        num_rows, generator=generator, dtype=torch.complex128 if dtype == torch.float64 else torch.complex64
    ).requires_grad_()
    return states, table, labels, TeacherSignals(ids, probs, entropy, confidence), amplitude


def dense(signals, dtype=torch.float64):
    """The signals as a full N x V distribution, row by row."""
    q = torch.zeros(signals.ids_NK.shape[0], V, dtype=dtype)
    for row, (ids, probs) in enumerate(zip(signals.ids_NK.tolist(), signals.probs_NK.tolist(), strict=True)):
        for token, probability in zip(ids, probs, strict=True):
            if token >= 0:
                q[row, token] += probability
    return q


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_terms_equal_the_plain_formulas(temperature):
    states, table, labels, signals, amplitude = make_case()
    objective = SemanticDistillationLoss(0.3, 0.2, 0.7, temperature)
    terms = objective(states, table, labels, signals=signals, amplitude_N=amplitude)

    logits = (states @ table.T).detach()
    count = N - 1
    both = [row for row in range(N) if row not in (3, 5)]
    q, log_p = dense(signals)[both], (logits[both] / temperature).log_softmax(1)
    ce = F.cross_entropy(logits, labels, ignore_index=-100)
    kd = temperature**2 * F.kl_div(log_p, q, reduction="sum") / count
    kd_estimate = (-(q * log_p).sum() - signals.entropy_N[both].sum()) / count
    c = amplitude.detach()[both]
    phase = (1 - torch.cos(c.angle() - math.pi * signals.entropy_N[both] / math.log(V))).sum() / count
    magnitude = ((c.abs() - signals.confidence_N[both]) ** 2).sum() / count

    torch.testing.assert_close(terms.ce, ce)
    torch.testing.assert_close(terms.kd, kd)
    if temperature == 1:
        torch.testing.assert_close(terms.kd_estimate, kd_estimate)
    else:  # the entropy at the temperature is not there
        assert terms.kd_estimate is None
    torch.testing.assert_close(terms.phase, phase, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms.magnitude, magnitude)
    total = terms.ce + 0.3 * terms.kd + 0.2 * terms.phase + 0.7 * terms.magnitude
    torch.testing.assert_close(terms.total.detach(), total)
    assert not any(term.requires_grad for term in terms[1:6] if term is not None)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_the_tail_of_the_likeliest_tokens_is_one_more_outcome(temperature, implementation):
    """By default, it is torch's own KL over K + 1 outcomes, for any missing mass. `none` leaves out the last one."""
    states, table, labels, _, _ = make_case()
    teacher = (2 * torch.randn(N, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).softmax(1)
    teacher[2] = F.one_hot(torch.tensor(17), V)  # nothing is missing
    probs, ids = teacher.topk(K, dim=1)
    ids[5] = -1
    signals, rows = TeacherSignals(ids, probs), [row for row in range(N) if row not in (3, 5)]
    log_p = (states @ table.T / temperature).log_softmax(1)
    known = log_p.gather(1, ids.clamp(min=0))[rows]
    rest = log_p.scatter(1, ids.clamp(min=0), -torch.inf)[rows].logsumexp(1, keepdim=True)
    missing = (1 - probs[rows].sum(1, keepdim=True)).clamp(min=0)
    assert 0 < missing[0] < 1
    scale = temperature**2 / (N - 1)
    lump = scale * F.kl_div(torch.cat((known, rest), 1), torch.cat((probs[rows], missing), 1), reduction="sum")
    alone = scale * F.kl_div(known, probs[rows], reduction="sum")
    for options, expected in (({}, lump), ({"tail": "none"}, alone)):
        objective = SemanticDistillationLoss(0.3, temperature=temperature, implementation=implementation, **options)
        terms = objective(states, table, labels, signals=signals)
        torch.testing.assert_close(terms.kd, expected.detach(), rtol=1e-10, atol=0)
        whole = 0.3 * expected + F.cross_entropy(states @ table.T, labels, ignore_index=-100)
        for actual, wanted in zip(
            *(torch.autograd.grad(total, (states, table), retain_graph=True) for total in (terms.total, whole)),
            strict=True,
        ):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-12)


def test_a_student_that_could_be_its_teacher_becomes_it_by_a_bucket_and_not_without():
    """The true KL of a linear student of the teacher's own states, fitted to the 5 likeliest of 101 tokens."""
    generator = torch.Generator().manual_seed(3)
    states, truth = (torch.randn(size, 6, generator=generator) for size in (300, V))
    log_q = (states @ truth.T).log_softmax(1)
    probs, ids = log_q.exp().topk(K, dim=1)
    labels, divergence = torch.zeros(len(states), dtype=torch.long), {}
    for tail in ("none", "bucket", "uniform"):
        table = torch.zeros(V, 6, requires_grad=True)
        objective = SemanticDistillationLoss(1e4, tail=tail)
        optimiser = torch.optim.Adam([table], lr=0.05)
        for _ in range(200):
            optimiser.zero_grad()
            (objective(states, table, labels, signals=TeacherSignals(ids, probs)).total / 1e4).backward()
            optimiser.step()
        log_p = (states @ table.detach().T).log_softmax(1)
        divergence[tail] = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean").item()
    assert divergence["none"] > 0.3
    assert 0.15 < divergence["uniform"] < 0.25
    assert divergence["bucket"] < 0.1


def test_signals_that_sum_to_1_have_no_tail_and_cost_no_pass_for_one(monkeypatch):
    states, table, labels, signals, _ = make_case()
    plain = SemanticDistillationLoss(0.3, tail="none")(states, table, labels, signals=signals)
    monkeypatch.setattr(softmax, "log_tail_sum", None)  # calling it would fail
    terms = SemanticDistillationLoss(0.3, implementation="cpu")(states, table, labels, signals=signals)
    assert torch.equal(terms.total, plain.total)
    with pytest.raises(TypeError):
        SemanticDistillationLoss(0.3, implementation="cpu")(
            states, table, labels, signals=signals._replace(probs_NK=0.9 * signals.probs_NK)
        )


def test_phase_and_magnitude_by_hand():
    """A sure teacher asks for phase 0 and magnitude 1, a uniform one for phase pi."""
    states, table = torch.zeros(2, D), torch.zeros(V, D)
    signals = TeacherSignals(
        torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), torch.tensor([0.0, math.log(V)]),
        torch.tensor([1.0, 0.25]),
    )  # fmt: skip
    objective = SemanticDistillationLoss(0.05, 1.0, 1.0)
    labels = torch.tensor([1, 2])
    reached = objective(states, table, labels, signals=signals, amplitude_N=torch.tensor([1, -0.25 + 0j]))
    assert reached.phase.item() == pytest.approx(0, abs=1e-5)
    assert reached.magnitude.item() == pytest.approx(0, abs=1e-6)
    assert reached.ce.item() == pytest.approx(math.log(V), rel=1e-6)
    opposed = objective(states, table, labels, signals=signals, amplitude_N=torch.tensor([-1 + 0j, 0.25j]))
    assert opposed.phase.item() == pytest.approx((2 + 1) / 2, rel=1e-5)
    assert opposed.magnitude.item() == pytest.approx(0, abs=1e-6)


def test_amplitude_of_zero_has_finite_gradients():
    states, table, labels, signals, _ = make_case()
    amplitude = torch.zeros(N, dtype=torch.complex128, requires_grad=True)
    objective = SemanticDistillationLoss(0.05, 1.0, 1.0)
    objective(states, table, labels, signals=signals, amplitude_N=amplitude).total.backward()
    assert torch.isfinite(torch.view_as_real(amplitude.grad)).all()
    assert amplitude.grad.abs().sum() > 0


def test_rows_without_labels_or_signals_give_no_gradient():
    states, table, labels, signals, amplitude = make_case()
    objective = SemanticDistillationLoss(0.3, 0.2, 0.7)
    signals.entropy_N[[3, 5]] = float("nan")  # what is stored there must not matter
    objective(states, table, labels, signals=signals, amplitude_N=amplitude).total.backward()
    assert states.grad[3].abs().sum() == 0
    assert amplitude.grad[[3, 5]].abs().sum() == 0
    assert torch.isfinite(torch.view_as_real(amplitude.grad)).all()
    alone = torch.autograd.grad(F.cross_entropy(states @ table.T, labels, ignore_index=-100), states)[0]
    torch.testing.assert_close(states.grad[5], alone[5])


def test_nothing_left_gives_zero_and_zero_gradients():
    states, table, labels, signals, amplitude = make_case()
    objective = SemanticDistillationLoss(0.3, 0.2, 0.7)
    terms = objective(states, table, labels.fill_(-100), signals=signals, amplitude_N=amplitude)
    assert all(term.item() == 0 for term in terms[:6])
    terms.total.backward()
    assert all(tensor.grad.abs().sum() == 0 for tensor in (states, table, amplitude))


def test_token_count_makes_accumulated_steps_add_up():
    states, table, labels, signals, amplitude = make_case()
    objective = SemanticDistillationLoss(0.3, 0.2, 0.7)
    whole = objective(states, table, labels, signals=signals, amplitude_N=amplitude)
    whole.total.backward()
    gradients = [tensor.grad.clone() for tensor in (states, table, amplitude)]
    states.grad = table.grad = amplitude.grad = None
    parts = []
    for rows in (slice(0, 4), slice(4, N)):
        of_rows = TeacherSignals(*(tensor[rows] for tensor in signals[:4]))
        part = objective(
            states[rows], table, labels[rows], signals=of_rows, amplitude_N=amplitude[rows], token_count=N - 1
        )
        part.total.backward()
        parts.append(part)
    for name in ("total", "ce", "kd", "kd_estimate", "phase", "magnitude"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    for tensor, gradient in zip((states, table, amplitude), gradients, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)


def test_absent_inputs_give_absent_terms():
    states, table, labels, signals, amplitude = make_case()
    plain = SemanticDistillationLoss(kd_weight=0.0)
    terms = plain(states, table, labels)
    assert terms[2:] == (None, None, None, None)
    assert plain(states, table, labels, signals=signals).phase is None
    bare = TeacherSignals(signals.ids_NK, signals.probs_NK)
    terms = plain(states, table, labels, signals=bare, amplitude_N=amplitude)
    assert terms.kd is not None
    assert (terms.kd_estimate, terms.phase, terms.magnitude) == (None, None, None)


def test_weights_can_change_between_steps():
    states, table, labels, signals, _ = make_case()
    objective = SemanticDistillationLoss(kd_weight=0.01)
    first = objective(states, table, labels, signals=signals)
    objective.kd_weight = 0.05
    second = objective(states, table, labels, signals=signals)
    torch.testing.assert_close(second.total - first.total, 0.04 * first.kd)
    objective.kd_weight = -1.0
    with pytest.raises(ValueError, match=r"kd_weight: got -1.0; must be 0 or more"):
        objective(states, table, labels, signals=signals)


def test_kd_estimate_takes_the_entropy_at_the_temperature():
    states, table, labels, signals, _ = make_case()
    objective = SemanticDistillationLoss(temperature=2.0)
    assert objective(states, table, labels, signals=signals).kd_estimate is None
    warm = [signals._replace(temperature_entropy_N=signals.entropy_N + more) for more in (0.0, 0.5)]
    first, second = (objective(states, table, labels, signals=each).kd_estimate for each in warm)
    assert (first - second).item() == pytest.approx(4 * 0.5 * (N - 2) / (N - 1))


@pytest.mark.parametrize("tail", ["bucket", "uniform", "none"])
def test_the_likeliest_tokens_alone_give_no_estimate(tail):
    states, table, labels, _, _ = make_case()
    log_p = (states @ table.T).detach().log_softmax(1)  # the student is the teacher: the true divergence is 0
    entropy = -(log_p.exp() * log_p).sum(1)
    for kept, known in ((K, False), (V, True)):
        probs, ids = log_p.exp().topk(kept)
        objective = SemanticDistillationLoss(tail=tail)
        found = objective(states, table, labels, signals=TeacherSignals(ids, probs, entropy)).kd_estimate
        assert (math.isnan(found.item()), known) in ((True, False), (False, True))
    assert found.item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("probs", "ids", "known"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], [[0, 1], [2, 3]], True),
        ([[0.5, 0.5], [0.5, 0.3]], [[0, 1], [2, 3]], False),
        ([[0.5, 0.5], [0.5, 0.49]], [[0, 1], [2, 3]], False),
        ([[0.5, 0.5], [0.5, 0.4995]], [[0, 1], [2, 3]], True),  # rounding
        ([[0.5, 0.5], [0.5, 0.5]], [[0, 1], [2, -1]], False),  # padding counts for nothing
    ],
)
def test_one_row_that_is_cut_off_leaves_no_estimate(probs, ids, known):
    """All logits are 0, so the cross-entropy of whole signals is ln 4."""
    signals = TeacherSignals(torch.tensor(ids), torch.tensor(probs), torch.tensor([0.5, 0.5]))
    found = SemanticDistillationLoss()(torch.zeros(2, D), torch.zeros(4, D), torch.tensor([0, 1]), signals=signals)
    expected = math.log(4) - 0.5 if known else math.nan
    assert found.kd_estimate.item() == pytest.approx(expected, abs=1e-3, nan_ok=True)


def test_signals_of_another_temperature_are_refused_at_temperature_1():
    states, table, labels, signals, _ = make_case()
    warm = signals._replace(temperature_entropy_N=signals.entropy_N)
    with pytest.raises(ValueError, match=r"temperature: got 1\.0; must be .* they have temperature_entropy_N"):
        SemanticDistillationLoss()(states, table, labels, signals=warm)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"kd_weight": 0.1}, "kd_weight.*signals"),
        ({"kd_weight": 0.0, "phase_weight": 0.1}, r"phase_weight.*entropy_N.*amplitude_N"),
        ({"kd_weight": 0.0, "magnitude_weight": 0.1}, r"magnitude_weight.*confidence_N.*amplitude_N"),
    ],
)
def test_positive_weight_without_inputs_is_refused(weights, match):
    states, table, labels, _, _ = make_case()
    with pytest.raises(ValueError, match=match):
        SemanticDistillationLoss(**weights)(states, table, labels)


def broken(name, change):
    """Arguments of a call in which `change` spoiled the one called `name`."""
    states, table, labels, signals, amplitude = make_case()
    arguments = {"states_ND": states, "table_VD": table, "labels_N": labels, "amplitude_N": amplitude}
    arguments |= signals._asdict() | {
        "bias_V": torch.zeros(V),
        "scale": torch.tensor(1.0),
        "token_count": None,
    }
    arguments[name] = change(arguments[name])
    fields = {field: arguments.pop(field) for field in TeacherSignals._fields}
    return arguments | {"signals": TeacherSignals(**fields)}


def put(value):
    """Overwrite the first element."""

    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("states_ND", lambda tensor: tensor[0], r"states_ND: got shape \(7,\)"),
        ("states_ND", lambda tensor: tensor.long(), r"states_ND: got dtype torch.int64; must be .*floating"),
        ("table_VD", lambda tensor: tensor[:, :-1], r"table_VD: got shape \(101, 6\); must be .*\(101, 7\)"),
        ("table_VD", lambda tensor: tensor[:0], r"table_VD: got shape \(0, 7\); must be at least one row"),
        ("labels_N", lambda tensor: tensor[:-1], r"labels_N: got shape \(22,\); must be .*\(23,\)"),
        (
            "labels_N",
            lambda tensor: tensor.double(),
            r"labels_N: got dtype torch.float64; must be an integer",
        ),
        ("labels_N", put(V), r"labels_N: got 101; must be in \[0, 101\)"),
        ("labels_N", put(-1), r"labels_N: got -1; must be in \[0, 101\), or -100"),
        ("ids_NK", put(V), r"ids_NK: got 101; must be in \[0, 101\), or -1"),
        ("ids_NK", put(-2), r"ids_NK: got -2"),
        ("ids_NK", lambda tensor: tensor[:, :-1], r"probs_NK: got shape \(23, 5\); must be .*\(23, 4\)"),
        ("ids_NK", lambda tensor: tensor.float(), r"ids_NK: got dtype torch.float32; must be an integer"),
        ("probs_NK", put(-0.1), r"probs_NK: got -0.1; must be a probability in \[0, 1\]"),
        ("probs_NK", put(1.1), r"probs_NK: got 1.1; must be a probability in \[0, 1\]"),
        ("probs_NK", put(float("nan")), r"probs_NK: got nan; must be a probability in \[0, 1\]"),
        (
            "probs_NK",
            lambda tensor: tensor * 1.001,
            r"probs_NK: got a row that sums to 1.001; must be at most 1",
        ),
        ("probs_NK", lambda tensor: tensor.long(), r"probs_NK: got dtype torch.int64; must be .*floating"),
        ("entropy_N", lambda tensor: tensor[:-1], r"entropy_N: got shape \(22,\); must be .*\(23,\)"),
        ("confidence_N", lambda tensor: tensor[:-1], r"confidence_N: got shape \(22,\); must be .*\(23,\)"),
        ("amplitude_N", lambda tensor: tensor[:-1], r"amplitude_N: got shape \(22,\); must be .*\(23,\)"),
        (
            "amplitude_N",
            lambda tensor: tensor.real,
            r"amplitude_N: got dtype torch.float64; must be a complex",
        ),
        ("bias_V", lambda tensor: tensor[:-1], r"bias_V: got shape \(100,\); must be .*\(101,\)"),
        ("scale", lambda tensor: tensor.expand(2), r"scale: got shape \(2,\); must be one number"),
        ("token_count", lambda _: 0, r"token_count: got 0; must be above 0"),
    ],
)
def test_wrong_arguments_are_named(name, change, match):
    with pytest.raises(ValueError, match=match):
        SemanticDistillationLoss(0.1, 0.1, 0.1)(**broken(name, change))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0; must be above 0"),
        ({"kd_weight": -0.1}, "kd_weight: got -0.1; must be 0 or more"),
        ({"phase_weight": -0.1}, "phase_weight: got -0.1"),
        ({"magnitude_weight": -0.1}, "magnitude_weight: got -0.1"),
        ({"tail": "fat"}, "tail: got fat; must be one of none, bucket, uniform"),
    ],
)
def test_wrong_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        SemanticDistillationLoss(**options)
