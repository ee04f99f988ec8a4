"""The model under FSDP2 as accelerate shards it: each layer, the embedding and the rest are units of their own."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers.integrations.neftune import activate_neftune

import forked
from small_model import make, tokens


def sharded(options, *own):
    """The model with a unit for each layer, the embedding, the parts named `own`, and the rest."""
    model = make(**options)
    for part in (*model.backbone.layers, model.embedding, *(getattr(model, name) for name in own), model):
        fully_shard(part)
    return model


def results(model):
    """Text, logits without gradients, the loss, its gradients, and text again."""
    ids = tokens(2, 9)
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = model.generate(ids, **how)
    with torch.no_grad():
        logits = model(ids).logits
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return first, logits, loss.detach(), gradients, model.eval().generate(ids, **how)


@pytest.mark.parametrize("case", ["accelerate's units", "each part a unit", "a hook for inputs", "turned"])
def test_two_processes_compute_what_one_does(case, tmp_path):
    """NEFTune's hook, here without noise, must not see the head's table: it knows inputs of three axes only."""

    options = {"residual": True, "residual_head": "turned"} if case == "turned" else {}

    def of_process(_):
        model = sharded(
            options, *(["projector", "input_projector", "head", "readout"] if case == "each part a unit" else [])
        )
        if case == "a hook for inputs":
            activate_neftune(model, 0.0)
        *others, gradients, text = results(model)
        return *others, {name: gradient.full_tensor() for name, gradient in gradients.items()}, text

    expected = results(make(**options))
    assert "embedding.weight" in expected[3]
    for found in forked.values(2, of_process, tmp_path):
        torch.testing.assert_close(found, expected)
