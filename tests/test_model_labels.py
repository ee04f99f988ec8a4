"""Labels, the loss and the arguments of forward: transformers' Llama and a full-vocabulary cross-entropy say what."""

import pytest
import torch
import torch.nn.functional as F

from indraquantum.loss_v2 import TeacherSignals
from indraquantum.model import IndraQuantumPhase2
from small_model import V, make, make_with_twin, tokens


def labelled(rows=2, length=11):
    ids = tokens(rows, length)
    labels = ids.clone()
    labels[0, :4], labels[1, -2:] = -100, -100
    return ids, labels


def gradients(loss, model):
    weights = dict(model.named_parameters())
    used = {name: weight for name, weight in weights.items() if weight.requires_grad and "references" not in name}
    return dict(zip(used, torch.autograd.grad(loss, list(used.values()), retain_graph=True), strict=True))


@pytest.mark.parametrize("items", [None, 31, torch.tensor(31)])
@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradients_equal_llamas(items, training):
    model, llama = (each.train(training) for each in make_with_twin())
    ids, labels = labelled()
    ours, theirs = (each(input_ids=ids, labels=labels, num_items_in_batch=items).loss for each in (model, llama))
    torch.testing.assert_close(ours, theirs)
    reference = gradients(theirs, llama)
    for name, gradient in gradients(ours, model).items():
        name = name.replace("embedding.", "model.embed_tokens.").replace("backbone.", "model.")
        torch.testing.assert_close(gradient, reference.pop(name), rtol=1e-4, atol=1e-6)
    assert not reference


@pytest.mark.parametrize("options", [{}, {"ends": "shared"}, {"projector": "linear"}, {"head": "born"}])
def test_labels_are_shifted_and_shift_labels_are_not(options):
    model = make(**options)
    ids, labels = labelled()
    output = model(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.logits, model(ids).logits)
    ours, reference = gradients(output.loss, model), gradients(expected, model)
    for name in ours:
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-4, atol=1e-6)
    aligned = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert abs(aligned - expected) > 0.05
    torch.testing.assert_close(model(ids, shift_labels=labels).loss, aligned)
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=labels).loss, aligned)  # as in transformers


def test_parts_of_a_step_add_up():
    model = make()
    ids, labels = labelled(4, 11)
    items = (labels[:, 1:] != -100).sum()
    whole = gradients(model(ids, labels=labels).loss, model)
    parts = [gradients(model(ids[[i]], labels=labels[[i]], num_items_in_batch=items).loss, model) for i in range(4)]
    for name in whole:
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-4, atol=1e-6)


def test_without_any_label_the_loss_is_0():
    model, ids = make(), tokens(2, 7)
    for items in (None, 0, torch.tensor(0)):
        assert model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=items).loss == 0


def test_labels_of_another_document_are_not_learnt():
    model, ids = make(), tokens(1, 8)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1]])
    output = model(ids, segment_ids=segments, labels=ids)
    pairs = torch.tensor([0, 1, 3])  # the positions whose next token is of the same document
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[0, pairs], ids[0, pairs + 1]))


def test_signals_line_up_with_logits_and_shifted_labels():
    model, ids = make(), tokens(2, 7)
    logits = model(ids).logits.detach()
    own = logits.softmax(-1).flatten(0, 1)
    signals = TeacherSignals(torch.arange(V).expand(14, V), own, torch.rand(14), torch.rand(14))
    # What the model says at each position is its own teacher there: no divergence.
    assert model(ids, labels=ids, signals=signals).terms.kd.item() == pytest.approx(0, abs=1e-5)
    beside = signals._replace(probs_NK=own.roll(1, dims=0))
    assert model(ids, labels=ids, signals=beside).terms.kd > 0.1


@pytest.mark.parametrize("mass", [None, 1.0, 0.8])
def test_inference_mode_gives_the_loss_of_no_grad_on_two_threads(mass):
    """600 tokens are enough for two threads. Signals of mass 0.8 have a tail, which by default is a bucket."""
    model, ids = make(vocab_size=600), tokens(2, 7)
    signals = None if mass is None else TeacherSignals(tokens(14, 5, seed=1), torch.full((14, 5), mass / 5))
    torch.set_num_threads(2)
    with torch.no_grad():
        expected = model(ids, labels=ids, signals=signals).loss
    with torch.inference_mode():
        loss = model(ids, labels=ids, signals=signals).loss
    assert torch.equal(loss, expected)


