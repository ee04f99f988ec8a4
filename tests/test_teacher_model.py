"""Loading teachers and keeping packed documents apart: each document alone is the reference."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from indraquantum.errors import UserError
from indraquantum.model.masks import document_mask
from indraquantum.teacher.checks import packs_right
from indraquantum.teacher.loading import load_model, load_teacher
from indraquantum.teacher.teacher_files import check_tokenizer, find_teacher
from teacher_world import VOCABULARY, make_dataset, write_teacher, write_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("teacher"))
    write_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return make_dataset(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def load(folder, dataset):
    return load_teacher(find_teacher("--teacher", str(folder)), dataset, CPU)


def assert_each_document_alone(teacher, dataset):
    rows = np.arange(dataset.train.num_rows)
    batch = dataset.train.batch(rows)
    logits_BTV = teacher.logits(batch)
    compared = 0
    for row in rows:
        for segment in range(batch.segments[row].max() + 1):
            columns = batch.segments[row] == segment
            with torch.inference_mode():
                alone = teacher.model(torch.from_numpy(batch.input_ids[row, columns])[None]).logits[0]
            torch.testing.assert_close(logits_BTV[row, columns], alone, rtol=1e-3, atol=1e-4)
            compared += columns.sum()
    assert compared == dataset.train.num_tokens


def test_document_mask_by_hand():
    mask = document_mask(torch.tensor([[0, 0, 1, -1]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_packed_documents_equal_each_alone(folder, dataset):
    teacher = load(folder, dataset)
    assert teacher.packed
    assert_each_document_alone(teacher, dataset)


def test_a_teacher_that_leaks_gets_one_document_at_a_time(folder, dataset, monkeypatch):
    def causal_only(segments_BT):
        return torch.ones_like(segments_BT[:, None, :, None] + segments_BT[:, None, None], dtype=bool).tril()

    monkeypatch.setattr("indraquantum.model.masks.document_mask", causal_only)
    teacher = load(folder, dataset)
    assert not teacher.packed
    assert_each_document_alone(teacher, dataset)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_keep_documents_apart(folder, dataset, attention):
    teacher = load(folder, dataset)
    teacher.model.set_attn_implementation(attention)
    assert packs_right(teacher, dataset.train.batch(np.arange(5)))


SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16,
         "intermediate_size": 19, "max_position_embeddings": 31, "initializer_range": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "packed"), [("gpt2", True), ("gpt_neox", True), ("qwen2", True), ("mistral", True), ("bloom", None)]
)
def test_other_architectures(folder, dataset, tmp_path, kind, packed):
    """With every architecture, documents don't influence each other. A model that ignores the mask is detected."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    extra = {"num_key_value_heads": 1} if kind in ("qwen2", "mistral") else {}
    config = AutoConfig.for_model(kind, **SMALL, **extra)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / name)
    teacher = load(tmp_path, dataset)
    assert packed is None or teacher.packed == packed
    assert_each_document_alone(teacher, dataset)


def test_half_precision_files_are_computed_in_float32(copy, dataset):
    weights = {name: tensor.half() for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text()) | {"dtype": "float16"}
    (copy / "config.json").write_text(json.dumps(config))
    teacher = load(copy, dataset)
    assert teacher.precision == "float32"
    assert all(parameter.dtype == torch.float32 for parameter in teacher.model.parameters())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("exact", [True, False])
def test_the_faster_products_are_used_where_they_are_exact(folder, dataset, monkeypatch, packed, exact):
    from indraquantum.kernels import onednn

    teacher, seen = load(folder, dataset), set()
    teacher.packed = packed
    settings, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    teacher.model.register_forward_hook(lambda *_: seen.add(settings.fp32_precision))
    monkeypatch.setattr(onednn, "is_exact", lambda: exact)
    teacher.logits(dataset.train.batch(np.arange(2)))
    assert seen == {"bf16" if exact else before}
    assert settings.fp32_precision == before


def test_padded_vocabulary_is_accepted_and_a_smaller_one_refused(copy, dataset):
    write_teacher(copy, vocabulary=VOCABULARY + 6)
    assert load(copy, dataset).logits(dataset.train.batch(np.arange(2))).shape[-1] == VOCABULARY + 6
    write_teacher(copy, vocabulary=VOCABULARY - 1)
    with pytest.raises(UserError, match=f"--teacher.*{VOCABULARY} tokens, not {VOCABULARY - 1}"):
        load(copy, dataset)


def test_too_short_a_context_is_refused(copy, dataset):
    write_teacher(copy, max_position_embeddings=12)
    with pytest.raises(UserError, match="13 tokens at once, but its context is 12"):
        load(copy, dataset)


def test_another_tokenizer_is_refused_with_both_hashes(folder, dataset, copy):
    check_tokenizer(find_teacher("--teacher", str(folder)), dataset)
    write_tokenizer(copy, text="something else altogether ")
    with pytest.raises(UserError, match=rf"--teacher.*{dataset.tokenizer.sha256}.*sha256 [0-9a-f]{{64}}"):
        check_tokenizer(find_teacher("--teacher", str(copy)), dataset)


def test_missing_weights_are_refused_not_invented(copy, dataset):
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copy, dataset)


NOT_LOADED = "must be a causal LM that transformers can load "


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model.safetensors", lambda whole: whole[:-100], NOT_LOADED + r"\(.*header"),
        ("model.safetensors", lambda whole: b"", NOT_LOADED + r"\(.*header"),
        ("model.safetensors", None, NOT_LOADED + r"\(.*no file named model\.safetensors"),
        ("config.json", None, r"has no config\.json"),
        ("config.json", lambda whole: b"{", r"config\.json; must be JSON"),
        ("config.json", lambda whole: b'{"model_type": "nobody-knows"}', NOT_LOADED + r"\(.*model type nobody-knows"),
        ("config.json", lambda whole: b'{"model_type": "vit"}', NOT_LOADED + r"\(vit is not a causal LM\)"),
    ],
)
def test_what_is_no_causal_lm_is_one_line(copy, dataset, name, content, said):
    whole = (copy / name).read_bytes()
    (copy / name).unlink()
    if content:
        (copy / name).write_bytes(content(whole))
    with pytest.raises(UserError, match=said) as caught:
        load(copy, dataset)
    assert str(caught.value).startswith("--teacher: got ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["owner/nobody-has-this", "./no/such/folder", __file__])
def test_unknown_teachers_say_what_to_do(name):
    with pytest.raises(UserError, match="--teacher FOLDER"):
        find_teacher("--teacher", name)


def test_hash_is_the_weights_and_the_meaning_of_the_configuration(folder, copy):
    before = find_teacher("--teacher", str(folder)).sha256()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}, indent=7))
    assert find_teacher("--teacher", str(copy)).sha256() == before
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert find_teacher("--teacher", str(copy)).sha256() != before
    write_teacher(copy, seed=1)
    assert find_teacher("--teacher", str(copy)).sha256() != before


def test_loading_leaves_transformers_settings_as_they_were(folder, dataset, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, dataset)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr().err == ""


def test_a_model_without_a_dataset_is_on_the_device_too(folder):
    """The demo lets such a model write. The meta device stands for a GPU."""
    model = load_model(find_teacher("--teacher", str(folder)), torch.float32, torch.device("meta"))
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
