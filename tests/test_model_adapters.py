"""PEFT on the model: what an adapter adds must reach both ends of it, and merging must change nothing."""

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers.integrations.neftune import activate_neftune

from indraquantum.model import IndraQuantumPhase2
from small_model import NARROW, V, make, tokens

# PEFT still asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {
    "embedding": {"target_modules": ["embedding"]},
    "projector": {"target_modules": ["magnitude", "phase"]},
    "layers": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "all": {"target_modules": "all-linear"},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embedding"]},
    "whole head and readout": {"target_modules": ["q_proj"], "modules_to_save": ["head", "readout", "projector"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embedding": [5, 7]}},
}


def adapted(name="embedding", base=None, **options):
    """The model with an adapter that has learnt something: trained for two steps on its own loss."""
    torch.manual_seed(2)
    peft = get_peft_model(base or make(), LoraConfig(r=4, task_type="CAUSAL_LM", **TARGETS[name]), **options)
    optimizer = torch.optim.Adam([p for p in peft.parameters() if p.requires_grad], lr=0.05)
    ids = torch.cat([tokens(2, 9), torch.tensor([[5, 7] * 4 + [5]])])
    for _ in range(2):
        peft.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft.eval()


SEPARATE = {"ends": "separate"}
TURNED = {"residual": True, "residual_head": "turned"}
MERGED = [
    pytest.param(name, options, id=f"{name}-{options}",
                 marks=() if options == SEPARATE or name in ("embedding", "projector", "whole head and readout")
                 else pytest.mark.slow)
    for name in TARGETS
    for options in ({"ends": "shared"}, SEPARATE, NARROW, TURNED)
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), MERGED)
def test_merging_changes_no_logits(name, options):
    ids = torch.cat([tokens(2, 9), torch.tensor([[5, 7] * 4 + [5]])])
    peft = adapted(name, make(**options))
    before = peft(ids).logits.detach()
    assert (before - make(**options)(ids).logits).abs().max() > 0.05
    with torch.no_grad():
        generated = peft.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
        loop = ids
        for _ in range(3):
            loop = torch.cat([loop, peft(loop).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, loop)
    merged = peft.merge_and_unload()
    assert type(merged) is IndraQuantumPhase2
    assert {"embedding.weight", "head.bias_V"} <= set(merged.state_dict())
    torch.testing.assert_close(merged(ids).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, TURNED], ids=str)
def test_an_adapter_of_the_embedding_reaches_the_head(options):
    peft, ids = adapted(base=make(**options)), tokens(1, 9)
    base = peft.get_base_model()
    delta = base.embedding.get_delta_weight("default")
    plain = make(**options)
    with torch.no_grad():
        plain.embedding.weight += delta
    torch.testing.assert_close(base.lift_table(), plain.lift_table())
    torch.testing.assert_close(peft(ids).logits, plain(ids).logits)
    with peft.disable_adapter():
        torch.testing.assert_close(peft(ids).logits, make(**options)(ids).logits)


def test_noise_on_the_inputs_does_not_reach_the_head():
    peft, ids = adapted().train(), tokens(2, 9)
    base = peft.get_base_model()
    table, loss = base.lift_table(), peft(ids, labels=ids).loss
    activate_neftune(peft, 5.0)
    assert torch.equal(base.lift_table(), table)
    assert peft(ids, labels=ids).loss != loss


def test_a_decode_loop_follows_the_adapter():
    peft, ids = adapted("embedding"), tokens(1, 9)
    with torch.no_grad():
        first = peft(ids[:, :5])
        peft.base_model.merge_adapter()
        merged = peft(ids[:, 5:6], past_key_values=first.past_key_values).logits
        peft.base_model.unmerge_adapter()
        whole = peft(ids[:, :6], use_cache=False).logits[:, -1:]
        with peft.disable_adapter():
            first = peft(ids[:, :5])
            without = peft(ids[:, 5:6], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without, make()(ids[:, :6]).logits[:, -1:])


@pytest.mark.parametrize("name", ["embedding", "all", "whole embedding", "whole head and readout", "some tokens"])
def test_an_adapter_is_saved_and_loaded(name, tmp_path):
    peft, ids = adapted(name), tokens(2, 9)
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, peft(ids).logits)


def test_an_adapter_of_a_longer_vocabulary_is_saved_and_loaded(tmp_path):
    def longer():
        torch.manual_seed(4)
        model = make()
        model.resize_token_embeddings(V + 3)
        return model

    peft = adapted("layers", longer())
    ids = tokens(2, 9) + 3
    peft.save_pretrained(tmp_path, save_embedding_layers=True)
    again = PeftModel.from_pretrained(longer(), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, peft(ids).logits)


@pytest.mark.parametrize("name", ["layers", "embedding", "projector"])
def test_gradient_checkpointing_changes_no_gradient(name):
    ids, found = tokens(2, 9), []
    for checkpointing in (False, True):
        base = make()
        if checkpointing:
            base.activation_checkpointing_enable()
            base.enable_input_require_grads()
        peft = adapted(name, base).train()
        peft(ids, labels=ids).loss.backward()
        found.append({name: p.grad for name, p in peft.named_parameters() if p.requires_grad})
    assert all(gradient.any() for gradient in found[0].values())
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("sizes", [{}, NARROW])
def test_prompts_are_tuned_in_the_width_of_the_embedding(sizes):
    model, ids = make(**sizes), tokens(2, 9)
    torch.manual_seed(2)
    peft = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    prompt = peft.get_prompt(2).detach()
    assert prompt.shape == (2, 3, model.config.d_model)
    reference = model(inputs_embeds=torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)).logits
    output = peft(ids, labels=ids)
    torch.testing.assert_close(output.logits, reference)
    expected = torch.nn.functional.cross_entropy(reference[:, 2:-1].flatten(0, 1), ids.flatten())
    torch.testing.assert_close(output.loss, expected)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    embeddings = torch.cat([prompt, model.get_input_embeddings()(ids)], dim=1)
    written = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(written[:, 9:], model.generate(inputs_embeds=embeddings, **options))
    output.loss.backward()
    assert peft.prompt_encoder.default.embedding.weight.grad.any()


@pytest.mark.parametrize("sizes", [{}, NARROW, {"num_key_value_heads": 1}], ids=str)
def test_a_tuned_prefix_acts_as_text_before_the_input(sizes):
    model, ids, text = make(**sizes), tokens(2, 9), tokens(1, 3, seed=5)
    layers = model(text).past_key_values.layers
    keys_and_values = [part[0].transpose(0, 1) for layer in layers for part in (layer.keys, layer.values)]
    expected = model(torch.cat([text.expand(2, -1), ids], dim=1)).logits[:, 3:]
    peft = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    prefix = peft.prompt_encoder.default.embedding.weight
    prefix.data.copy_(torch.stack(keys_and_values, dim=1).flatten(1))
    output = peft(ids, attention_mask=torch.ones_like(ids), labels=ids)
    torch.testing.assert_close(output.logits, expected)
    torch.testing.assert_close(
        output.loss, torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )
    output.loss.backward()
    assert prefix.grad.any()
