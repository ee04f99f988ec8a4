"""Capture against the teacher asked document by document; stops, damage and changes between two runs."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from indraquantum.config import CaptureSettings, TrainSettings
from indraquantum.errors import UserError
from indraquantum.files import sha256_of
from indraquantum.teacher import capture as capture_module
from indraquantum.teacher import loading
from indraquantum.teacher.capture import capture
from indraquantum.teacher.manifest import read_manifest, write_manifest
from indraquantum.teacher.signals import open_signals, verify_signals
from indraquantum.teacher.teacher_model import Teacher
from indraquantum.training.loop import train
from teacher_world import VOCABULARY, as_dataset, make_dataset, make_split, write_teacher, write_tokenizer

SHARD = 40  # three rows of 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def model(folder):
    return write_teacher(folder)


@pytest.fixture(scope="module")
def dataset(folder, model):
    return make_dataset(folder)


@pytest.fixture
def settings(folder, tmp_path):
    return CaptureSettings(teacher=str(folder), output=tmp_path / "signals", device="cpu", batch_tokens=29)


def changed(settings, **changes):
    return CaptureSettings(**settings.model_dump() | changes)


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_teacher_that_cannot_be_reached_has_a_way_round(world, tmp_path):
    way = f"`indra teacher --data {world.data} --output checkpoints/teacher`, then --teacher checkpoints/teacher"
    offline = {"data": world.data, "teacher": "nobody/llama", "output": tmp_path / "signals"}
    with pytest.raises(UserError, match="^--teacher: got nobody/llama; .* can't be reached; .*" + re.escape(way) + "$"):
        capture(CaptureSettings(**offline))
    with pytest.raises(UserError, match=re.escape(way)):  # of a pickle, the packed folder beside it
        capture(CaptureSettings(**offline | {"data": world.pickle}))
    with pytest.raises(UserError, match=r"^--teacher: got nobody/llama@refs/pr/1; .* can't be reached; "):
        capture(CaptureSettings(**offline | {"teacher": "nobody/llama@refs/pr/1"}))
    dotted = shutil.copytree(world.data, tmp_path / "v1.5")
    with pytest.raises(UserError, match=re.escape(way.replace(str(world.data), str(dotted)))):
        capture(CaptureSettings(**offline | {"data": dotted}))
    data = shutil.copytree(world.data, tmp_path / "mixed")
    way = way.replace(str(world.data), str(data)) + "; or --no-teacher"
    with pytest.raises(UserError, match=re.escape(way) + "$"):
        train(TrainSettings(data=data, teacher="nobody/llama", output=tmp_path / "run", logs=tmp_path / "logs"))


@pytest.mark.parametrize("kind", ["sampled", "topk", "full"])
def test_a_shard_holds_no_more_tokens_with_a_probability_than_fit_into_memory(
    settings, dataset, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(capture_module, "SHARD_ENTRIES", 30_000)
    entries = {"sampled": 50, "topk": 50, "full": dataset.tokenizer.vocabulary_size}[kind]
    capture(changed(settings, kind=kind), dataset)
    shards = read_manifest("", settings.output).shards
    rows = max(entry.rows[1] - entry.rows[0] for entry in shards)
    assert rows * dataset.row_length * entries <= 30_000
    assert (len(shards) > 2) == (kind == "full")


def test_a_teacher_without_a_tokenizer_is_named_for_both_forms_of_the_data(world, tmp_path):
    teacher = shutil.copytree(world.teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("tokenizer*"))
    said = f"--teacher: got {teacher}; has no tokenizer.json and no tokenizer.model; put tokenizer.json and "
    for data in (world.data, world.pickle):
        with pytest.raises(UserError) as refused:
            capture(CaptureSettings(data=data, teacher=str(teacher), output=tmp_path / "signals"))
        assert str(refused.value) == said + "tokenizer_config.json beside the model's files"


@pytest.fixture
def asked(monkeypatch):
    """The number of forward passes, counted."""
    batches = []
    logits = Teacher.logits
    monkeypatch.setattr(Teacher, "logits", lambda self, batch: batches.append(batch) or logits(self, batch))
    return batches


def reference(split, model):
    """For each real position in row order: the teacher's log-probabilities, and the next token or None."""
    ends = {int(end) for end in split.document_offsets[1:]}
    for start, length in split.pieces.tolist():
        ids = torch.from_numpy(split.tokens[start : start + length].astype(np.int64))[None]
        with torch.inference_mode():
            logprobs_TV = model(ids).logits[0].double().log_softmax(-1)
        for place in range(length):
            following = start + place + 1
            yield logprobs_TV[place].numpy(), None if following in ends else int(split.tokens[following])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_signals_equal_each_document_asked_alone(settings, dataset, model, temperature):
    """Exact figures within float16; 1000 draws lie near the distribution they came from, and near no other."""
    report = capture(changed(settings, draws=1000, temperature=temperature), dataset, SHARD)
    store = verify_signals("--signals", settings.output, dataset)
    assert report.coverage == {"train": 1.0, "validation": 1.0}
    for name in ("train", "validation"):
        split = getattr(dataset, name)
        batch = store.batch(name, np.arange(split.num_tokens))
        stored = np.concatenate([load_file(path)["next_logprob"].float() for path in
                                 sorted(settings.output.glob(f"{name}-*.safetensors"))])  # fmt: skip
        label_logprobs = []
        for place, (logprobs_V, label) in enumerate(reference(split, model)):
            entropy = -(np.exp(logprobs_V) * logprobs_V).sum()
            assert float(batch.entropy_N[place]) == pytest.approx(entropy, rel=1e-3)
            assert float(batch.confidence_N[place]) == pytest.approx(np.exp(logprobs_V.max()), rel=1e-3)
            if label is None:
                assert np.isnan(stored[place])
            else:
                assert stored[place] == pytest.approx(logprobs_V[label], rel=2e-3, abs=1e-3)
                label_logprobs.append(logprobs_V[label])
            tempered_V = torch.from_numpy(logprobs_V / temperature).log_softmax(-1).numpy()
            probs_V = np.zeros(VOCABULARY)
            kept = batch.ids_NK[place] >= 0
            probs_V[batch.ids_NK[place][kept]] = batch.probs_NK[place][kept]
            assert probs_V.sum() == pytest.approx(1, abs=1e-5)
            # The expected L1 distance of 1000 draws is at most sum sqrt(2 p / (1000 pi)).
            assert np.abs(probs_V - np.exp(tempered_V)).sum() < 2 * np.sqrt(np.exp(tempered_V) / 500 / np.pi).sum()
            if temperature != 1.0:
                tempered_entropy = -(np.exp(tempered_V) * tempered_V).sum()
                assert float(batch.temperature_entropy_N[place]) == pytest.approx(tempered_entropy, rel=1e-3)
        assert place + 1 == split.num_tokens
        cross_entropy = report.statistics.teacher_cross_entropy[name]
        assert cross_entropy == pytest.approx(-np.mean(label_logprobs), rel=1e-4)


