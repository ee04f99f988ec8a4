"""One of our models teaches another through the server: its signals are those of a capture from the model itself."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch

from indraquantum.config import CaptureSettings, ServeSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.fast_tokenizer import save_tokenizer
from indraquantum.inference.load import load
from indraquantum.model.decoder import PackedModel
from indraquantum.serving.engine import Engine
from indraquantum.serving.server import listening, server_of
from indraquantum.teacher.capture import capture
from indraquantum.teacher.signals import open_signals
from small_model import make

K = 7


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """The folder of a model that never learned anything, but is not uniform."""
    tokenizer = open_dataset("--data", world.data).tokenizer
    model = make(vocab_size=tokenizer.vocabulary_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    with torch.no_grad():
        model.head.scale_1.mul_(5)
        for layer in model.backbone.layers:
            layer.mlp.down_proj.weight.mul_(15)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    save_tokenizer(tokenizer, path)
    return path


@pytest.fixture(scope="module")
def address(folder):
    settings = ServeSettings(port=0, slots=4)
    loaded = load(folder, torch.device("cpu"))
    engine = Engine(PackedModel(loaded.inference_model), loaded.tokenizer.eos_id, settings.slots, settings.queue)
    with listening(settings) as listener, engine:
        server = server_of(loaded, settings, engine, listener)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


def test_signals_from_the_server_are_those_of_the_model(world, folder, address, tmp_path):
    options = {"data": world.data, "kind": "topk", "top_k": K, "device": "cpu"}
    local = CaptureSettings(**options, teacher=str(folder), output=tmp_path / "local")
    served = CaptureSettings(**options, teacher=address, output=tmp_path / "served", concurrency=6)
    exact, bounded = capture(local).statistics, capture(served).statistics
    dataset = open_dataset("--data", world.data)
    for split in ("train", "validation"):
        index = np.arange(getattr(dataset, split).num_tokens)
        ours, theirs = (
            open_signals("--signals", settings.output, dataset).batch(split, index) for settings in (served, local)
        )
        torch.testing.assert_close(ours.confidence_N, theirs.confidence_N, rtol=2e-3, atol=1e-4)  # stored in 16 bits
        same = (ours.ids_NK == theirs.ids_NK).all(1)  # near ties may be broken otherwise
        assert same.float().mean() > 0.99
        torch.testing.assert_close(ours.probs_NK[same], theirs.probs_NK[same], rtol=4e-3, atol=1e-4)
    for split, value in exact.teacher_cross_entropy.items():
        assert bounded.teacher_cross_entropy[split] == pytest.approx(value, rel=1e-4)
    low, high = bounded.mean_entropy_bounds_nats
    assert low < exact.mean_entropy_nats < high
