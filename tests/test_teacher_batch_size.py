"""Batches sized to memory: the estimate against every tensor that lives, and a choice that outlasts a stop."""

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from indraquantum.config import CaptureSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.errors import UserError
from indraquantum.teacher import batch_size
from indraquantum.teacher.batch_size import choose_batch_rows, free_memory, teacher_size
from indraquantum.teacher.capture import capture
from indraquantum.teacher.loading import load_teacher
from indraquantum.teacher.manifest import FORMAT_VERSION
from indraquantum.teacher.teacher_files import find_teacher
from indraquantum.teacher.teacher_model import Teacher
from teacher_world import as_dataset, make_split, random_documents, stop_after_a_shard, write_tokenizer

SHARD = 480  # ten rows of 48


@pytest.fixture
def settings(world, tmp_path):
    return CaptureSettings(
        data=world.data, teacher=str(world.teacher), output=tmp_path / "signals", device="cpu", threads=1
    )


def changed(settings, **changes):
    return CaptureSettings(**settings.model_dump() | changes)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that operations made and that lived at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, storage.data_ptr(), storage.nbytes())
        return result

    def forget(self, address, size):
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "mistral"])
@pytest.mark.parametrize("vocabulary", [300, 5000])
def test_the_estimate_covers_what_a_forward_pass_holds(tmp_path, kind, vocabulary):
    from transformers import AutoConfig, AutoModelForCausalLM

    names = {"vocab_size": vocabulary, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 64,
             "intermediate_size": 172, "max_position_embeddings": 64}  # fmt: skip
    names |= {"num_key_value_heads": 1} if kind == "mistral" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **names))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    files = find_teacher("--teacher", str(tmp_path))
    size = teacher_size(files, 4)
    assert size.weights == sum(parameter.numel() for parameter in model.parameters()) * 4
    split = make_split(random_documents([20, 44] * 8, 0), row_length=64)
    tokenizer = type("", (), {"vocabulary_size": 263, "sha256": ""})
    teacher = load_teacher(files, as_dataset(split, split, tokenizer), torch.device("cpu"))
    teacher.logits(split.batch(np.arange(1)))  # the first product of a process tries what the processor can do
    with LiveBytes() as live:
        teacher.logits(split.batch(np.arange(8)))
    assert live.peak <= size.token * 8 * 64 <= 3 * live.peak


def test_layers_of_different_widths_count_as_the_widest(tmp_path):
    from transformers import Gemma3nTextConfig

    names = {"vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8,
             "num_key_value_heads": 1, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 4,
             "layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 0, "laurel_rank": 4,
             "activation_sparsity_pattern": [0.0, 0.0], "altup_num_inputs": 2}  # fmt: skip
    sizes = []
    for inner in ([20, 40], [40, 40]):
        Gemma3nTextConfig(**names, intermediate_size=inner).save_pretrained(tmp_path)
        sizes.append(teacher_size(find_teacher("--teacher", str(tmp_path)), 4))
    assert sizes[0].token == sizes[1].token == (300 + 4 * 40 + 10 * 16) * 4


def test_quantised_weights_take_as_much_memory_as_their_files(tmp_path):
    page = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 30,
    }
    (tmp_path / "config.json").write_text(json.dumps(page))
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(500))
    files = find_teacher("--teacher", str(tmp_path))
    plain = teacher_size(files, 2)
    (tmp_path / "config.json").write_text(json.dumps(page | {"quantization_config": {"load_in_4bit": True}}))
    assert plain.weights > 10_000
    assert teacher_size(files, 2) == (1000, plain.token)


