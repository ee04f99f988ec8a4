"""Teachers that see windows, chunks or lengths, that look ahead, or whose weights need a package: right, or a clear no.

Models of the real architectures are made on the spot; each document alone is the reference.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from indraquantum.errors import UserError
from indraquantum.teacher.checks import differences, is_causal, packs_right, telling_rows
from indraquantum.teacher.loading import load_teacher, teacher_config
from indraquantum.teacher.refusals import refused_in_one_line
from indraquantum.teacher.teacher_files import TeacherFiles, find_teacher
from teacher_world import (
    ROW,
    VOCABULARY,
    as_dataset,
    make_dataset,
    make_split,
    random_documents,
    write_teacher,
    write_tokenizer,
)
from test_teacher_model import assert_each_document_alone

CPU = torch.device("cpu")
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 31,
         "initializer_range": 0.7}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4}  # fmt: skip
LAYERED = {
    "mistral": {"sliding_window": 4},
    "mixtral": {"sliding_window": 4, **EXPERTS},
    "phi3": {"sliding_window": 4, "pad_token_id": 1},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 4, **EXPERTS},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "llama4_text": {"attention_chunk_size": 4, "intermediate_size_mlp": 24, **EXPERTS},
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def dataset(tokenizer_folder):
    return make_dataset(tokenizer_folder)


@pytest.fixture
def make(tokenizer_folder, tmp_path):
    """Write a random model of an architecture and load it as a teacher."""

    def made(kind, data, precision="auto", **options):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(kind)
        config = type(config)(**{name: value for name, value in SMALL.items() if hasattr(config, name)} | options)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer_folder / name, tmp_path / name)
        return load_teacher(find_teacher("--teacher", str(tmp_path)), data, CPU, precision)

    return made


@pytest.mark.parametrize("kind", LAYERED)
def test_windows_and_chunks_are_those_of_each_document_alone(make, dataset, kind):
    teacher = make(kind, dataset, **LAYERED[kind])
    assert teacher.packed
    assert_each_document_alone(teacher, dataset)
    teacher.layered = False  # one mask for all layers: what is beyond a window is seen
    assert not packs_right(teacher, telling_rows(dataset))


@pytest.mark.parametrize("precision", ["bfloat16", "mixed"])
@pytest.mark.parametrize("kind", ["mistral", "mixtral", "gpt_oss", "gemma3_text"])
def test_sixteen_bits_neither_hide_a_fault_nor_invent_one(make, dataset, kind, precision):
    teacher = make(kind, dataset, precision, **LAYERED[kind])
    assert (teacher.precision, teacher.packed, teacher.layered) == (precision, True, True)
    if precision == "mixed":
        assert teacher.model.config._attn_implementation == "eager"
    teacher.layered = False
    assert not packs_right(teacher, telling_rows(dataset))


def test_a_fault_that_only_held_out_rows_can_show_is_found(make, tokenizer_folder, dataset):
    """Training documents fit the window; the check looks at the one held-out document that does not."""
    short = make_split(random_documents([4, 3] * 20, seed=0))
    train, validation = (as_dataset(*pair, dataset.tokenizer) for pair in ((short, short), (short, dataset.validation)))
    teacher = make("mistral", validation, sliding_window=4)
    assert teacher.packed
    teacher.layered = False
    assert packs_right(teacher, telling_rows(train))
    assert not packs_right(teacher, telling_rows(validation))


def test_the_rows_that_are_looked_at(dataset):
    lengths = [6, 7, 13, 5, 8, 4, 4, 3, 2, 12, 1]
    documents = [np.arange(n, dtype=np.uint16) + 2 for n in lengths]
    rows = telling_rows(as_dataset(make_split(documents), make_split(documents[:1]), dataset.tokenizer))
    assert [np.bincount(row[row >= 0]).tolist() for row in rows.segments] == [[13], [4, 4, 3, 2], [12, 1]]
    assert rows.input_ids.shape == (3, ROW)


@pytest.mark.parametrize(("longest_as_ever", "packed"), [(12, False), (13, True)])
def test_longrope_is_scaled_by_each_documents_own_length(make, dataset, longest_as_ever, packed):
    """The model takes the long factors for a whole batch as soon as one document in it is long: here 13 tokens are."""
    length = {"original_max_position_embeddings": longest_as_ever}
    teacher = make("phi3", dataset, pad_token_id=1, rope_parameters=LONGROPE | length, **length)
    assert teacher.packed == packed
    assert_each_document_alone(teacher, dataset)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_who_looks_ahead_is_no_teacher(make, dataset, precision):
    with pytest.raises(UserError, match=r"--teacher.*must be causal, but a later token changes"):
        make("bert", dataset, precision, is_decoder=False)
    make("bert", dataset, precision, is_decoder=True)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_even_one_token_ahead_is_seen(make, dataset, precision):
    teacher = make("mistral", dataset, precision, sliding_window=None)
    ids_T = dataset.train.tokens[dataset.train.document_offsets[3] :][:13].astype(np.int64)
    assert is_causal(teacher, ids_T)
    alone = teacher.alone
    teacher.alone = lambda ids_T: alone(ids_T) + 0.3 * torch.cat([alone(ids_T)[1:], alone(ids_T)[:1]])
    assert not is_causal(teacher, ids_T)


@pytest.mark.parametrize("quantised", [False, True])
def test_rounding_to_eight_bits_that_looks_at_the_whole_batch_is_no_look_ahead(make, dataset, quantised):
    """The scale of bitsandbytes' int8 is fixed by all rows at once: a later token moves earlier logits a little."""
    teacher = make("mistral", dataset, sliding_window=None)
    alone = teacher.alone
    teacher.alone = lambda ids_T: alone(ids_T) + 0.01 * torch.sin(torch.tensor(float(ids_T.sum())))
    if quantised:
        teacher.model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert is_causal(teacher, np.arange(2, 15)) == quantised