def test_training_with_labels_never_builds_logits_unless_asked():
    model, ids = make().train(), tokens(2, 7)
    seen = []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    assert model(ids, labels=ids).logits is None
    assert not seen
    kept = model(ids, labels=ids, skip_logits=False, logits_to_keep=3)
    torch.testing.assert_close(kept.logits, model(ids).logits[:, -3:])
    assert model.eval()(ids, labels=ids, skip_logits=True).logits is None


@pytest.mark.parametrize(("chosen", "skipped_in"), [(None, [True]), (False, []), (True, [True, False])])
def test_the_configuration_says_where_calls_with_labels_skip_logits(chosen, skipped_in, tmp_path):
    make(skip_logits=chosen).save_pretrained(tmp_path)
    model, ids = IndraQuantumPhase2.from_pretrained(tmp_path), tokens(2, 7)
    for training in (True, False):
        assert (model.train(training)(ids, labels=ids).logits is None) == (training in skipped_in)
        assert model(ids, labels=ids, skip_logits=False).logits is not None
        assert model(ids).logits is not None


@pytest.mark.parametrize("given", [{}, {"labels": True}, {"output_hidden_states": True}, {"use_cache": False}])
def test_a_tuple_is_what_llama_returns(given):
    model, llama = make_with_twin()
    ids = tokens(2, 7)
    given = {**given, **({"labels": ids} if "labels" in given else {})}
    ours, theirs = (each(ids, return_dict=False, **given) for each in (model, llama))
    assert isinstance(ours, tuple)
    assert len(ours) == len(theirs)
    for mine, reference in zip(ours, theirs, strict=True):
        if torch.is_tensor(reference):
            torch.testing.assert_close(mine, reference)
        else:
            assert type(mine) is type(reference)
    model.config.return_dict = False
    assert len(model(ids, **given)) == len(theirs)
    model.config.return_dict = True
    assert torch.equal(model(ids, **given)[0], ours[0])


def test_hidden_states_and_attentions_equal_llamas():
    model, llama = make_with_twin(attention="eager")
    ids = tokens(2, 7)
    ours, theirs = (each(ids, output_hidden_states=True, output_attentions=True) for each in (model, llama))
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(ours[name], theirs[name])
    model.config.output_hidden_states = True
    torch.testing.assert_close(model(ids).hidden_states, theirs.hidden_states)
    assert model(ids, output_hidden_states=False).hidden_states is None


def test_the_last_hidden_states_are_those_of_the_head():
    model, ids = make(), tokens(2, 7)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == len(model.backbone.layers) + 1
    torch.testing.assert_close(model.logits(output.hidden_states[-1], model.lift_table()), output.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_llamas_and_the_text_alone(side):
    model, llama = make_with_twin()
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    real = slice(4, 9) if side == "left" else slice(0, 5)
    mask[0] = 0
    mask[0, real] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for given in ({}, {"position_ids": positions}):
        ours, theirs = (each(ids, attention_mask=mask, **given).logits for each in (model, llama))
        torch.testing.assert_close(ours[mask == 1], theirs[mask == 1])
        torch.testing.assert_close(ours[0, real], model(ids[:1, real]).logits[0])


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])])
def test_logits_to_keep(keep):
    model, ids = make(), tokens(2, 7)
    whole = model(ids).logits
    expected = whole[:, keep] if torch.is_tensor(keep) else whole[:, -keep:]
    torch.testing.assert_close(model(ids, logits_to_keep=keep).logits, expected)


def test_arguments_stand_in_llamas_order():
    model, llama = make_with_twin()
    ids = tokens(2, 7)
    for arguments in (
        (ids, None, None, None, None, ids),
        (ids, torch.ones_like(ids), None, None, None, None, False, 2),
    ):
        ours, theirs = (each(*arguments).to_tuple() for each in (model, llama))
        torch.testing.assert_close(ours[0], theirs[0])


