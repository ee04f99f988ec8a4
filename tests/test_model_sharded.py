"""The model under FSDP2 as accelerate shards it: each layer, the embedding and the rest are units of their own."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from transformers.integrations.neftune import activate_neftune

import forked
from small_model import make, tokens


def sharded():
    model = make()
    for part in (*model.backbone.layers, model.embedding, model):
        fully_shard(part)
    return model


def results(model):
    """Logits without gradients, the loss, and its gradients."""
    ids = tokens(2, 9)
    with torch.no_grad():
        logits = model(ids).logits
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    return logits, loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("noisy", [False, True])
def test_two_processes_compute_what_one_does(noisy, tmp_path):
    """NEFTune's hook, here without noise, must not see the head's table: it knows inputs of three axes only."""

    def of_process(_):
        model = sharded()
        if noisy:
            activate_neftune(model, 0.0)
        logits, loss, gradients = results(model)
        return logits, loss, {name: gradient.full_tensor() for name, gradient in gradients.items()}

    expected = results(make())
    assert "embedding.weight" in expected[2]
    for found in forked.values(2, of_process, tmp_path):
        torch.testing.assert_close(found, expected)
