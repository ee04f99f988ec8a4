"""The number format of a capture: what auto chooses and why, and that a resumed capture keeps it."""

import json
import math

import numpy as np
import pytest
import torch

from indraquantum.config import CaptureSettings
from indraquantum.errors import UserError
from indraquantum.files import write_manifest_json
from indraquantum.kernels import onednn
from indraquantum.teacher import precision
from indraquantum.teacher.capture import capture
from indraquantum.teacher.manifest import Agreement
from indraquantum.teacher.precision import compare, is_good
from teacher_world import make_dataset, stop_after_a_shard, write_teacher, write_tokenizer

SHARD = 40  # three rows of 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("teacher"))
    write_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return make_dataset(folder)


@pytest.fixture
def settings(folder, tmp_path):
    return CaptureSettings(teacher=str(folder), output=tmp_path / "signals", device="cpu", batch_tokens=29)


@pytest.fixture
def eager(monkeypatch):
    """A machine with 16-bit units on which every capture counts as long and every speed as faster."""
    monkeypatch.setattr(onednn, "has_16_bit_units", lambda: True)
    monkeypatch.setattr(precision, "SHORT", 0)
    monkeypatch.setattr(precision, "LEAST_SPEEDUP", 0)


def changed(settings, **changes):
    return CaptureSettings(**settings.model_dump() | changes)


def page_of(settings):
    return json.loads((settings.output / "manifest.json").read_text())


def shards_of(settings):
    return {path.name: path.read_bytes() for path in settings.output.glob("*.safetensors")}


def as_version_3(settings, **changes):
    """Write the manifest as version 3 wrote it, with other values in `changes`."""
    newer = ("manifest_sha256", "precision", "agreement", "teacher_source")
    page = {name: value for name, value in page_of(settings).items() if name not in newer}
    write_manifest_json(settings.output / "manifest.json", page | {"format_version": 3} | changes)


def test_the_comparison_solved_by_hand():
    exact = torch.tensor([[0.0, 0.0], [5.0, 5.0], [math.log(3), 0.0]])
    other = torch.tensor(
        [[0.0, math.log(3)], [2.0, 2.0], [math.log(3), 0.0]]
    )  # 1/4 and 3/4 for a half each; equal; equal
    found = compare(exact, other, 3.5)
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert (found.positions, found.speedup) == (3, 3.5)
    assert found.kl_nats == pytest.approx(kl / 3, rel=1e-6)
    assert found.largest_kl_nats == pytest.approx(kl, rel=1e-6)
    assert found.entropy_difference_nats == pytest.approx((entropy - math.log(2)) / 3, rel=1e-6)


def test_a_comparison_in_chunks_is_the_same(monkeypatch):
    torch.manual_seed(0)
    exact = torch.randn(11, 7)
    whole = compare(exact, exact.bfloat16(), 1.0)
    monkeypatch.setattr(precision, "_CHUNK", 3 * 7)
    assert compare(exact, exact.bfloat16(), 1.0).model_dump() == pytest.approx(whole.model_dump(), rel=1e-9)
    assert whole.kl_nats > 0


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"kl_nats": 0.0031}, False),
        ({"entropy_difference_nats": 0.011}, False),
        ({"entropy_difference_nats": -0.011}, False),
        ({"speedup": 1.1}, False),
        ({"kl_nats": float("nan")}, False),
    ],
)
def test_mixed_precision_must_agree_and_be_faster(changes, good):
    near = {
        "positions": 5,
        "kl_nats": 0.0029,
        "largest_kl_nats": 9.0,
        "entropy_difference_nats": -0.009,
        "speedup": 1.3,
    }
    assert is_good(Agreement.model_construct(**near | changes)) is good


def test_auto_takes_mixed_precision_where_it_agrees_and_records_the_measurement(
    settings, dataset, eager, monkeypatch, capsys
):
    monkeypatch.setattr(precision, "MOST_KL", 9.0)
    monkeypatch.setattr(precision, "MOST_ENTROPY", 9.0)
    capture(settings, dataset, SHARD)
    page = page_of(settings)
    assert page["precision"] == "mixed"
    assert page["agreement"]["positions"] == dataset.validation.num_tokens
    assert page["agreement"]["largest_kl_nats"] > page["agreement"]["kl_nats"] > 0
    assert "capture: the teacher computes in precision mixed; on 32 held-out positions" in capsys.readouterr().out
    asked_for = changed(settings, output=settings.output.parent / "asked", precision="mixed")
    capture(asked_for, dataset, SHARD)
    assert shards_of(asked_for) == shards_of(settings)
    assert (page_of(asked_for)["precision"], page_of(asked_for)["agreement"]) == ("mixed", None)


