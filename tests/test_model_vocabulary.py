"""The table at both ends: its size, its replacement, and when it is lifted anew."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from indraquantum.model import IndraQuantumPhase2
from small_model import D_MODEL, V, make, tokens

VARIANTS = [
    {}, {"ends": "shared", "projector": "mlp"}, {"projector": "none"}, {"head": "born"},
    {"d_model": 28, "state_width": 12},
]  # fmt: skip


def with_bias(**options):
    model = make(**options)
    with torch.no_grad():
        model.head.bias_V.copy_(torch.linspace(-1, 2, V))
    return model


@pytest.mark.parametrize("options", VARIANTS)
def test_a_longer_vocabulary_keeps_the_old_logits_and_starts_the_new_ones_at_their_mean(options, tmp_path):
    model, ids = with_bias(**options), tokens(2, 7)
    before, bias_V = model(ids).logits, model.bias_V.detach().clone()
    embedding = model.resize_token_embeddings(V + 6)
    assert embedding is model.get_input_embeddings()
    assert (model.config.vocab_size, embedding.weight.shape) == (V + 6, (V + 6, options.get("d_model", D_MODEL)))
    after = model(ids).logits
    torch.testing.assert_close(after[..., :V], before)
    torch.testing.assert_close(model.bias_V[V:], bias_V.mean().expand(6))
    torch.testing.assert_close(embedding.weight[V:], embedding.weight[:V].mean(0).expand(6, -1), rtol=0, atol=1e-3)
    new = torch.full_like(ids, V + 5)
    output = model(new, labels=new)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[:, :-1].flatten(0, 1), new[:, 1:].flatten()))
    output.loss.backward()
    assert model.bias_V.grad[V + 5] != 0
    assert model.embedding.weight.grad[V + 5].any()
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, after)


def test_new_tokens_take_little_from_the_old_ones():
    model, ids = make(), tokens(2, 7)
    model.resize_token_embeddings(V + 6)
    # A logit at the mean of the others is below their average in probability.
    assert model(ids).logits.softmax(-1)[..., V:].sum(-1).mean() < 6 / V


def test_without_mean_resizing_new_tokens_start_as_in_a_new_model():
    model = with_bias(table_std=0.125)
    model.resize_token_embeddings(V + 600, mean_resizing=False)
    assert model.embedding.weight[V:].std().item() == pytest.approx(0.125, rel=0.05)
    assert not model.bias_V[V:].any()


@pytest.mark.parametrize("options", VARIANTS)
def test_a_shorter_vocabulary_keeps_its_logits(options, tmp_path):
    model, ids = with_bias(**options), tokens(2, 7) % 31
    before = model(ids).logits
    model.resize_token_embeddings(31)
    torch.testing.assert_close(model(ids).logits, before[..., :31])
    model.save_pretrained(tmp_path)
    assert torch.equal(IndraQuantumPhase2.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)


def test_resizing_rounds_up_and_leaves_what_is_frozen_frozen():
    model = make()
    model.requires_grad_(False)
    model.resize_token_embeddings(pad_to_multiple_of=16)
    assert (model.config.vocab_size, len(model.bias_V)) == (64, 64)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.resize_token_embeddings() is model.embedding
    weight = model.embedding.weight
    model.resize_token_embeddings(64)
    assert model.embedding.weight is weight  # an optimiser may hold it
    assert model(tokens(1, 5)).logits.shape[-1] == 64


def test_a_refused_size_leaves_the_model_as_it_was():
    model, ids = make(), tokens(2, 7)
    before = model(ids).logits
    with pytest.raises(ValueError, match="multiple"):
        model.resize_token_embeddings(V, pad_to_multiple_of=2.5)
    with pytest.raises(ValueError, match=r"embeddings: got shape \(54, 20\); must be \(V, d\) = \(53, 20\)"):
        model.set_input_embeddings(torch.nn.Embedding(54, D_MODEL))
    with pytest.raises(NotImplementedError, match="no table of its own"):
        model.set_output_embeddings(torch.nn.Linear(2 * D_MODEL, V))
    assert torch.equal(model(ids).logits, before)


def test_new_embeddings_are_the_heads_too():
    model, other, ids = make(), make(seed=1), tokens(2, 7)
    assert model.get_output_embeddings() is None
    model.set_input_embeddings(copy.deepcopy(other.embedding))
    with torch.no_grad():
        other.load_state_dict(make().state_dict() | {"embedding.weight": other.embedding.weight})
    assert torch.equal(model(ids).logits, other(ids).logits)


@torch.no_grad()
def decode(model, ids, count=4, between=lambda step: None):
    """Logits of `count` tokens after `ids` in a loop of one's own, and the same without a cache; both greedy."""
    ours, reference = [], []
    output = model(ids)
    for step in range(count):
        between(step)
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        output = model(ids[:, -1:], past_key_values=output.past_key_values)
        ours.append(output.logits[:, -1])
        reference.append(model(ids, use_cache=False).logits[:, -1])
    return torch.stack(ours), torch.stack(reference)