def test_report_and_manifest_agree(settings, dataset, capsys):
    report = capture(settings, dataset, SHARD)
    page = json.loads((settings.output / "manifest.json").read_text())
    positions = dataset.train.num_tokens + dataset.validation.num_tokens
    assert report.positions_asked == report.statistics.positions == positions
    assert (report.positions_kept, report.packed) == (0, True)
    assert report.tokens_per_second > 0
    shards = list(settings.output.glob("*.safetensors"))
    assert report.bytes == sum(path.stat().st_size for path in shards)
    assert len(page["shards"]) == len(shards) == 7 + 1
    assert page["complete"] is True
    assert page["teacher"] == settings.teacher
    assert page["dataset_sha256"] == dataset.content_sha256
    assert {shard["precision"] for shard in page["shards"]} == {"float32"}
    announced = capsys.readouterr().out
    assert f"{positions} positions will take about" in announced
    assert announced.count(" MB on the disk") == 1


def test_the_announcement_counts_the_journals(settings, dataset, monkeypatch, capsys):
    """Many draws make journals far larger than shards; what lies on the disk at its most is what was announced."""
    write, sizes = capture_module.write_manifest, []

    def measured(folder, manifest):  # when a shard is written, and its journal still there
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
        write(folder, manifest)

    monkeypatch.setattr(capture_module, "write_manifest", measured)
    report = capture(changed(settings, draws=20_000), dataset, 10**6)
    message = re.search(
        r" and ([\d.]+) MB on the disk, of which ([\d.]+) MB remain at the end\n", capsys.readouterr().out
    )
    announced, stays = (1e6 * float(number) for number in message.groups())
    assert max(sizes) == pytest.approx(announced, rel=0.15)
    assert report.bytes == pytest.approx(stays, rel=0.3)
    assert announced > 3 * stays


