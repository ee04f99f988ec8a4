"""Projector, head, readouts, mask and configuration against complex arithmetic and hand-solved values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from indraquantum.config import ModelSettings
from indraquantum.errors import UserError
from indraquantum.kernels.born import BORN_EPSILON
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.head import BornHead, InterferenceHead
from indraquantum.model.masks import additive, document_mask
from indraquantum.model.projector import PROJECTORS, GatedProjector, QuantumProjector
from indraquantum.model.readout import MeanReadout, ReferenceReadout

# d = 20, D = 40, V = 53, all different from the numbers of rows used below.
SIZES = {"vocab_size": 53, "d_model": 20, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 19}
WIDTHS = [(20, None), (11, 7), (7, 13)]  # d of the table, c of the states


def to_complex(states):
    return torch.complex(*states.chunk(2, dim=-1))


def initialised(module, seed=5):
    torch.manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "initialise"):
            part.initialise()
    return module


def built(module_class, **options):
    module = initialised(module_class(IndraQuantumConfig(**{**SIZES, **options})))
    for parameter in module.parameters():  # biases must not hide behind their zero start
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({"magnitude": "softplus"}, lambda x: torch.log1p(torch.exp(x))),
        ({"magnitude": "exp"}, torch.exp),
        ({"magnitude": "linear"}, lambda x: x),
        ({"projector": "phase-only"}, None),
    ],
)
@pytest.mark.parametrize(("d", "c"), WIDTHS)
def test_states_equal_torch_polar(options, activation, d, c):
    projector = built(QuantumProjector, d_model=d, state_width=c, num_attention_heads=1, **options)
    embeddings = torch.randn(3, 5, d)
    phase = embeddings @ projector.phase.weight.T + projector.phase.bias
    magnitude = torch.ones_like(phase)
    if activation is not None:
        magnitude = activation(embeddings @ projector.magnitude.weight.T + projector.magnitude.bias)
    # A negative magnitude turns the phase by pi, which torch.polar leaves undefined.
    expected = torch.polar(magnitude.abs(), phase + torch.pi * (magnitude < 0))
    assert expected.shape == (3, 5, c or d)
    torch.testing.assert_close(to_complex(projector(embeddings)), expected)
    torch.testing.assert_close(projector.polar(embeddings)[0], magnitude)
    torch.testing.assert_close(projector.polar(embeddings)[1], phase)


@pytest.mark.parametrize(("d", "c"), WIDTHS)
def test_a_gated_projector_is_what_small_phases_are_to_first_order(d, c):
    gated, quantum = (
        built(kind, d_model=d, state_width=c, num_attention_heads=1) for kind in (GatedProjector, QuantumProjector)
    )
    embeddings = torch.randn(3, 5, d)
    magnitude = embeddings @ gated.magnitude.weight.T + gated.magnitude.bias
    gate = embeddings @ gated.phase.weight.T + gated.phase.bias
    torch.testing.assert_close(gated(embeddings), torch.cat([magnitude, magnitude * gate], dim=-1))
    for projector in (gated, quantum):
        projector.phase.weight.data *= 1e-3
        projector.phase.bias.data *= 1e-3
    torch.testing.assert_close(gated(embeddings), quantum(embeddings), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("d", "c"), [(20, None), (101, 7), (7, 101)])
@pytest.mark.parametrize(("spread", "table_std"), [(0.5, None), (3.0, None), (0.5, 0.25)])
def test_phases_start_with_the_given_spread(spread, table_std, d, c):
    sizes = {**SIZES, "d_model": d, "state_width": c, "num_attention_heads": 1}
    projector = initialised(QuantumProjector(IndraQuantumConfig(**sizes, phase_spread=spread, table_std=table_std)))
    phase = projector.polar((table_std or 1.0) * torch.randn(2003, d))[1]
    assert phase.std().item() == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("quantum", 2 * (20 * 20 + 20)),
        ("frozen", 2 * (20 * 20 + 20)),
        ("gated", 2 * (20 * 20 + 20)),
        ("phase-only", 20 * 20 + 20),
        ("linear", 20 * 40),
        ("mlp", 20 * 40 + 40),
        ("none", 0),
    ],
)
def test_lifts_have_the_stated_sizes(name, parameters):
    config = IndraQuantumConfig(**SIZES, projector=name)
    projector = PROJECTORS[name](config)
    assert sum(p.numel() for p in projector.parameters()) == parameters
    assert projector(torch.randn(5, 20)).shape == (5, config.hidden_size)
    assert all(p.requires_grad == (name != "frozen") for p in projector.parameters())


def test_interference_logits_equal_the_complex_inner_product():
    head = built(InterferenceHead)
    states, table = torch.randn(3, 7, 40), torch.randn(53, 40)
    inner = torch.einsum("vj,btj->btv", to_complex(table).conj(), to_complex(states))
    torch.testing.assert_close(head(states, table), head.scale_1 * inner.real + head.bias_V)


def test_born_logits_equal_the_squared_modulus():
    head = built(BornHead)
    states, table = torch.randn(7, 40), torch.randn(53, 40)
    inner = head.scale_1 * torch.einsum("vj,nj->nv", to_complex(table).conj(), to_complex(states))
    expected = torch.log(inner.abs() ** 2 + BORN_EPSILON) + head.bias_V
    torch.testing.assert_close(head(states, table), expected)


def test_reference_readout_equals_the_complex_inner_product():
    readout = built(ReferenceReadout)
    states = torch.randn(3, 7, 40)
    reference = to_complex(readout.references_RD.detach())[0]
    torch.testing.assert_close(readout(states).detach(), (reference.conj() * to_complex(states)).sum(-1))


def test_several_references_are_mixed_by_their_own_strength():
    readout = built(ReferenceReadout, readout_references=3)
    states = torch.randn(7, 40)
    amplitudes = torch.einsum("rj,nj->nr", to_complex(readout.references_RD.detach()).conj(), to_complex(states))
    weights = torch.softmax(amplitudes.abs() ** 2, dim=-1)
    torch.testing.assert_close(readout(states).detach(), (weights * amplitudes).sum(-1))


def test_reference_magnitude_starts_near_one_half():
    readout = initialised(ReferenceReadout(IndraQuantumConfig(**{**SIZES, "d_model": 106})))
    assert readout(torch.randn(4001, 212)).abs().mean().item() == pytest.approx(0.5, rel=0.1)


def test_mean_readout_of_a_state_solved_by_hand():
    readout = MeanReadout(IndraQuantumConfig(**SIZES))
    # psi = (3i, -1): magnitudes 3 and 1, phases pi/2 and pi.
    amplitude = readout(torch.tensor([[0.0, -1.0, 3.0, 0.0]]))
    assert amplitude.abs().item() == pytest.approx(2.0)
    assert amplitude.angle().item() == pytest.approx(0.75 * math.pi)


@pytest.mark.parametrize("readout_class", [ReferenceReadout, MeanReadout])
def test_readout_gradient_is_finite_at_zero(readout_class):
    states = torch.zeros(5, 40, requires_grad=True)
    amplitude = built(readout_class)(states)
    (amplitude.abs().sum() + amplitude.real.sum() + amplitude.imag.sum()).backward()
    assert states.grad.isfinite().all()


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(-1, 3), min_size=11, max_size=11), min_size=1, max_size=3))
def test_document_mask_by_definition(rows):
    mask = document_mask(torch.tensor(rows))
    assert mask.shape == (len(rows), 1, 11, 11)
    for b, row in enumerate(rows):
        for i in range(11):
            allowed = [j for j in range(i + 1) if row[j] == row[i] >= 0] or [i]
            assert mask[b, 0, i].nonzero().flatten().tolist() == allowed


def test_additive_mask_gives_the_same_softmax():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    scores = torch.randn(2, 3)
    expected = scores.masked_fill(~mask, -math.inf).softmax(-1)
    torch.testing.assert_close((scores + additive(mask, torch.float32)).softmax(-1), expected)


def test_settings_become_a_configuration():
    config = IndraQuantumConfig.from_settings(
        ModelSettings(d_model=20, heads=5, mlp_width=31, layers=3, dropout=0.25, phase_spread=2.0), 53, 7, 11, 61
    )
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (20, 4, 5)
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (53, 7, 11)
    assert (config.max_position_embeddings, config.intermediate_size, config.num_hidden_layers) == (61, 31, 3)
    assert (config.attention_dropout, config.phase_spread, config.projector) == (0.25, 2.0, "quantum")
    assert (config.state_width, config.complex_width) == (10, 10)
    apart = IndraQuantumConfig.from_settings(ModelSettings(d_model=11, state_width=14, heads=7), 53, 1, 2)
    assert (apart.d_model, apart.complex_width, apart.hidden_size, apart.head_dim) == (11, 14, 28, 4)


@pytest.mark.parametrize(
    ("sizes", "width", "inner"),
    [
        ({"d_model": 256}, 256, 688), ({"d_model": 192}, 192, 512), ({"d_model": 180, "heads": 3}, 180, 480),
        ({"d_model": 183, "heads": 3}, 180, 480), ({"d_model": 14, "heads": 2}, 12, 32),
        ({"d_model": 3, "heads": 2}, 4, 16), ({"d_model": 20, "state_width": 28, "mlp_width": 5}, 56, 5),
        ({"d_model": 180, "heads": 3, "projector": "none"}, 180, 480),
    ],
)  # fmt: skip
def test_the_widths_that_are_not_given_follow_from_the_table_and_the_heads(sizes, width, inner):
    settings = ModelSettings(**sizes)
    config = IndraQuantumConfig.from_settings(settings, 53, 1, 2)
    assert (config.hidden_size, config.intermediate_size) == (width, inner)
    decided = settings.decided()
    assert (decided["state_width"], decided["mlp_width"]) == (None if "projector" in sizes else width // 2, inner)


@pytest.mark.parametrize(
    ("projector", "state_width", "heads", "width"),
    [("quantum", 20, 3, 40), ("none", None, 4, 20), ("mlp", 20, 7, 40), ("quantum", 7, 5, 14), ("mlp", 7, 2, 14)],
)
def test_heads_that_do_not_fit_name_the_option(projector, state_width, heads, width):
    settings = ModelSettings(d_model=20, state_width=state_width, heads=heads, projector=projector)
    with pytest.raises(UserError, match=f"--heads: got {heads}; must divide the width {width} into"):
        IndraQuantumConfig.from_settings(settings, 53, 1, 2, 61)


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("num_attention_heads", 3, {}), ("num_key_value_heads", 3, {}), ("readout_references", 0, {}),
        ("state_width", 0, {}), ("state_width", 20, {"projector": "none"}), ("residual_head", "turned", {}),
        ("residual_head", "turned", {"residual": True, "ends": "shared"}),
    ],
)  # fmt: skip
def test_wrong_configurations_name_the_field(field, value, others):
    from huggingface_hub.errors import StrictDataclassClassValidationError

    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=f"{field}: got {value}"):
        IndraQuantumConfig(**{**SIZES, field: value, **others})


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_positions_that_the_layers_do_not_have_are_refused(name):
    for key in ("rope_type", "type"):
        with pytest.raises(ValueError, match=f"{name}: got the type linear; must be default"):
            IndraQuantumConfig(**SIZES, **{name: {key: "linear", "factor": 2.0}})
    own = {name: {"rope_type": "default", "rope_theta": 500.0}}
    with pytest.raises(ValueError, match=f"{name}: got rope_theta 500.0; must be the field rope_theta, 10000.0"):
        IndraQuantumConfig(**SIZES, **own)
    config = IndraQuantumConfig(**SIZES, **own, rope_theta=500.0)
    assert config == IndraQuantumConfig(**SIZES, rope_theta=500.0)
    assert config.backbone().rope_parameters["rope_theta"] == 500.0
    config.update({"rope_parameters": {"rope_type": "yarn"}})
    with pytest.raises(ValueError, match="rope_parameters: got the type yarn; must be default"):
        config.backbone()


def test_widths_that_follow_from_other_fields_can_be_given_but_not_changed(tmp_path):
    config, other = IndraQuantumConfig(**SIZES), IndraQuantumConfig(**SIZES | {"d_model": 40})
    expected = config.to_dict()
    config.update(expected)
    assert config.to_dict() == expected
    given = {"hidden_size": config.hidden_size, "head_dim": config.head_dim}
    assert IndraQuantumConfig(**SIZES, **given) == IndraQuantumConfig(**SIZES)
    config.save_pretrained(tmp_path)
    for name in ("hidden_size", "head_dim"):
        said = f"{name}: got 999; must be left out, or {getattr(config, name)}, which follows from other fields"
        for wrong in (
            lambda: IndraQuantumConfig(**SIZES, **{name: 999}),  # noqa: B023
            lambda: config.update({name: 999}),  # noqa: B023
            lambda: IndraQuantumConfig.from_pretrained(tmp_path, **{name: 999}),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=said):
                wrong()
    config.update(dict(sorted(other.to_dict().items(), reverse=True)))  # in any order
    assert config.to_dict() == other.to_dict()


def test_a_configuration_shows_the_width_of_a_head_and_can_be_made_of_what_it_shows():
    config = IndraQuantumConfig(**SIZES)
    values = config.to_dict()
    assert values["head_dim"] == 20
    for again in (IndraQuantumConfig(**values), IndraQuantumConfig.from_dict(values)):
        assert again.to_dict() == values