@pytest.mark.parametrize(
    ("wrong", "meant"), [("attention_msk", "attention_mask"), ("lables", "labels"), ("shift_label", "shift_labels")]
)
def test_a_misspelt_argument_is_named(wrong, meant):
    ids = tokens(1, 5)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'; did you mean '{meant}'?"):
        make()(ids, **{wrong: ids})
    with pytest.raises(TypeError, match="unexpected keyword argument 'token_count'"):
        make()(ids, token_count=3)


def test_wrong_inputs_are_refused_in_words():
    model, ids = make(), tokens(2, 7)
    with pytest.raises(ValueError, match="input_ids: must be given, or inputs_embeds"):
        model(labels=ids)
    with pytest.raises(ValueError, match="input_ids: must be given, or inputs_embeds"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))
    with pytest.raises(ValueError, match="inputs_embeds: got width 40; must be d_model, 20"):
        model(inputs_embeds=torch.zeros(2, 7, 40))
    with pytest.raises(ValueError, match=r"labels: got shape \(2, 6\); must be \(B, T\) = \(2, 7\)"):
        model(ids, labels=ids[:, 1:])


@pytest.mark.parametrize(
    "options",
    [{}, {"ends": "shared", "residual": True}, {"projector": "none"}, {"projector": "none", "residual_head": "turned"}],
)
def test_embeddings_may_stand_in_for_ids(options):
    model, ids = make(**options), tokens(2, 7)
    embeddings = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(ids).logits)
    torch.testing.assert_close(model(inputs_embeds=embeddings, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("options", [{}, {"residual": True, "residual_head": "turned"}, {"projector": "mlp"}])
def test_embeddings_of_another_format_are_converted_to_the_projectors(options):
    model, ids = make(**options), tokens(2, 7)
    rounded = model.get_input_embeddings()(ids).bfloat16()
    assert torch.equal(model(inputs_embeds=rounded).logits, model(inputs_embeds=rounded.float()).logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = (model(inputs_embeds=given, labels=ids) for given in (rounded, rounded.float()))
    assert torch.equal(ours.loss, expected.loss)
    model.bfloat16()
    assert torch.equal(model(inputs_embeds=rounded.float()).logits, model(inputs_embeds=rounded).logits)


@pytest.mark.parametrize(
    "options", [{}, {"readout": "mean"}, {"head": "born"}, {"ends": "shared", "phase_spread": 3.0}]
)
@pytest.mark.parametrize("kind", ["autocast", "weights"])
def test_bfloat16_is_close_to_float32(options, kind):
    model = make(**options)
    ids, labels = labelled()
    exact = model(ids, labels=labels)
    exact.loss.backward()
    gradient = model.embedding.weight.grad.clone()
    model.zero_grad()
    if kind == "weights":
        model.to(torch.bfloat16)
        rounded = model(ids, labels=labels)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(ids, labels=labels)
    rounded.loss.backward()
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert rounded.loss.dtype == torch.float32
    torch.testing.assert_close(rounded.logits.float().softmax(-1), exact.logits.softmax(-1), rtol=0.1, atol=0.01)
    torch.testing.assert_close(rounded.magnitude, exact.magnitude, rtol=0.05, atol=0.05)
    similar = F.cosine_similarity(model.embedding.weight.grad.float().flatten(), gradient.flatten(), dim=0)
    assert similar > 0.99


def test_changing_the_attention_reaches_mask_and_layers():
    model = make()
    ids, segments = tokens(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]])
    expected = model(ids, segment_ids=segments).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids, segment_ids=segments).logits, expected)
    assert model(ids, output_attentions=True).attentions[0].shape == (1, 2, 8, 8)


def test_documents_by_position_alone_are_kept_apart():
    model, ids = make(), tokens(2, 7)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
    output = model(ids, position_ids=positions)
    torch.testing.assert_close(output.logits[:, 3:], model(ids[:, 3:]).logits)
    assert output.past_key_values is None


@pytest.mark.parametrize("training", [False, True])
def test_documents_of_the_flattening_collator_learn_as_alone(training):
    from transformers import DataCollatorWithFlattening

    model = make().train(training)
    documents = [tokens(length, seed=length) for length in (5, 3, 8)]
    batch = DataCollatorWithFlattening(return_position_ids=True)([{"input_ids": ids.tolist()} for ids in documents])
    alone = [model(ids[None], labels=ids[None], num_items_in_batch=13).loss for ids in documents]
    torch.testing.assert_close(model(**batch).loss, sum(alone))