def test_auto_stays_with_float32_where_mixed_precision_differs(settings, dataset, eager, monkeypatch):
    monkeypatch.setattr(precision, "MOST_KL", 0.0)
    capture(settings, dataset, SHARD)
    assert page_of(settings)["precision"] == "float32"
    assert page_of(settings)["agreement"]["kl_nats"] > 0
    exact = changed(settings, output=settings.output.parent / "exact", precision="float32")
    capture(exact, dataset, SHARD)
    assert shards_of(exact) == shards_of(settings)


@pytest.mark.parametrize(("short", "units"), [(10**13, True), (0, False)])
def test_a_short_capture_and_another_processor_are_not_measured(settings, dataset, eager, monkeypatch, short, units):
    monkeypatch.setattr(precision, "SHORT", short)
    monkeypatch.setattr(onednn, "has_16_bit_units", lambda: units)
    monkeypatch.setattr(precision, "_ask", None)
    capture(settings, dataset, SHARD)
    assert (page_of(settings)["precision"], page_of(settings)["agreement"]) == ("float32", None)


def test_a_resumed_capture_keeps_its_format(settings, dataset):
    whole = changed(settings, output=settings.output.parent / "whole", precision="bfloat16")
    capture(whole, dataset, SHARD)
    begun = changed(settings, precision="bfloat16")
    stop_after_a_shard(begun, dataset, SHARD)
    capture(settings, dataset, SHARD)  # auto
    assert shards_of(settings) == shards_of(whole)
    assert {entry["precision"] for entry in page_of(settings)["shards"]} == {"bfloat16"}


@pytest.mark.parametrize("tied", [False, True])
def test_mixed_precision_keeps_the_residual_stream_in_float32(dataset, tmp_path, tied):
    from indraquantum.teacher.loading import load_teacher
    from indraquantum.teacher.teacher_files import find_teacher

    write_teacher(write_tokenizer(tmp_path), tie_word_embeddings=tied)
    files, cpu = find_teacher("--teacher", str(tmp_path)), torch.device("cpu")
    rows, found = dataset.validation.batch(np.arange(3)), {}
    for name in ("float32", "mixed", "bfloat16"):
        teacher = load_teacher(files, dataset, cpu, name)
        found[name] = teacher.logits(rows)[rows.segments >= 0].float()
        kinds = {
            type(module).__name__: module.weight.dtype
            for module in teacher.model.modules()
            if hasattr(module, "weight")
        }
        assert teacher.precision == name
        assert teacher.packed
        assert teacher.model.config._attn_implementation == ("eager" if name == "mixed" else "sdpa")  # rows are short
        if name == "mixed":
            assert kinds == {"Linear": torch.bfloat16, "Embedding": torch.float32, "LlamaRMSNorm": torch.float32}
    errors = {name: float((found[name] - found["float32"]).norm()) for name in ("mixed", "bfloat16")}
    assert 0 < errors["mixed"] < errors["bfloat16"] < 0.03 * float(found["float32"].norm())


@pytest.mark.parametrize("finished", [False, True])
def test_formats_are_never_mixed(settings, dataset, finished):
    if finished:
        capture(settings, dataset, SHARD)
    else:
        stop_after_a_shard(settings, dataset, SHARD)
    before = shards_of(settings)
    with pytest.raises(UserError, match=r"--precision.*bfloat16.*are in float32, which is kept; give another --output"):
        capture(changed(settings, precision="bfloat16"), dataset, SHARD)
    assert shards_of(settings) == before


def test_signals_of_an_earlier_version_keep_the_format_of_their_shards(settings, dataset, eager, monkeypatch):
    monkeypatch.setattr(precision, "_ask", None)  # a resumed capture measures nothing
    stop_after_a_shard(changed(settings, precision="bfloat16"), dataset, SHARD)
    as_version_3(settings)
    with pytest.raises(UserError, match=r"--precision.*float32.*are in bfloat16"):
        capture(changed(settings, precision="float32"), dataset, SHARD)
    capture(settings, dataset, SHARD)
    assert {entry["precision"] for entry in page_of(settings)["shards"]} == {"bfloat16"}
    assert page_of(settings)["precision"] == "bfloat16"


def test_signals_of_an_earlier_version_may_have_two_formats(settings, dataset):
    stop_after_a_shard(settings, dataset, SHARD)
    [shard] = page_of(settings)["shards"]
    as_version_3(settings, shards=[shard | {"precision": "a+b"}])
    capture(settings, dataset, SHARD)
    assert {entry["precision"] for entry in page_of(settings)["shards"]} == {"a+b", "float32"}