def test_an_encoder_is_refused(tokenizer_folder, dataset, tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    folder = shutil.copytree(tokenizer_folder, tmp_path / "bart")
    config = BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
                        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2)  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(UserError, match="bart has an encoder"):
        load_teacher(find_teacher("--teacher", str(folder)), dataset, CPU)


def test_logits_that_are_not_finite_are_refused_when_the_teacher_is_loaded(tokenizer_folder, dataset, tmp_path):
    shutil.copytree(tokenizer_folder, tmp_path / "nan")
    model = write_teacher(tmp_path / "nan")
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="must give finite logits"):
        load_teacher(find_teacher("--teacher", str(tmp_path / "nan")), dataset, CPU)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_too_little_memory_is_no_mixing_of_documents(tmp_path, error):
    def packed_logits(batch):
        raise error

    model = SimpleNamespace(config=SimpleNamespace())
    teacher = SimpleNamespace(packed_logits=packed_logits, model=model, precision="float32")
    with (
        pytest.raises(UserError, match=r"^--teacher: got t; must fit into the memory of the device"),
        refused_in_one_line(TeacherFiles("--teacher", "t", tmp_path, None)),
    ):
        packs_right(teacher, None)


def test_differences_by_hand():
    reference = torch.tensor([[1.0, -1.0], [3.0, -float("inf")]])
    spread = np.std([1, -1, 3], ddof=1)
    ours = torch.tensor([[1.0, 1.0], [0.0, -float("inf")]])
    np.testing.assert_allclose(differences(ours, reference), [2**0.5 / spread, 3 / 2**0.5 / spread], rtol=1e-6)
    assert differences(torch.full((2, 2), float("nan")), reference).isnan().all()


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "accelerate bitsandbytes"),
        ({"load_in_8bit": True}, "accelerate bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "accelerate optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "accelerate gptqmodel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "accelerate compressed-tensors"),
        ({"quant_method": "fp8"}, "accelerate kernels"),
    ],
)
def test_a_quantised_teacher_without_its_package_says_what_to_install(
    tokenizer_folder, dataset, tmp_path, monkeypatch, method, packages
):
    from transformers import AutoModelForCausalLM

    def without_its_package(*_, **__):
        raise ImportError("Loading such a model requires\na package")

    folder = shutil.copytree(tokenizer_folder, tmp_path / "quantised")
    write_teacher(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": method}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", without_its_package)
    with pytest.raises(UserError, match=rf"needs a package .*; pip install {packages} \(Loading such .* package\)$"):
        load_teacher(find_teacher("--teacher", str(folder)), dataset, CPU)


def test_code_that_a_teacher_brings_is_never_run(tokenizer_folder, tmp_path):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "remote")
    about = {"model_type": "of-its-own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "code.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match="of-its-own needs code of its own, which this program never runs"):
        teacher_config(find_teacher("--teacher", str(folder)))
