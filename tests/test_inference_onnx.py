"""onnxruntime runs an exported graph: the tokens, logits and readouts are those of the model in torch."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.errors import UserError
from indraquantum.files import read_sums
from indraquantum.inference.export_onnx import feed, quantise, session, write_graph
from indraquantum.inference.load import load
from indraquantum.inference.onnx_graph import names, phase_of, quiet
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint
from indraquantum.training.loop import train
from small_model import NARROW, make, tokens

TEXTS = ["the cat sees a dog", "my bird", "the old mouse follows the fish by the river"]
NEW = 7


def indra(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    settings = TrainSettings(
        data=world.data, output=folder / "run", logs=folder / "logs", threads=1, d_model=31, state_width=28,
        layers=1, heads=2, mlp_width=22, batch_tokens=480, max_steps=2, no_teacher=True,
        table_start="cooccurrence",  # with bigrams, two of the texts go on alike
    )  # fmt: skip
    whole = load_checkpoint("CHECKPOINT", train(settings).checkpoint)
    sure = whole.model | {"head.scale_1": whole.model["head.scale_1"] * 5}  # choices far from rounding
    path = folder / "run" / "sure.pt"
    save_checkpoint(path, replace(whole, model=sure))
    return path


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert indra("export", checkpoint, folder, "--as", "onnx") == 0
    return folder


@pytest.fixture(scope="module")
def ours(checkpoint):
    return load(checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def graph(exported):
    return session(exported / "onnx" / "model.onnx")


class Decoder:
    """Greedy decoding in onnxruntime, written as optimum and transformers.js do it."""

    def __init__(self, graph, ids_BT, mask_BT):
        self.graph, self.mask = graph, mask_BT.astype(np.int64)
        self.positions = np.maximum(self.mask.cumsum(-1) - 1, 0)
        shapes = {value.name: value.shape for value in graph.get_inputs()}
        self.past = {
            name: np.zeros((len(ids_BT), shape[1], 0, shape[3]), np.float32)
            for name, shape in shapes.items()
            if name.startswith("past_key_values.")
        }
        self.outputs = [value.name for value in graph.get_outputs()]
        self.read(ids_BT)

    def read(self, ids_BT):
        rows = {"input_ids": ids_BT, "attention_mask": self.mask, "position_ids": self.positions[:, -ids_BT.shape[1] :]}
        found = dict(zip(self.outputs, self.graph.run(None, rows | self.past), strict=True))
        self.past = {name: found[name.replace("past_key_values", "present")] for name in self.past}
        self.found = found

    def write(self, count):
        written = []
        for _ in range(count):
            ids_B1 = self.found["logits"][:, -1].argmax(-1)[:, None]
            written.append(ids_B1)
            self.mask = np.pad(self.mask, ((0, 0), (0, 1)), constant_values=1)
            self.positions = np.concatenate([self.positions, self.positions[:, -1:] + 1], axis=1)
            self.read(ids_B1)
        return np.concatenate(written, axis=1)


def alone(graph, ids):
    return Decoder(graph, np.array([ids]), np.ones((1, len(ids))))


def greedy(loaded, ids, count):
    """The likeliest tokens by the model on transformers' layers, without a cache."""
    ids = torch.tensor([ids])
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, loaded.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, start:].numpy()


def test_greedy_text_is_that_of_torch(graph, ours):
    found = []
    for text in TEXTS:
        ids = ours.tokenizer.encode_prompt(text)
        written = alone(graph, ids).write(NEW)
        assert np.array_equal(written, greedy(ours, ids, NEW))
        found.append(written.tobytes())
    assert len(set(found)) == len(TEXTS)