def test_a_manifest_with_shards_of_another_grid_is_refused(settings, dataset):
    capture(settings, dataset, SHARD)
    page = read_manifest("--output", settings.output)
    moved = page.shards[0].model_copy(update={"rows": (0, 2)})
    write_manifest(settings.output, page.model_copy(update={"shards": (moved, *page.shards[1:])}))
    with pytest.raises(
        UserError, match=rf"--output.*lists {moved.file} with rows \[0, 2\] of {moved.split}, which is not"
    ):
        capture(settings, dataset, SHARD)


def test_impossible_signals_are_captured_again(settings, dataset, capsys):
    capture(settings, dataset, SHARD)
    before, page = files_of(settings.output), read_manifest("--output", settings.output)
    path = settings.output / page.shards[0].file
    tensors = load_file(path)
    tensors["confidence"][1] = 7
    save_file(tensors, path)
    sealed = page.shards[0].model_copy(update={"sha256": sha256_of(path), "bytes": path.stat().st_size})
    write_manifest(settings.output, page.model_copy(update={"shards": (sealed, *page.shards[1:])}))
    report = capture(settings, dataset, SHARD)
    assert report.positions_asked == page.shards[0].positions
    assert "confidence is 7, but must be from" in capsys.readouterr().err
    assert files_of(settings.output) == before


def stop_after(monkeypatch, shards, when):
    """Make the capture stop like a kill: after so many shards, before or after the manifest is written."""
    write, done = capture_module.write_manifest, []

    def stopping(folder, manifest):
        if not manifest.shards:
            return write(folder, manifest)
        if when == "after":
            write(folder, manifest)
        done.append(manifest)
        if len(done) == shards:
            raise KeyboardInterrupt
        if when == "before":
            write(folder, manifest)

    monkeypatch.setattr(capture_module, "write_manifest", stopping)


@pytest.mark.parametrize(("shards", "when"), [(1, "before"), (1, "after"), (3, "after"), (4, "before"), (8, "before")])
def test_a_stopped_capture_goes_on_and_ends_in_the_same_bytes(
    settings, dataset, tmp_path, monkeypatch, asked, shards, when
):
    whole = changed(settings, output=tmp_path / "whole")
    capture(whole, dataset, SHARD)
    all_asked = len(asked)
    asked.clear()
    with monkeypatch.context() as context:
        stop_after(context, shards, when)
        with pytest.raises(KeyboardInterrupt):
            capture(settings, dataset, SHARD)
    finished = shards if when == "after" else shards - 1
    if finished:
        store = open_signals("--signals", settings.output, dataset)
        assert len(store.manifest.shards) == finished
        assert store.manifest.complete is False
        assert store.coverage_by_split["validation"] == 1.0
        assert store.coverage < 1.0
    (settings.output / ".train-000000.safetensors.999.tmp").write_bytes(b"half")
    before = len(asked)
    report = capture(settings, dataset, SHARD + 13)  # its own shard size stays
    assert files_of(settings.output) == files_of(whole.output)
    assert report.positions_kept + report.positions_asked == report.statistics.positions
    assert len(asked) == all_asked  # both together: nothing was asked twice
    assert before < all_asked or report.positions_asked == 0
    assert not list(settings.output.glob(".*"))


def test_a_finished_capture_asks_nothing(settings, dataset, monkeypatch):
    first = capture(settings, dataset, SHARD)
    before = files_of(settings.output)
    monkeypatch.setattr(loading, "load_teacher", None)
    again = capture(settings, dataset, SHARD)
    assert (again.positions_asked, again.positions_kept) == (0, first.positions_asked)
    assert again.statistics == first.statistics
    assert files_of(settings.output) == before


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1]),
                                   lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:])])  # fmt: skip
def test_a_damaged_shard_is_captured_again(settings, dataset, spoil, asked, capsys):
    capture(settings, dataset, SHARD)
    before = files_of(settings.output)
    asked.clear()
    spoil(settings.output / "train-000002.safetensors")
    report = capture(settings, dataset, SHARD)
    assert files_of(settings.output) == before
    assert report.positions_asked == 39
    assert len(asked) == 2
    assert "train-000002.safetensors is missing or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("batch_tokens", [1, 13, 10_000])
