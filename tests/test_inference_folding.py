"""A folded model is a plain Llama that gives the same logits, with the head's bias or without."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import indraquantum
from indraquantum import cli
from indraquantum.config import ExportSettings, TrainSettings
from indraquantum.inference.export_llama import as_llama
from indraquantum.inference.folding import fold, with_bias_layer
from indraquantum.inference.load import Loaded, load_model
from indraquantum.model.exports import exports_of
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from indraquantum.training.loop import train
from small_model import NARROW, WIDE, make, tokens


def indra(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code


def trained_like(**options):
    """A small model with a strong bias and sure predictions, and the same as an InferenceModel."""
    model = make(**options)
    with torch.no_grad():
        model.head.scale_1.mul_(10)
        if model.bias_V is not None:
            model.bias_V.normal_(std=3, generator=torch.Generator().manual_seed(1))
    return model, InferenceModel(ModelShape.from_values(model.config.to_dict()), model.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {}, {"bias": "none"}, {"ends": "shared", "magnitude": "exp"}, {"magnitude": "softplus"}, {"projector": "none"},
        {"projector": "gated"}, {"projector": "linear"}, {"projector": "mlp", "residual": True},
        {"projector": "phase-only"}, {"projector": "frozen"}, {"num_key_value_heads": 1}, {"readout": "mean"},
        NARROW, {"bias": "none", **NARROW, "residual": True, "residual_head": "turned"}, {"projector": "mlp", **WIDE},
        {"projector": "none", "residual_head": "turned"},
    ],
    ids=str,
)  # fmt: skip
def test_the_logits_are_the_same(options, a_tokenizer):
    model, plain = trained_like(**options)
    llama = as_llama(with_bias_layer(fold(plain)), Loaded(plain, a_tokenizer, {}, None, None))
    assert type(llama) is LlamaForCausalLM
    ids = tokens(3, 17)
    with torch.no_grad():
        expected, found = model(ids).logits, llama(ids).logits
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)
    with_bias = options.get("bias") != "none"
    assert llama.config.num_hidden_layers == model.config.num_hidden_layers + with_bias
    if with_bias:  # the bias matters here, so the test can fail
        with torch.no_grad():
            model.bias_V.zero_()
            assert (model(ids).logits - found).abs().max() > 5
    else:
        assert llama.config.hidden_size == model.config.hidden_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bias_survives_sixteen_bits(dtype, a_tokenizer):
    model, plain = trained_like()
    llama = as_llama(with_bias_layer(fold(plain)), Loaded(plain, a_tokenizer, {}, None, None)).to(dtype)
    ids = tokens(3, 17)
    with torch.no_grad():
        p, q = (each(ids).logits.double().log_softmax(-1) for each in (model, llama))
    assert 0 <= (p.exp() * (p - q)).sum(-1).mean() < 2e-3


@pytest.fixture(scope="module")
def a_tokenizer(world):
    from indraquantum.data.tokenizer import load_tokenizer

    return load_tokenizer("--tokenizer", str(world.tokenizer))


@pytest.fixture(scope="module")
def checkpoints(world, tmp_path_factory):
    """Checkpoints with and without a bias, and one with the head born."""
    folder = tmp_path_factory.mktemp("folded")

    def run(name, **options):
        settings = TrainSettings(
            data=world.data, output=folder / name, logs=folder / "logs", threads=1, d_model=12, layers=1, heads=2,
            mlp_width=22, batch_tokens=480, max_steps=4, no_teacher=True, **options,
        )  # fmt: skip
        return train(settings).checkpoint

    return {"learned": run("learned"), "none": run("none", bias="none"), "born": run("born", head="born")}


@pytest.mark.parametrize("bias", ["learned", "none"])
def test_the_exported_folder_is_a_llama(checkpoints, tmp_path, bias):
    assert indra("export", checkpoints[bias], tmp_path / "llama", "--as", "llama") == 0
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    model, tokenizer = load_model(checkpoints[bias], torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode_prompt("the cat sees a dog")])
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    written = [each.generate(ids, do_sample=False, max_new_tokens=6) for each in (model, llama)]
    assert torch.equal(*written)
    card = (tmp_path / "llama" / "README.md").read_text()
    assert "On random tokens its logits differ from the trained model's by at most" in card
    assert ("The head's bias is folded in" in card) == (bias == "learned")


def test_python_exports_and_prints_nothing(checkpoints, tmp_path, capsys):
    report = indraquantum.export(checkpoints["none"], tmp_path / "llama", as_="llama", logs=tmp_path)
    assert report.folder == tmp_path / "llama"
    assert "as a plain Llama" in str(report)
    assert "The model is in" not in capsys.readouterr().out
    with pytest.raises(indraquantum.InvalidInput, match="must be new or empty"):
        indraquantum.export(checkpoints["none"], tmp_path / "llama", ExportSettings(as_="llama"))


@pytest.mark.parametrize("as_", ["llama", "gguf"])
def test_born_is_refused_and_nothing_is_written(checkpoints, tmp_path, capsys, as_):
    assert indra("export", checkpoints["born"], tmp_path / "new", "--as", as_) == 2
    assert "must be transformers, onnx or page for a model with --head born" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_run_without_bias_resumes_and_is_not_one_with_it(checkpoints, world, capsys):
    run = ["train", "--data", world.data, "--output", checkpoints["none"].parent, "--logs",
           checkpoints["none"].parent.parent / "logs", "--threads", 1, "--d-model", 12, "--layers", 1, "--heads", 2,
           "--mlp-width", 22, "--batch-tokens", 480, "--max-steps", 4, "--no-teacher"]  # fmt: skip
    assert indra(*run) == 2
    assert "--bias: got learned; must be none" in capsys.readouterr().err
    assert indra(*run, "--bias", "none") == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "transformers, onnx, page, llama (4 layers of width 64 to hold the bias; 3 of 40 with --bias none), gguf "
         "(f32, f16; q8_0 only in widths that 32 divides; K formats only in widths that 256 divides)"),
        ({"bias": "none", "d_model": 128}, "transformers, onnx, page, llama, gguf (f32, f16, q8_0, K formats)"),
        ({"bias": "none", "d_model": 11, "state_width": 128},
         "transformers, onnx, page, llama, gguf (f32, f16, q8_0, K formats)"),
        ({"head": "born"}, "transformers, onnx, page; not llama and gguf, whose logits are linear, because of --head "
         "born"),
    ],
)  # fmt: skip
def test_a_shape_says_which_exports_it_allows(options, said):
    model, plain = trained_like(**options)
    assert exports_of(model.config) == said
    if not options:
        folded = with_bias_layer(fold(plain))
        assert (folded.layers, folded.width) == (4, 64)


def test_the_dry_run_prints_it(world, tmp_path, capsys):
    options = ["--d-model", 32, "--layers", 1, "--heads", 2, "--mlp-width", 10, "--max-steps", 1, "--batch-tokens", 96]
    assert indra("train", "--dry-run", "--data", world.data, "--no-teacher", "--bias", "none", *options) == 0
    assert "exports: transformers, onnx, page, llama, gguf (f32, f16, q8_0; K formats only" in capsys.readouterr().out
