"""The draws against the exact distribution, the exact figures against torch's log_softmax."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from indraquantum.teacher import sampling
from indraquantum.teacher.sampling import count_distinct, draw_tokens, position_signals, row_uniforms

VOCABULARY = 101  # prime, and no multiple of the sampler's blocks


def exact(logits_NV, temperature=1.0):
    logprobs_NV = (logits_NV.double() / temperature).log_softmax(-1)
    return logprobs_NV, -(logprobs_NV.exp() * logprobs_NV).sum(-1)


def random_logits(positions, seed=0, vocabulary=VOCABULARY):
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def signals_of(logits_NV, draws=53, temperature=1.0, seed=0, labels=None, vocabulary=VOCABULARY):
    positions = len(logits_NV)
    return position_signals(
        logits_NV,
        np.arange(positions),
        np.full(positions, -100) if labels is None else labels,
        row_uniforms(seed, "train", 3, positions, draws),
        vocabulary,
        temperature,
    )


def dense_counts(signals, vocabulary=VOCABULARY):
    counts_NV = np.zeros((len(signals.ids_per_position_N), vocabulary), np.int64)
    position_M = np.repeat(np.arange(len(counts_NV)), signals.ids_per_position_N)
    np.add.at(counts_NV, (position_M, signals.ids_M), signals.amounts_M)
    return counts_NV


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_exact_figures_equal_log_softmax(temperature):
    logits_NV = random_logits(37)
    labels_N = np.arange(37) * 2
    labels_N[5] = -100
    signals = signals_of(logits_NV.clone(), temperature=temperature, labels=labels_N)
    logprobs_NV, entropy_N = exact(logits_NV)
    np.testing.assert_allclose(signals.entropy_N, entropy_N, rtol=2e-5)
    np.testing.assert_allclose(signals.confidence_N, logprobs_NV.amax(-1).exp(), rtol=1e-5)
    np.testing.assert_allclose(signals.temperature_entropy_N, exact(logits_NV, temperature)[1], rtol=2e-5)
    expected_N = logprobs_NV[np.arange(37), labels_N.clip(0)].numpy()
    expected_N[5] = np.nan
    np.testing.assert_allclose(signals.next_logprob_N, expected_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_draws_pass_a_chi_square_test(temperature):
    """One distribution at 997 positions: the counts' chi-square is neither too high nor too low."""
    logits_V = random_logits(1, seed=5)[0]
    counts_V = dense_counts(signals_of(logits_V.expand(997, -1), temperature=temperature)).sum(0)
    expected_V = exact(logits_V[None], temperature)[0][0].exp().numpy() * 997 * 53
    often = expected_V >= 10
    observed = np.append(counts_V[often], counts_V[~often].sum())
    expected = np.append(expected_V[often], expected_V[~often].sum())
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = len(observed) - 1
    assert freedom > 20
    assert abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


def test_frequencies_are_unbiased_for_any_function():
    """The mean of sum_v counts/draws * f(v) over positions is E f within 4 standard errors."""
    logits_V = random_logits(1, seed=7)[0]
    values_V = np.random.default_rng(0).normal(size=VOCABULARY)
    estimates_N = dense_counts(signals_of(logits_V.expand(1009, -1), draws=5)) / 5 @ values_V
    truth = exact(logits_V[None])[0][0].exp().numpy() @ values_V
    assert abs(estimates_N.mean() - truth) < 4 * estimates_N.std() / np.sqrt(1009)


def test_hand_solved_draws():
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])
    uniforms = torch.tensor([[0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53]], dtype=torch.float64)
    assert draw_tokens(weights, uniforms).tolist() == [[1, 1, 3, 3, 4, 4]]


def test_tokens_without_probability_are_never_drawn():
    """At the ends of the unit interval, rounding could choose a neighbour of probability 0."""
    logits_NV = torch.full((211, 997), -torch.inf)
    alive = torch.randint(0, 997, (211, 3), generator=torch.Generator().manual_seed(0))
    logits_NV.scatter_(1, alive, 1.0)
    edges = np.sort(np.tile([0.0, 1 / 3, np.nextafter(1 / 3, 0), 0.5, 2 / 3, 1 - 2**-53], (211, 1)), axis=1)
    signals = position_signals(logits_NV.clone(), np.arange(211), np.full(211, -100), edges, 997)
    position_M = np.repeat(np.arange(211), signals.ids_per_position_N)
    assert torch.isfinite(logits_NV[position_M, signals.ids_M]).all()
    assert np.isfinite(signals.entropy_N).all()