def test_a_padded_batch_writes_what_each_text_writes(graph, ours):
    rows = [ours.tokenizer.encode_prompt(text) for text in TEXTS]
    longest = max(map(len, rows))
    ids_BT = np.array([[0] * (longest - len(row)) + row for row in rows])
    mask_BT = np.array([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    together = Decoder(graph, ids_BT, mask_BT)
    for value in together.found.values():
        assert np.isfinite(value).all()
    each = [alone(graph, row) for row in rows]
    for name in ("magnitude", "phase"):
        for number, (row, single) in enumerate(zip(rows, each, strict=True)):
            np.testing.assert_allclose(together.found[name][number, -len(row) :], single.found[name][0], atol=1e-5)
    assert np.array_equal(together.write(NEW), np.concatenate([single.write(NEW) for single in each]))


def test_logits_and_readouts_are_those_of_the_model_with_the_cache_or_without(graph, ours):
    ids = torch.tensor([ours.tokenizer.encode_prompt(TEXTS[2])] * 3)
    with torch.no_grad():
        expected = ours.model(ids)
    at_once = Decoder(graph, ids.numpy(), np.ones_like(ids)).found
    parts, start = [], 4
    steps = Decoder(graph, ids[:, :start].numpy(), np.ones((3, start)))
    parts.append(steps.found)
    for place in range(start, ids.shape[1]):
        steps.mask = np.ones((3, place + 1), np.int64)
        steps.positions = np.full((3, 1), place)
        steps.read(ids[:, place : place + 1].numpy())
        parts.append(steps.found)
    for name in ("logits", "magnitude", "phase"):
        np.testing.assert_allclose(at_once[name], expected[name].numpy(), atol=2e-5)
        stepwise = np.concatenate([part[name] for part in parts], axis=1)
        np.testing.assert_allclose(stepwise, expected[name].numpy(), atol=2e-5)
    assert expected["phase"].std() > 0.1  # so that a wrong phase would show


def test_onnxruntime_lifts_the_vocabulary_when_it_loads_the_graph(exported, ours, tmp_path):
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "loaded.onnx"), 3
    file = exported / "onnx" / "model.onnx"
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    lifted = ours.inference_model.lift_table().shape
    kept, loaded = (
        [part for part in onnx.load(path).graph.initializer if sorted(part.dims) == sorted(lifted)]
        for path in (file, tmp_path / "loaded.onnx")
    )
    assert (len(kept), len(loaded)) == (0, 1)  # torch.onnx itself lifts tables of up to 8,192 numbers


def test_names_and_sizes_are_those_of_optimum_and_transformers_js(exported, graph, ours):
    inputs = {value.name: value.shape for value in graph.get_inputs()}
    cache, whole = ["batch_size", 2, "past_sequence_length", 28], "past_sequence_length + sequence_length"
    assert inputs == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", whole],
        "position_ids": ["batch_size", "sequence_length"],
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
    }
    outputs = {value.name: value.shape for value in graph.get_outputs()}
    assert list(outputs) == ["logits", "present.0.key", "present.0.value", "magnitude", "phase"]
    assert outputs["present.0.key"] == ["batch_size", 2, whole, 28]
    config = json.loads((exported / "config.json").read_text())
    sizes = {"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 28, "hidden_size": 56}
    assert config.items() >= {**sizes, "architectures": ["LlamaForCausalLM"]}.items()
    assert (exported / "generation_config.json").is_file()
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert read_sums(exported).keys() == files - {"SHA256SUMS"} >= {"config.json", "onnx/model.onnx"}
    # transformers.js does not read chat_template.jinja
    template = json.loads((exported / "tokenizer_config.json").read_text())["chat_template"]
    assert template == (exported / "chat_template.jinja").read_text()
    card = (exported / "README.md").read_text()
    assert "its logits differ from the trained model's by at most" in card
    assert 'dtype: "fp32"' in card


def test_int8_is_close_and_smaller(exported, ours, tmp_path):
    import onnx

    ids = torch.tensor([ours.tokenizer.encode_prompt(TEXTS[2])])
    whole = exported / "onnx" / "model.onnx"
    quantise(onnx.load(whole), tmp_path / "small.onnx")  # `indra export` would hold the lifted table
    small = session(tmp_path / "small.onnx")
    assert [value.name for value in small.get_inputs()] == names(ours.inference_model)[0]
    initial = [sum(map(len, (part.raw_data for part in onnx.load(path).graph.initializer)))
               for path in (whole, tmp_path / "small.onnx")]  # fmt: skip
    assert initial[1] < 0.4 * initial[0]
    with torch.no_grad():
        expected = ours.model(ids)
    logits, magnitude, phase = small.run(["logits", "magnitude", "phase"], feed(ours.inference_model, ids))
    p, q = (torch.as_tensor(each).double().log_softmax(-1) for each in (expected.logits, logits))
    assert 1e-9 < (p.exp() * (p - q)).sum(-1).mean() < 0.02
    np.testing.assert_allclose(magnitude, expected.magnitude.numpy(), atol=0.1)
    turn = np.abs(np.exp(1j * phase) - np.exp(1j * expected.phase.numpy()))
    assert turn.mean() < 0.1


def test_the_phase_is_torchs_on_the_axes_too(tmp_path):
    values = torch.tensor([-2.0, -1e-30, 0.0, 1e-30, 3.0])
    real, imaginary = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    expected = torch.complex(real, imaginary).angle()
    assert expected[(real < 0) & (imaginary == 0)].tolist() == [pytest.approx(math.pi)] * 2
    torch.testing.assert_close(phase_of(real, imaginary), expected)

    class Phase(torch.nn.Module):
        def forward(self, real, imaginary):
            return phase_of(real, imaginary)

    with quiet():
        torch.onnx.export(Phase(), (real, imaginary), tmp_path / "phase.onnx", dynamo=True, verbose=False)
    found = session(tmp_path / "phase.onnx").run(None, {"real": real.numpy(), "imaginary": imaginary.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@pytest.mark.slow
def test_the_int8_export_holds_the_lifted_table(checkpoint, ours, tmp_path):
    import onnx

    assert indra("export", checkpoint, tmp_path / "small", "--as", "onnx", "--outtype", "int8") == 0
    file = tmp_path / "small" / "onnx" / "model_quantized.onnx"
    table = sorted(ours.inference_model.lift_table().shape)
    assert [part.data_type for part in onnx.load(file).graph.initializer if sorted(part.dims) == table] == [
        onnx.TensorProto.UINT8
    ]
    text = alone(session(file), ours.tokenizer.encode_prompt(TEXTS[0])).write(NEW)
    assert text.shape == (1, NEW)
    assert 'dtype: "q8"' in (tmp_path / "small" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {}, {"ends": "shared", "residual": True, "magnitude": "softplus"},
        {"projector": "none", "bias": "none", "residual_head": "turned"},
        {"projector": "mlp", "head": "born", "readout": "mean"}, {"magnitude": "exp", "num_key_value_heads": 1},
        {"projector": "phase-only", "readout_references": 3, "num_attention_heads": 5, "rope_theta": 100.0},
        {"projector": "gated", "num_attention_heads": 4, "num_key_value_heads": 2}, {"projector": "linear"}, NARROW,
    ],
    ids=str,
)  # fmt: skip
def test_every_variant(options, tmp_path):
    model = make(**options)
    plain = InferenceModel(ModelShape.from_values(model.config.to_dict()), model.state_dict())
    write_graph(plain, tmp_path / "model.onnx", quantised=False)
    graph, ids = session(tmp_path / "model.onnx"), tokens(3, 11)
    with torch.no_grad():
        expected = model(ids)
    halves = Decoder(graph, ids[:, :6].numpy(), np.ones((3, 6)))
    first = halves.found
    halves.mask, halves.positions = np.ones((3, 11), np.int64), np.tile(np.arange(11), (3, 1))
    halves.read(ids[:, 6:].numpy())
    for name in ("logits", "magnitude", "phase"):
        found = np.concatenate([first[name], halves.found[name]], axis=1)
        np.testing.assert_allclose(found, expected[name].numpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("as_", "outtype", "allowed"),
    [("onnx", "f16", "must be f32 or int8 for --as onnx"), ("gguf", "int8", "must be f32, f16 or q8_0 for --as gguf")],
)
def test_a_format_of_another_form_is_one_line(checkpoint, tmp_path, capsys, as_, outtype, allowed):
    assert indra("export", checkpoint, tmp_path / "new", "--as", as_, "--outtype", outtype) == 2
    assert capsys.readouterr().err == f"indra: error: --outtype: got {outtype}; {allowed}\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(checkpoint, tmp_path, capsys, without_package, package):
    without_package(package, ModuleNotFoundError("No module named 'x'"))
    assert indra("export", checkpoint, tmp_path / "new", "--as", "onnx") == 2
    message = capsys.readouterr().err
    assert f"--as: got onnx; needs the package {package}" in message
    assert message.endswith(": pip install 'indraquantum[onnx]'\n")
    assert message.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_model_over_two_gigabytes_is_refused(ours, monkeypatch):
    monkeypatch.setattr("indraquantum.inference.onnx_graph.LARGEST", 1000)
    with pytest.raises(UserError, match=r"weights take 0\.0 GB, and ONNX holds 2"):
        write_graph(ours.inference_model, None, quantised=False)
