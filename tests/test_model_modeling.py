"""The whole model: packing, weights, saving, heads, and transformers' Llama as an independent reference."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import forked
from indraquantum.config import ModelSettings
from indraquantum.errors import UserError
from indraquantum.files import write_sums
from indraquantum.loss_v2 import SemanticDistillationLoss, TeacherSignals
from indraquantum.model import IndraQuantumConfig, IndraQuantumPhase2
from small_model import D_MODEL, LAYERS, MLP, NARROW, WIDE, V, make, make_with_twin, tokens

VARIANTS = ("quantum", "phase-only", "frozen", "gated", "linear", "mlp", "none")


def phase_spread(model):
    return model.projector.polar(model.embedding.weight)[1].std().item()


SIZES = [(name, {}) for name in VARIANTS] + [(name, sizes) for name in VARIANTS[:-1] for sizes in (NARROW, WIDE)]


@pytest.mark.parametrize("ends", ["shared", "separate"])
@pytest.mark.parametrize(("projector", "sizes"), SIZES)
def test_parameter_count_by_formula(projector, sizes, ends):
    d = sizes.get("d_model", D_MODEL)
    c = sizes.get("state_width", d)
    width = d if projector == "none" else 2 * c
    lift = {
        "quantum": 2 * (d * c + c),
        "frozen": 2 * (d * c + c),
        "gated": 2 * (d * c + c),
        "phase-only": d * c + c,
        "linear": d * width,
        "mlp": d * width + width,
        "none": 0,
    }[projector]
    layer = 4 * width**2 + 3 * width * MLP + 2 * width
    # table, lifts, layers, last norm, bias and scale, one reference state; no second table of any kind
    lifts = lift * (1 if ends == "shared" else 2)
    expected = V * d + lifts + LAYERS * layer + width + V + 1 + width
    model = make(projector=projector, ends=ends, **sizes)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.get_input_embeddings().weight.shape == (V, d)
    assert model.config.hidden_size == width
    assert model.lift_table().shape == model.input_table().shape == (V, width)


def test_phases_are_spread_after_construction_and_after_a_round_trip(tmp_path):
    model = make(phase_spread=3.0, d_model=62)
    assert phase_spread(model) == pytest.approx(3.0, rel=0.1)
    model.save_pretrained(tmp_path)
    assert phase_spread(IndraQuantumPhase2.from_pretrained(tmp_path)) == phase_spread(model)


@pytest.mark.parametrize("projector", ["quantum", "gated", "linear", "mlp"])
def test_a_lift_is_drawn_by_the_width_of_its_inputs(projector):
    lift = make(projector=projector, d_model=101, state_width=7, num_attention_heads=1).projector
    weight = (lift.up if projector in ("linear", "mlp") else lift.magnitude).weight
    assert weight.std().item() == pytest.approx((3 * 101) ** -0.5, rel=0.05)


def test_layers_are_drawn_by_width_and_scale_and_bias_start_as_stated():
    model = make(d_model=62)
    query = model.backbone.layers[1].self_attn.q_proj.weight
    assert query.std().item() == pytest.approx((3 * 124) ** -0.5, rel=0.05)
    assert model.scale.item() == pytest.approx(124**-0.5)
    assert model.scale.ndim == 0
    assert not model.bias_V.any()


@pytest.mark.parametrize(
    "options",
    [{"projector": name} for name in VARIANTS]
    + [
        {"readout": "mean", "head": "born"},
        {"residual": True, "residual_head": "turned"},
        {"residual": True, "d_model": 28, "state_width": 12},
        {"ends": "separate", "magnitude": "linear", "table_std": 0.25},
        {"d_model": 28, "state_width": 12},
        {"projector": "mlp", "d_model": 12, "state_width": 20},
    ],
)
def test_save_and_load_give_the_same_bits(tmp_path, options):
    model = make(**options)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    loaded, report = IndraQuantumPhase2.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    twin = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(twin, IndraQuantumPhase2)
    ids = tokens(2, 7)
    for other in (loaded.eval(), twin):
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert torch.equal(other(ids).phase, model(ids).phase)


def test_a_saved_model_replaces_the_checksums_of_an_export(tmp_path):
    """A push adds files to those of a repository, or replaces them, but removes none."""
    repository, model = tmp_path / "repository", make(seed=1, use_cache=False)
    make().save_pretrained(repository)
    write_sums(repository)
    save_file(model.state_dict(), repository / "model.safetensors", {"format": "pt"})
    with pytest.raises(OSError, match=r"model.safetensors is damaged"):
        IndraQuantumPhase2.from_pretrained(repository)
    model.save_pretrained(tmp_path / "pushed")
    shutil.copytree(tmp_path / "pushed", repository, dirs_exist_ok=True)
    loaded = IndraQuantumPhase2.from_pretrained(repository)
    assert torch.equal(loaded.embedding.weight, model.embedding.weight)


@pytest.mark.parametrize("push", ["save_pretrained", "push_to_hub"])
def test_a_push_replaces_the_checksums_of_an_export_too(push, tmp_path, monkeypatch):
    pushed = {}
    hub = SimpleNamespace(
        create_repo=lambda name, **_: SimpleNamespace(repo_id=name),
        create_commit=lambda operations, **_: pushed.update(
            (operation.path_in_repo, Path(operation.path_or_fileobj).read_bytes()) for operation in operations
        ),
    )
    for module in (transformers.modeling_utils, transformers.utils.hub):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    write_sums(tmp_path)
    if push == "save_pretrained":
        make().save_pretrained(tmp_path, push_to_hub=True, repo_id="me/model")
    else:
        make().push_to_hub("me/model")
    assert pushed["SHA256SUMS"] == b""
    assert pushed.keys() >= {"config.json", "model.safetensors"}


def test_others_may_rewrite_the_files_of_a_saved_model(tmp_path):
    """As Trainer does, which copies a later checkpoint's files to the folder that it pushes."""
    make().save_pretrained(tmp_path)
    later = make(seed=1, use_cache=False)
    save_file(later.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    later.config.save_pretrained(tmp_path)
    loaded = IndraQuantumPhase2.from_pretrained(tmp_path)
    assert torch.equal(loaded.embedding.weight, later.embedding.weight)


def test_one_process_of_several_saves(tmp_path):
    forked.values(2, lambda processes: make().save_pretrained(tmp_path / str(processes.rank)), tmp_path)
    assert (tmp_path / "0" / "SHA256SUMS").read_bytes() == b""
    assert not list((tmp_path / "1").iterdir())


@pytest.mark.parametrize(
    "options", [{"dtype": torch.bfloat16}, {"dtype": "auto"}, {"device_map": "cpu"}, {"attn_implementation": "eager"}]
)
def test_options_of_loading(options, tmp_path):
    model, ids = make(), tokens(2, 7)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    dtype = options["dtype"] if options.get("dtype") is torch.bfloat16 else torch.float32
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    rough = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
    torch.testing.assert_close(loaded(ids).logits.float(), model(ids).logits, **rough)
    loaded.tie_weights()
    assert loaded.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_a_seed_gives_the_same_weights():
    first, again, other = (make(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_plain_variant_equals_transformers_llama():
    model, llama = make_with_twin()
    ids = tokens(2, 11)
    torch.testing.assert_close(model(ids).logits, llama(ids).logits)


PIECES = (5, 1, 7)  # three documents of one row of 17 positions, 4 of padding behind them


def packed(rows=2):
    ids = tokens(rows, 17)
    segments = torch.tensor([0] * 5 + [1] + [2] * 7 + [-1] * 4).expand(rows, -1)
    positions = torch.cat([torch.arange(n) for n in (*PIECES, 4)]).expand(rows, -1)
    return ids, positions, segments


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("projector", ["quantum", "none"])
def test_packed_documents_equal_the_documents_alone(attention, projector):
    model = make(projector=projector, attention=attention)
    ids, positions, segments = packed()
    together = model(ids, position_ids=positions, segment_ids=segments)
    states = model.hidden_states(ids, positions, segments, table_VD=model.lift_table())
    # Rotary positions are relative, so segments alone keep documents apart as well.
    torch.testing.assert_close(model(ids, segment_ids=segments).logits, together.logits)
    assert together.logits.isfinite().all()
    start = 0
    for length in PIECES:
        piece = slice(start, start + length)
        alone = model(ids[:, piece])
        torch.testing.assert_close(together.logits[:, piece], alone.logits)
        torch.testing.assert_close(together.magnitude[:, piece], alone.magnitude)
        torch.testing.assert_close(states[:, piece], model.hidden_states(ids[:, piece]))
        start += length


def test_a_mask_of_ones_would_leak():
    # What transformers makes of a plain 2-D mask: the trap that segment_ids avoid.
    model = make()
    ids, positions, _ = packed()
    leaking = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits[:, 6:13]
    assert (leaking - model(ids[:, 6:13]).logits).abs().max() > 0.01


def test_states_do_not_depend_on_later_tokens():
    model, ids = make(), tokens(1, 13)
    changed = ids.clone()
    changed[:, 8:] = tokens(1, 5, seed=9)
    assert torch.equal(model.hidden_states(ids)[:, :8], model.hidden_states(changed)[:, :8])
    assert not torch.equal(model.hidden_states(ids)[:, 8:], model.hidden_states(changed)[:, 8:])


def test_segments_refuse_a_second_mask_or_a_cache():
    model = make()
    ids, _, segments = packed()
    for wrong in ({"attention_mask": torch.ones_like(ids)}, {"use_cache": True}):
        with pytest.raises(ValueError, match="segment_ids: must not be given together"):
            model(ids, segment_ids=segments, **wrong)


@pytest.mark.parametrize("sizes", [{}, NARROW, WIDE])
def test_lifted_rows_equal_projected_rows_and_share_their_gradient(sizes):
    model, ids = make(**sizes), tokens(2, 7)
    table, width = model.lift_table(), 2 * sizes.get("state_width", D_MODEL)
    assert table.shape == (V, width)
    gathered, projected = model.hidden_states(ids, table_VD=table), model.hidden_states(ids)
    torch.testing.assert_close(gathered, projected)
    weights = torch.randn(2, 7, width)
    (from_table,) = torch.autograd.grad((gathered * weights).sum(), model.embedding.weight)
    (from_rows,) = torch.autograd.grad((projected * weights).sum(), model.embedding.weight)
    torch.testing.assert_close(from_table, from_rows)


def test_separate_ends_have_a_projector_each_over_one_table():
    model, shared, ids = make(ends="separate"), make(ends="shared"), tokens(2, 7)
    shared.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(model(ids).logits, shared(ids).logits)
    model.input_projector.load_state_dict(model.projector.state_dict())
    torch.testing.assert_close(model(ids).logits, shared(ids).logits)
    torch.testing.assert_close(model.hidden_states(ids, table_VD=model.lift_table()), shared.hidden_states(ids))


def test_a_table_starts_with_the_given_standard_deviation():
    for options, expected in (({}, 1.0), ({"projector": "linear"}, 0.5), ({"table_std": 0.125}, 0.125)):
        assert make(d_model=62, **options).embedding.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert phase_spread(make(d_model=62, table_std=0.125)) == pytest.approx(0.02, rel=0.1)


def test_amplitude_magnitude_and_phase_agree():
    model, ids = make(), tokens(2, 7)
    amplitude = model.amplitude(model.hidden_states(ids))
    output = model(ids)
    torch.testing.assert_close(torch.polar(output.magnitude, output.phase), amplitude)


@pytest.mark.parametrize("sizes", [{}, NARROW])
def test_parameter_groups_cover_every_trainable_parameter_once(sizes):
    model = make(projector="quantum", ends="shared", **sizes)
    chosen = model.parameter_groups(2e-3, 10.0, 0.05, projector_rate=3.0, table_weight_decay=0.125)
    groups = {group["name"]: group for group in chosen}
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    assert [id(p) for p in groups["table"]["params"]] == [id(model.embedding.weight)]
    assert {name: (g["rate"], g["weight_decay"]) for name, g in groups.items()} == {
        "table": (10.0, 0.125),
        "projector": (3.0, 0.05),
        "layers": (1.0, 0.05),
        "projector biases": (3.0, 0.0),
        "others": (1.0, 0.0),
    }
    assert {name: g["lr"] for name, g in groups.items()} == pytest.approx(
        {"table": 2e-2, "projector": 6e-3, "layers": 2e-3, "projector biases": 6e-3, "others": 2e-3}
    )
    of_projector = [id(p) for name in ("projector", "projector biases") for p in groups[name]["params"]]
    assert of_projector == [id(p) for _, p in sorted(model.projector.named_parameters(), key=lambda x: "bias" in x[0])]
    # seven matrices a layer; two norms a layer, the last one, head (2) and reference
    assert (len(groups["layers"]["params"]), len(groups["others"]["params"])) == (7 * LAYERS, 2 * LAYERS + 4)
    plain = {group["name"]: group["rate"] for group in model.parameter_groups(2e-3, 10.0, 0.05)}
    assert plain == {"table": 10.0, "projector": 1.0, "layers": 1.0, "projector biases": 1.0, "others": 1.0}
    torch.optim.AdamW(groups.values(), lr=2e-3)


def test_both_projectors_move_at_the_projector_rate():
    model = make(ends="separate")
    groups = model.parameter_groups(2e-3, 10.0, 0.05, projector_rate=3.0)
    listed = {id(p) for group in groups if group["name"].startswith("projector") for p in group["params"]}
    assert listed == {id(p) for part in (model.projector, model.input_projector) for p in part.parameters()}


def test_a_frozen_projector_is_not_optimised():
    model = make(projector="frozen")
    listed = {id(p) for group in model.parameter_groups(1e-3, 10.0, 0.1) for p in group["params"]}
    assert not listed & {id(p) for p in model.projector.parameters()}
    assert len(listed) == len(list(model.parameters())) - 8


@pytest.mark.parametrize("ends", ["shared", "separate"])
def test_a_frozen_projector_stays_frozen_when_it_is_loaded(ends, tmp_path):
    make(projector="frozen", ends=ends).save_pretrained(tmp_path)
    models = [loader.from_pretrained(tmp_path) for loader in (IndraQuantumPhase2, AutoModelForCausalLM)]
    models.append(IndraQuantumPhase2.from_pretrained(tmp_path, output_loading_info=True)[0])
    for model in models:
        names = [group["name"] for group in model.parameter_groups(1e-3, 10.0, 0.1)]
        assert names == ["table", "layers", "others"]


@pytest.mark.parametrize("absent", [["entropy_N"], ["confidence_N"], ["entropy_N", "confidence_N"]])
def test_the_default_loss_has_the_terms_that_the_signals_allow(absent):
    model, ids = make(), tokens(2, 7)
    whole = TeacherSignals(tokens(14, 5, seed=1), torch.full((14, 5), 0.2), torch.rand(14), torch.rand(14))
    output = model(ids, labels=ids, signals=whole._replace(**dict.fromkeys(absent)))
    terms = output.terms
    weighted = terms.ce + 0.05 * terms.kd
    for name, field in (("phase", "entropy_N"), ("magnitude", "confidence_N")):
        assert (getattr(terms, name) is None) == (field in absent)
        weighted = weighted + 0.1 * (0 if field in absent else getattr(terms, name))
    torch.testing.assert_close(output.loss.detach(), weighted)


@pytest.mark.parametrize("readout", ["reference", "mean"])
def test_every_term_and_its_gradient_is_alive_with_signals(readout):
    model, ids = make(readout=readout), tokens(2, 7)
    labels = tokens(2, 7, seed=6)
    signals = TeacherSignals(tokens(14, 5, seed=1), torch.full((14, 5), 0.2), torch.rand(14), torch.rand(14))
    output = model(ids, shift_labels=labels, signals=signals)
    terms = output.terms
    weighted = terms.ce + 0.05 * terms.kd + 0.1 * terms.phase + 0.1 * terms.magnitude
    torch.testing.assert_close(output.loss.detach(), weighted)
    assert min(terms.kd, terms.phase, terms.magnitude) > 0
    half = model(ids, shift_labels=labels, signals=signals, num_items_in_batch=28)
    torch.testing.assert_close(half.loss, output.loss / 2)
    for weights in ((0.05, 0, 0), (0, 0.1, 0), (0, 0, 0.1)):
        model.zero_grad()
        objective = SemanticDistillationLoss(*weights)
        (model(ids, shift_labels=labels, signals=signals, objective=objective).loss - output.terms.ce).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
            assert "references" not in name or parameter.grad.any() == (weights[0] == 0)


def test_a_born_head_is_trained_on_its_own_logits():
    model, ids = make(head="born"), tokens(2, 7)
    output = model(ids, labels=ids)
    expected = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_an_objective_for_another_head_is_refused():
    ids = tokens(1, 5)
    with pytest.raises(ValueError, match="objective: its head is interference; must be the model's, born"):
        make(head="born")(ids, labels=ids, objective=SemanticDistillationLoss(0.0))


@pytest.mark.parametrize("ends", ["shared", "separate"])
@pytest.mark.parametrize("projector", ["quantum", "linear"])
@pytest.mark.parametrize("width", [None, D_MODEL // 2 + 4, D_MODEL // 2, D_MODEL // 2 - 4])
def test_a_residual_adds_the_embedding_to_the_state_and_cuts_what_is_wider(projector, ends, width):
    options = {"projector": projector, "ends": ends, "state_width": width, "num_attention_heads": 1}
    model, plain = (make(**options, residual=residual) for residual in (True, False))
    both = D_MODEL if width is None else min(D_MODEL, 2 * width)
    embeddings = model.embedding.weight
    expected = plain.lift_table().clone()
    expected[:, :both] += embeddings[:, :both]
    torch.testing.assert_close(model.lift_table(), expected)
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    ids = tokens(2, 7)
    model(ids)
    own = plain.projector if ends == "shared" else plain.input_projector
    expected = own(embeddings[ids])
    expected[..., :both] += embeddings[ids][..., :both]
    torch.testing.assert_close(seen[0]["inputs_embeds"], expected)


@pytest.mark.parametrize("width", [None, D_MODEL // 2 + 4, D_MODEL // 2 - 4])
def test_a_turned_residual_is_the_embedding_times_i_in_the_head_alone(width):
    options = {"state_width": width, "num_attention_heads": 1, "residual": True}
    turned = make(**options, residual_head="turned")
    both = min(D_MODEL, 2 * (width or D_MODEL))
    half = both // 2
    added = turned.embedding.weight[:, :both]
    times_i = 1j * torch.complex(added[:, :half], added[:, half:])
    states = turned.projector(turned.embedding.weight)
    expected = states.clone()
    expected[:, :both] += torch.cat([times_i.real, times_i.imag], dim=-1)
    torch.testing.assert_close(turned.lift_table(), expected)
    ids = torch.tensor([5, 3, 5])
    torch.testing.assert_close(turned.lift_table(ids), turned.lift_table()[ids])
    of_inputs = turned.input_projector(turned.embedding.weight)
    of_inputs[:, :both] += added
    torch.testing.assert_close(turned.input_table(), of_inputs)
    # What the embeddings add to input and head of the same token does not resemble itself.
    at_head = (turned.lift_table() - states)[:, :both]
    torch.testing.assert_close((added * at_head).sum(-1), torch.zeros(V), atol=1e-4, rtol=0)


@pytest.mark.parametrize("projector", ["quantum", "gated", "linear", "mlp"])
def test_beside_a_turned_residual_the_projector_starts_small(tmp_path, projector):
    small, full = (
        make(projector=projector, residual=True, residual_head=head, d_model=40, state_width=30)
        for head in ("turned", "same")
    )
    name = "magnitude.weight" if projector in ("quantum", "gated") else "up.weight"
    for lift in ("projector", "input_projector"):
        sizes = [getattr(model, lift).state_dict()[name].abs().max().item() for model in (small, full)]
        assert sizes == pytest.approx([0.1 / 40**0.5, 1 / 40**0.5], rel=0.02)
    small.save_pretrained(tmp_path)
    loaded = IndraQuantumPhase2.from_pretrained(tmp_path)
    assert all(torch.equal(weight, small.state_dict()[name]) for name, weight in loaded.state_dict().items())


def test_without_a_projector_the_head_takes_the_embedding_times_i():
    model, plain = (make(projector="none", residual_head=head) for head in ("turned", "same"))
    table, half = model.embedding.weight, D_MODEL // 2
    expected = 1j * torch.complex(table[:, :half], table[:, half:])
    torch.testing.assert_close(model.lift_table(), torch.cat([expected.real, expected.imag], dim=-1))
    ids = tokens(2, 7)
    torch.testing.assert_close(model.hidden_states(ids), plain.hidden_states(ids))
    torch.testing.assert_close(model.hidden_states(ids, table_VD=model.lift_table()), plain.hidden_states(ids))


def test_a_residual_is_the_default_where_inputs_and_head_have_a_projector_each():
    for options, expected in (
        ({}, True), ({"projector": "linear"}, True), ({"ends": "shared"}, False), ({"projector": "none"}, False),
        ({"residual": False}, False), ({"ends": "shared", "residual": True}, True),
    ):  # fmt: skip
        assert IndraQuantumConfig.from_settings(ModelSettings(**options), 97, 1, 2).residual == expected
    with pytest.raises(UserError, match="--residual: got true; must be left out with --projector none"):
        IndraQuantumConfig.from_settings(ModelSettings(projector="none", residual=True), 97, 1, 2)


def test_a_turned_residual_is_refused_where_inputs_and_head_share_a_projector():
    settings = ModelSettings(residual=True, residual_head="turned", ends="shared")
    with pytest.raises(UserError, match="--residual-head: got turned; must be same without a residual"):
        IndraQuantumConfig.from_settings(settings, 97, 1, 2)


def test_the_residual_of_new_models_is_turned_in_the_head_where_it_can_be():
    for options, expected in (
        ({"residual": True}, "turned"), ({"residual": True, "ends": "shared"}, "same"),
        ({"residual": True, "residual_head": "same"}, "same"), ({}, "turned"), ({"ends": "shared"}, "same"),
        ({"projector": "none"}, "same"), ({"projector": "none", "residual_head": "turned"}, "turned"),
    ):  # fmt: skip
        assert IndraQuantumConfig.from_settings(ModelSettings(**options), 97, 1, 2).residual_head == expected


def test_default_settings_build_the_documented_model():
    config = IndraQuantumConfig.from_settings(ModelSettings(), 97, 1, 2)
    model = IndraQuantumPhase2(config)
    layer = 4 * 256**2 + 3 * 256 * 688 + 2 * 256
    assert sum(p.numel() for p in model.parameters()) == 97 * 256 + 4 * (256 * 128 + 128) + 4 * layer + 256 + 98 + 256