def test_the_batch_follows_the_free_memory(settings, monkeypatch):
    files = find_teacher("--teacher", settings.teacher)
    size = teacher_size(files, 4)

    def rows(free, **changes):
        monkeypatch.setattr(batch_size, "free_memory", lambda: free)
        return choose_batch_rows(changed(settings, **changes), files, 48)

    twelve = size.weights + 2 * 12 * 48 * size.token  # half of what lies beside the weights is twelve rows
    assert rows(twelve) == 12
    assert rows(3 * twelve, workers=3) == 12
    assert rows(twelve - size.weights // 2, precision="bfloat16") == 24
    assert rows(0) == 1
    assert rows(1 << 50) == 2048 // 48
    assert rows(0, batch_tokens=500) == 500 // 48


def test_free_memory_is_the_least_of_machine_and_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  99 kB\nMemAvailable:   70 kB\nSwapFree: 5 kB\n")
    monkeypatch.setattr(batch_size, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(batch_size, "_CGROUP", tmp_path)
    assert free_memory() == 70 * 1024
    for limit, used, free in (("max", 9, 70 << 10), (50_000, 9_000, 41_000), (10**9, 9, 70 << 10), (5, 9, 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        assert free_memory() == free
    monkeypatch.setattr(batch_size, "_MEMINFO", tmp_path / "none")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 1 << 28


def test_copies_of_files_in_a_container_are_free_memory(tmp_path, monkeypatch):
    """A container that has read a file of 60 kB has that much more of memory.current, but can still use it."""
    monkeypatch.setattr(batch_size, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(batch_size, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("75000\n")
    assert free_memory() == 25_000
    (tmp_path / "memory.stat").write_text("anon 10000\nfile 65000\nactive_file 5000\ninactive_file 60000\n")
    assert free_memory() == 85_000


def test_a_teacher_that_does_not_fit_is_refused_before_it_is_loaded(settings, monkeypatch, asked):
    weights = sum(parameter.numel() for parameter in load_of(settings).parameters()) * 4
    monkeypatch.setattr(batch_size, "free_memory", lambda: weights - 1)
    monkeypatch.setattr("indraquantum.teacher.loading.load_teacher", None)
    with pytest.raises(UserError) as refused:
        capture(settings, None, SHARD)
    given = f"--teacher: got {settings.teacher}; needs 0.0 GB of memory for the weights in float32, and 0.0 GB are free"
    assert str(refused.value).startswith(given)
    assert all(way in str(refused.value) for way in ("`indra teacher`", "GGUF", "server", "--batch-tokens 256"))
    with pytest.raises(UserError, match="for the weights of 3 workers in float32"):
        capture(changed(settings, workers=3, output=settings.output.parent / "b"), None, SHARD)
    assert not asked
    monkeypatch.undo()
    monkeypatch.setattr(batch_size, "free_memory", lambda: weights // 2)
    capture(changed(settings, precision="bfloat16"), None, SHARD)  # which takes half of it
    capture(settings, None, SHARD)  # it is all there
    capture(changed(settings, batch_tokens=256, output=settings.output.parent / "c"), None, SHARD)


def load_of(settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(settings.teacher)


def test_a_teacher_of_the_hub_is_refused_before_its_weights_are_downloaded(settings, monkeypatch, tmp_path):
    from indraquantum.data import download

    hub, asked = tmp_path / "hub", []
    hub.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (hub / name).write_bytes((Path(settings.teacher) / name).read_bytes())
    monkeypatch.setattr(download, "hub_files", lambda field, name, patterns, *_: asked.append(patterns) or hub)
    monkeypatch.setattr(batch_size, "free_memory", lambda: 99)
    with pytest.raises(UserError, match=r"^--teacher: got an/id; needs 0\.0 GB of memory"):
        capture(changed(settings, teacher="an/id"), None, SHARD)
    assert asked == [["*.json"]]


@pytest.fixture
def asked(monkeypatch):
    """The rows of each forward pass."""
    rows, logits = [], Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda self, batch: rows.append(len(batch.index)) or logits(self, batch))
    return rows


def test_a_capture_that_goes_on_keeps_its_batch_whatever_memory_is_free(settings, monkeypatch, asked, tmp_path):
    size = teacher_size(find_teacher("--teacher", settings.teacher), 4)
    monkeypatch.setattr(batch_size, "free_memory", lambda: size.weights + 2 * 3 * 48 * size.token)
    whole = changed(settings, output=tmp_path / "whole")
    capture(whole, None, SHARD)
    assert set(asked) <= {1, 2, 3}
    assert json.loads((whole.output / "manifest.json").read_text())["batch_rows"] == 3
    stop_after_a_shard(settings, None, SHARD)
    monkeypatch.setattr(batch_size, "free_memory", lambda: 1 << 50)
    capture(settings, None, SHARD)
    assert set(asked) <= {1, 2, 3}
    assert files_of(settings.output) == files_of(whole.output)


def test_another_batch_may_be_asked_for_and_is_said(settings, asked, capsys):
    """A batch that the memory does not hold must not bind a capture for good."""
    settings = changed(settings, batch_tokens=48 * 5)
    stop_after_a_shard(settings, None, SHARD)
    asked.clear()
    capture(changed(settings, batch_tokens=48 * 2), None, SHARD)
    assert max(asked) == 2
    assert "in batches of 2 rows instead of 5" in capsys.readouterr().err
    page = json.loads((settings.output / "manifest.json").read_text())
    assert (page["batch_rows"], page["complete"]) == (2, True)


def test_signals_of_version_2_go_on(settings):
    from indraquantum.files import write_manifest_json
    from indraquantum.teacher.signals import verify_signals

    stop_after_a_shard(settings, None, SHARD)
    path = settings.output / "manifest.json"
    page = {name: value for name, value in json.loads(path.read_text()).items() if name != "manifest_sha256"}
    page["format_version"] = 2
    del page["batch_rows"]
    write_manifest_json(path, page)
    capture(settings, None, SHARD)
    page = json.loads(path.read_text())
    assert (page["format_version"], page["batch_rows"], page["complete"]) == (FORMAT_VERSION, 2048 // 48, True)
    verify_signals("--signals", settings.output, open_dataset("--data", settings.data))


@pytest.mark.parametrize("value", [0, -3, "no", 1.5, True])
def test_other_batches_are_refused(value):
    with pytest.raises(ValueError, match=r"batch_tokens: got .*; must be auto, or a whole number of at least 1"):
        CaptureSettings(batch_tokens=value)


@pytest.mark.parametrize(
    "config",
    [{"model_type": "vit"}, {"num_attention_heads": 7}, {"hidden_size": "256"}, {"vocab_size": -1}],
    ids=str,
)
def test_a_teacher_that_is_none_is_refused_before_it_is_sized(tmp_path, config):
    page = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 30}
    (tmp_path / "config.json").write_text(json.dumps(page | config))
    with pytest.raises(UserError, match=r"^--teacher: .*causal LM"):
        teacher_size(find_teacher("--teacher", str(tmp_path)), 4)