def test_batch_size_does_not_change_the_draws(settings, dataset, tmp_path, batch_tokens):
    capture(settings, dataset, SHARD)
    other = changed(settings, output=tmp_path / "other", batch_tokens=batch_tokens)
    capture(other, dataset, SHARD)
    index = np.arange(dataset.train.num_tokens)
    ours, theirs = (open_signals("--signals", one.output, dataset).batch("train", index) for one in (settings, other))
    same = [set(a.tolist()) == set(b.tolist()) for a, b in zip(ours.ids_NK, theirs.ids_NK, strict=True)]
    assert np.mean(same) > 0.97  # a rounding error may move a draw across an edge, rarely
    torch.testing.assert_close(ours.entropy_N, theirs.entropy_N, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(("field", "value"), [("draws", 51), ("seed", 7), ("temperature", 1.5)])
def test_changed_options_are_refused_with_both_values(settings, dataset, field, value):
    capture(settings, dataset, SHARD)
    before = files_of(settings.output)
    with pytest.raises(UserError, match=f"^--{field}: got {value};.* {field} {getattr(settings, field)}, not {value}"):
        capture(changed(settings, **{field: value}), dataset, SHARD)
    assert files_of(settings.output) == before


def test_a_changed_teacher_or_dataset_is_refused(settings, dataset, folder, tmp_path):
    capture(settings, dataset, SHARD)
    with pytest.raises(UserError, match=r"^--data: .*dataset_sha256 [0-9a-f]{64}, not [0-9a-f]{64}"):
        capture(settings, make_dataset(folder, seed=5), SHARD)
    other = shutil.copytree(folder, tmp_path / "other")
    write_teacher(other, seed=1)
    with pytest.raises(UserError, match=r"^--teacher: .*teacher_sha256 [0-9a-f]{64}, not [0-9a-f]{64}"):
        capture(changed(settings, teacher=str(other)), dataset, SHARD)


def test_the_seed_changes_the_draws_only(settings, dataset, tmp_path):
    capture(settings, dataset, SHARD)
    other = changed(settings, output=tmp_path / "other", seed=1)
    capture(other, dataset, SHARD)
    ours, theirs = (load_file(one.output / "train-000001.safetensors") for one in (settings, other))
    assert torch.equal(ours["entropy"], theirs["entropy"])
    assert not torch.equal(ours["ids_per_position"], theirs["ids_per_position"])


def test_bfloat16_is_recorded_and_near_float32(settings, dataset, tmp_path):
    capture(settings, dataset, SHARD)
    half = changed(settings, output=tmp_path / "half", precision="bfloat16")
    capture(half, dataset, SHARD)
    page = json.loads((half.output / "manifest.json").read_text())
    assert {shard["precision"] for shard in page["shards"]} == {"bfloat16"}
    index = np.arange(dataset.train.num_tokens)
    ours, theirs = (open_signals("--signals", one.output, dataset).batch("train", index) for one in (half, settings))
    difference = (ours.entropy_N - theirs.entropy_N).abs()
    assert 0 < difference.mean() < 0.03 * theirs.entropy_N.mean()  # 8 bits of mantissa
    assert (ours.confidence_N - theirs.confidence_N).abs().mean() < 0.03


def test_what_else_lies_in_the_folder_stays(settings, dataset):
    settings.output.mkdir()
    others = ["finance.journal", ".notes.tmp", ".mixed_train.pkl.12.tmp", "train-000000.safetensors.bak"]
    for name in others:
        (settings.output / name).write_text("kept")
    (settings.output / ".build.tmp").mkdir()
    left = ["train-000000.safetensors.journal", ".train-000001.safetensors.77.tmp", ".manifest.json.77.tmp"]
    for name in left:  # of a capture that was killed
        (settings.output / name).write_bytes(b"half")
    capture(settings, dataset, SHARD)
    assert {path.name for path in settings.output.iterdir()} >= {*others, ".build.tmp"}
    assert not {path.name for path in settings.output.iterdir()} & set(left)


def test_a_capture_does_not_go_on_from_a_manifest_that_was_changed(settings, dataset):
    capture(settings, dataset, SHARD)
    path = settings.output / "manifest.json"
    path.write_text(path.read_text().replace(settings.teacher, settings.teacher + "x"))
    before = files_of(settings.output)
    with pytest.raises(UserError, match=r"--output: got \S+manifest\.json; is damaged"):
        capture(settings, dataset, SHARD)
    assert files_of(settings.output) == before


def test_two_captures_into_one_folder(settings, dataset):
    settings.output.mkdir()
    with capture_module._only_writer(settings.output):  # noqa: SIM117 - two different things
        with pytest.raises(UserError, match=r"--output.*is in use by another run"):
            capture(settings, dataset, SHARD)


def test_a_capture_that_ends_while_another_one_starts_is_not_done_twice(settings, dataset, monkeypatch):
    def meanwhile(field, folder):
        monkeypatch.undo()
        capture(settings, dataset, SHARD)
        return folder

    monkeypatch.setattr(capture_module, "make_folder", meanwhile)
    assert capture(settings, dataset, SHARD).positions_asked == 0


def test_a_capture_that_is_stopped_leaves_nothing_half_written(settings):
    settings.output.mkdir()
    with pytest.raises(SystemExit), capture_module._only_writer(settings.output):  # noqa: PT012 - what stops it
        (settings.output / ".train-000001.safetensors.7.tmp").write_bytes(b"half")  # a worker's
        raise SystemExit(143)
    assert files_of(settings.output) == {}


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143), RuntimeError("of the driver")])
def test_a_capture_that_is_stopped_while_the_teacher_loads_binds_no_options(settings, dataset, monkeypatch, stop):
    def stopped(*_):
        raise stop

    with monkeypatch.context() as context:
        context.setattr(loading, "load_teacher", stopped)
        with pytest.raises(type(stop)):
            capture(settings, dataset, SHARD)
    assert files_of(settings.output) == {}
    assert capture(changed(settings, draws=51), dataset, SHARD).coverage["train"] == 1.0