@pytest.mark.parametrize("temperature", [0.01, 10.0, 100.0])
def test_what_the_teacher_excludes_stays_excluded_at_any_temperature(temperature):
    logits_NV = torch.full((97, 61), -torch.inf)
    logits_NV[:, [5, 20, 40]] = torch.tensor([3.0, 2.0, 1.0])
    signals = signals_of(logits_NV.clone(), temperature=temperature)
    assert set(signals.ids_M.tolist()) <= {5, 20, 40}
    expected = torch.special.entr((torch.tensor([3.0, 2.0, 1.0]).double() / temperature).softmax(0)).sum().item()
    np.testing.assert_allclose(signals.temperature_entropy_N, expected, rtol=1e-4, atol=1e-6)


def test_a_large_vocabulary_keeps_every_token_in_its_place():
    """Of a million equal tokens, number i begins at i / V; a float32 running sum is off by hundreds at the end."""
    vocabulary = 1_000_003
    uniforms = torch.linspace(0, 1 - 2**-53, 1009, dtype=torch.float64)[None]
    tokens = draw_tokens(torch.full((1, vocabulary), 0.1), uniforms)
    assert (tokens - uniforms * vocabulary).abs().max() <= 1
    assert tokens[0, -1] == vocabulary - 1


def test_the_last_number_draws_the_last_token_whatever_the_rounding():
    """Each row one block of 31 tokens, the sum of which float32 rounds up about half of the time."""
    weights = torch.rand(997, 31, generator=torch.Generator().manual_seed(0)) + 0.01
    tokens = draw_tokens(weights, torch.full((997, 1), 1 - 2**-53, dtype=torch.float64))
    assert (tokens == 30).all()


def test_draws_do_not_depend_on_the_chunks(monkeypatch):
    logits_NV = random_logits(41)
    whole = signals_of(logits_NV.clone())
    monkeypatch.setattr("indraquantum.teacher.sampling._CHUNK_ELEMENTS", 7 * 53 * 32)
    for ours, theirs in zip(signals_of(logits_NV.clone())[:7], whole[:7], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


class Waits(TorchDispatchMode):
    """Counts how often the program waits for a number of the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_accelerators_get_large_chunks_and_are_seldom_waited_for(monkeypatch):
    logits_NV, chunks = random_logits(41), 6
    monkeypatch.setattr(sampling, "_CHUNK_ELEMENTS", 7 * 53 * 32)
    with Waits() as often:
        small = signals_of(logits_NV.clone())
    elements = sampling._elements(torch.device("cuda"))
    monkeypatch.setattr(sampling, "_elements", lambda device: elements)
    with Waits() as seldom:
        large = signals_of(logits_NV.clone())
    assert (often.count, seldom.count) == (chunks, 1)
    assert elements // 32_000 > 2000  # positions at once
    for ours, theirs in zip(large[:7], small[:7], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_uniforms_belong_to_seed_split_and_row():
    first = row_uniforms(1, "train", 2, 5, 7)
    assert first.shape == (5, 7)
    assert (np.diff(first, axis=1) >= 0).all()
    np.testing.assert_array_equal(first, row_uniforms(1, "train", 2, 5, 7))
    for other in [(2, "train", 2), (1, "validation", 2), (1, "train", 3)]:
        assert not np.intersect1d(first, row_uniforms(*other, 5, 7)).size
    assert row_uniforms(2**63 - 1, "validation", 2**40, 1, 1).shape == (1, 1)
    # These numbers must never change: a resumed capture draws with the numbers that it began with.
    frozen = [[0.036904530468356844, 0.30931491118583454, 0.3569562367935075]]
    assert row_uniforms(1, "train", 2, 1, 3).tolist() == frozen


def test_count_distinct_by_hand():
    ids_M, counts_M, ids_per_position_N = count_distinct(np.array([[2, 2, 5], [5, 5, 5], [1, 2, 3]]))
    assert ids_M.tolist() == [2, 5, 5, 1, 2, 3]
    assert counts_M.tolist() == [2, 1, 3, 1, 1, 1]
    assert ids_per_position_N.tolist() == [2, 1, 3]


def test_ids_past_the_vocabulary_are_left_out_and_the_rest_renormalised():
    padded_NV = torch.cat([random_logits(13), torch.full((13, 5), 50.0)], 1)
    assert signals_of(padded_NV).ids_M.max() < VOCABULARY
    np.testing.assert_allclose(signals_of(padded_NV).entropy_N, exact(random_logits(13))[1], rtol=2e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits_NV = random_logits(3)
    logits_NV[1, 4] = bad
    with pytest.raises(FloatingPointError):
        signals_of(logits_NV)