def counted(model, monkeypatch):
    lifts, lift = [], model.lift_table
    monkeypatch.setattr(model, "lift_table", lambda: (lifts.append(1), lift())[1])
    return lifts


@pytest.mark.parametrize("options", VARIANTS)
def test_a_decode_loop_of_ones_own_lifts_the_table_once(options, monkeypatch):
    model = make(**options)
    lifts = counted(model, monkeypatch)
    ours, reference = decode(model, tokens(2, 5), count=4)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-4)
    assert len(lifts) == 1 + 4  # the four of the reference, which keeps no cache


@pytest.mark.parametrize("options", VARIANTS)
def test_offloaded_weights_give_the_same_logits_text_and_loss(options):
    model, ids = make(**options), tokens(2, 5)
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    logits, text = model(ids).logits, model.generate(ids, **how)
    loss = model(ids, labels=ids).loss
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    assert torch.equal(model(ids).logits, logits)
    assert torch.equal(model.generate(ids, **how), text)
    assert torch.equal(model(ids, labels=ids).loss, loss)
    assert all(weight.is_meta for weight in model.parameters())


def changes():
    def optimiser(model):
        with torch.enable_grad():
            model(tokens(1, 5), labels=tokens(1, 5)).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    def exchanged(model):
        model.embedding.weight.data[:] = model.embedding.weight.data.flip(0)

    return {
        "optimiser step": optimiser,
        "in place": lambda model: model.embedding.weight.mul_(1.5),
        ".data in place": lambda model: model.embedding.weight.data.add_(0.01),
        ".data exchanged": exchanged,
        ".data of the projector": lambda model: model.projector.phase.bias.data.add_(0.01),
        "one weight": lambda model: model.embedding.weight.data[7, 3].add_(1e-3),
        "load_state_dict": lambda model: model.load_state_dict(make(seed=5).state_dict()),
        "new embeddings": lambda model: model.set_input_embeddings(make(seed=5).embedding),
        "new dtype": lambda model: model.double(),
        "hook": lambda model: model.projector.register_forward_hook(lambda *a: 2 * a[-1]),
        "parametrization": lambda model: torch.nn.utils.parametrizations.weight_norm(model.projector.phase),
        "resize": lambda model: model.resize_token_embeddings(V + 3),
    }


@pytest.mark.parametrize("change", changes())
def test_no_table_is_kept_beyond_a_change(change):
    model, ids = make(), tokens(2, 5)
    with torch.no_grad():
        first = model(ids)
        changes()[change](model)
        follow = first.logits[:, -1:].argmax(-1)
        if change == "new dtype":
            for layer in first.past_key_values.layers:
                layer.keys, layer.values = layer.keys.double(), layer.values.double()
        output = model(follow, past_key_values=copy.deepcopy(first.past_key_values))
        fresh = copy.deepcopy(model)  # copies keep no table
        expected = fresh(follow, past_key_values=copy.deepcopy(first.past_key_values))
        again = model(follow, past_key_values=first.past_key_values)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(again.logits, expected.logits)
    assert output.logits.shape[-1] == model.config.vocab_size


def test_training_frees_the_kept_table_and_a_copy_has_none():
    model, ids = make(), tokens(1, 5)
    with torch.no_grad():
        model(ids)
    assert model._kept._kept is not None
    assert pickle.loads(pickle.dumps(model))._kept._kept is None
    model(ids, labels=ids)
    assert model._kept._kept is None


def test_overlapping_generations_leave_no_table_behind():
    model, ids = make(), tokens(1, 5)
    first, second = model.lifted(), model.lifted()  # as of two threads: the first to begin ends first
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    with torch.no_grad():
        model.embedding.weight.neg_()
        logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, model(ids).logits)


def test_a_whole_graph_may_run_again_and_after_a_change_of_weights():
    model, ids = make(), tokens(2, 7)
    whole = torch.compile(lambda ids: model(ids, use_cache=True).logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(whole(ids), model(ids).logits)
        model.embedding.weight.mul_(1.5)
        torch.testing.assert_close(whole(ids), model(ids).logits)