def test_a_teacher_of_nan_is_refused_and_nothing_is_stored(settings, dataset, folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--teacher.*finite logits"):
        capture(changed(settings, teacher=str(broken)), dataset, SHARD)
    assert files_of(settings.output) == {}


def test_a_part_is_captured_and_the_same_command_captures_the_rest(settings, dataset, tmp_path):
    part = changed(settings, max_positions=60)
    report = capture(part, dataset, shard_positions=26)
    manifest = read_manifest("", settings.output)
    assert 60 <= report.statistics.positions < 60 + 26
    assert 0 < report.coverage["train"] < report.coverage["validation"] == 1.0
    assert not manifest.complete
    again = capture(part, dataset, shard_positions=26)
    assert (again.positions_asked, again.statistics) == (0, report.statistics)
    assert read_manifest("", settings.output) == manifest
    capture(settings, dataset)
    capture(changed(settings, output=tmp_path / "whole"), dataset, shard_positions=26)
    assert read_manifest("", settings.output) == read_manifest("", tmp_path / "whole")


def test_padded_vocabulary_is_renormalised(settings, dataset, folder, tmp_path):
    wide = shutil.copytree(folder, tmp_path / "wide")
    model = write_teacher(wide, vocabulary=VOCABULARY + 50)
    capture(changed(settings, teacher=str(wide)), dataset, SHARD)
    batch = open_signals("--signals", settings.output, dataset).batch("train", np.arange(5))
    assert batch.ids_NK.max() < VOCABULARY
    with torch.inference_mode():
        ids = torch.from_numpy(dataset.train.tokens[:5].astype(np.int64))[None]
        logprobs = model(ids).logits[0, :, :VOCABULARY].log_softmax(-1)
    torch.testing.assert_close(batch.entropy_N, -(logprobs.exp() * logprobs).sum(-1), rtol=1e-3, atol=1e-3)


def test_output_that_cannot_be_written(settings, dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output"):
        capture(changed(settings, output=tmp_path / "file" / "signals"), dataset, SHARD)


@pytest.mark.shared
def test_real_teacher_on_real_text(settings, shared):
    """The figures of the teacher's own README, on a few of the same paragraphs."""
    from indraquantum.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("--tokenizer", str(shared / "teacher"))
    lines = (shared / "data/wikitext/wiki.valid.tokens").read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if line.strip() and not line.strip().startswith("=")][:16]
    split = make_split([ids[:200] for ids in tokenizer.encode_documents(lines)], row_length=256)
    dataset = as_dataset(split, split, tokenizer)
    figures = capture(changed(settings, teacher=str(shared / "teacher"), batch_tokens=2048), dataset).statistics
    assert figures.teacher_cross_entropy["train"] == pytest.approx(3.45, abs=0.3)
    assert figures.mean_entropy_nats == pytest.approx(3.53, abs=0.3)
    assert figures.mean_confidence == pytest.approx(0.354, abs=0.04)
    assert figures.mean_ids == pytest.approx(24.4, abs=2)
    assert figures.bytes_per_token == pytest.approx(7 + figures.mean_ids * (12 + 6) / 8, abs=0.5)
