"""The reader against a plain dictionary of what was written; manifests and shards that are not what they say."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from indraquantum.errors import UserError
from indraquantum.teacher.manifest import Manifest, read_manifest, statistics_of, write_manifest
from indraquantum.teacher.sampling import PositionSignals
from indraquantum.teacher.signals import entry_bits, open_signals, verify_signals, write_shard

VOCABULARY = 1009
ROW_LENGTHS = [11, 7, 13, 0, 5, 13, 2, 13, 13]  # real positions of the training rows
SHA = {name: character * 64 for name, character in zip(("teacher", "tokenizer", "dataset"), "abc", strict=True)}


def dataset_stub(tokenizer=SHA["tokenizer"], dataset=SHA["dataset"]):
    train = SimpleNamespace(num_rows=9, row_token_offsets=np.concatenate([[0], np.cumsum(ROW_LENGTHS)]))
    validation = SimpleNamespace(num_rows=2, row_token_offsets=np.array([0, 3, 20]))
    return SimpleNamespace(
        train=train, validation=validation, content_sha256=dataset, tokenizer=SimpleNamespace(sha256=tokenizer)
    )


def random_signals(positions, draws, seed):
    draw = np.random.default_rng(seed)
    tokens = np.sort(draw.zipf(1.3, (positions, draws)) % VOCABULARY, axis=1)
    found = [np.unique(row, return_counts=True) for row in tokens]
    logprob = -draw.random(positions, np.float32)
    logprob[::5] = np.nan
    return PositionSignals(
        ids_M=np.concatenate([ids for ids, _ in found]),
        amounts_M=np.concatenate([counts for _, counts in found]),
        ids_per_position_N=np.array([len(ids) for ids, _ in found]),
        entropy_N=draw.random(positions, np.float32) * 7,
        confidence_N=draw.random(positions, np.float32),
        next_logprob_N=logprob,
        temperature_entropy_N=draw.random(positions, np.float32) * 9,
    )


def write_signals(folder, draws=50, temperature=1.0, jobs=None):
    """Shards over training rows 0-2, 3-6 and 7 (row 8 has none) and over all held-out rows."""
    folder.mkdir(exist_ok=True)
    fields = {f"{name}_sha256": value for name, value in SHA.items()}
    manifest = Manifest(
        **fields, vocabulary_size=VOCABULARY, temperature=temperature, draws=draws, seed=0, rows_per_shard=3,
        teacher="stub", teacher_revision=None, shards=(), complete=False, statistics=statistics_of(()),
    )  # fmt: skip
    data, shards, written = dataset_stub(), [], {}
    jobs = jobs or [("train", 7, 8), ("validation", 0, 2), ("train", 0, 3), ("train", 3, 7)]
    for number, (split, first, last) in enumerate(jobs):
        begin, end = getattr(data, split).row_token_offsets[[first, last]]
        signals = random_signals(end - begin, draws, number)
        name = f"{split}-{number}.safetensors"
        shards.append(write_shard(folder, name, split, (first, last), signals, manifest, "float32"))
        ends = np.cumsum(signals.ids_per_position_N)
        for place in range(end - begin):
            part = slice(ends[place] - signals.ids_per_position_N[place], ends[place])
            scalars = (signals.entropy_N[place], signals.confidence_N[place], signals.temperature_entropy_N[place])
            written[split, int(begin) + place] = (signals.ids_M[part], signals.amounts_M[part], scalars)
    update = {"shards": tuple(shards), "statistics": statistics_of(tuple(shards))}
    write_manifest(folder, manifest.model_copy(update=update))
    return written


@pytest.mark.parametrize(("draws", "temperature"), [(50, 1.0), (3, 2.0), (307, 1.0)])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_batch_gives_back_what_was_written(tmp_path, draws, temperature, split):
    written = write_signals(tmp_path / "s", draws, temperature)
    store = open_signals("--signals", tmp_path / "s", dataset_stub())
    positions = getattr(dataset_stub(), split).row_token_offsets[-1]
    index_N = np.random.default_rng(0).permutation(np.r_[np.arange(positions), -1, -1, 4])
    batch = store.batch(split, index_N)
    most = max(len(written[split, i][0]) for i in index_N.tolist() if (split, i) in written)
    assert batch.ids_NK.shape == batch.probs_NK.shape == (len(index_N), most)
    assert (batch.ids_NK.dtype, batch.probs_NK.dtype) == (torch.int64, torch.float32)
    assert (batch.temperature_entropy_N is None) == (temperature == 1.0)
    for row, place in enumerate(index_N.tolist()):
        ids, counts, scalars = written.get((split, place), ([], [], (0.0, 0.0, 0.0)))
        assert batch.ids_NK[row].tolist() == [*ids, *[-1] * (most - len(ids))]
        expected = np.array([*counts, *[0] * (most - len(ids))]) / draws
        np.testing.assert_allclose(batch.probs_NK[row], expected, rtol=1e-6)
        ours = [part[row] for part in batch[2:] if part is not None]
        np.testing.assert_allclose(ours, scalars[: len(ours)], rtol=1e-3, atol=1e-6)


def test_no_position_has_signals(tmp_path):
    write_signals(tmp_path / "s")
    store = open_signals("--signals", tmp_path / "s", dataset_stub())
    for index in ([-1, -1], [dataset_stub().train.row_token_offsets[8] + 1], []):
        batch = store.batch("train", np.array(index, np.int64))
        assert len(batch.ids_NK) == len(index)
        assert (batch.ids_NK == -1).all()
        assert not batch.entropy_N.any()


def test_coverage_counts_rows(tmp_path):
    write_signals(tmp_path / "s")
    store = open_signals("--signals", tmp_path / "s", dataset_stub())
    assert store.coverage == store.coverage_by_split["train"] == 8 / 9
    assert store.coverage_by_split["validation"] == 1.0


def test_statistics_are_means_over_positions(tmp_path):
    written = write_signals(tmp_path / "s")
    figures = read_manifest("--signals", tmp_path / "s").statistics
    assert figures.positions == len(written) == sum(ROW_LENGTHS[:8]) + 20
    np.testing.assert_allclose(figures.mean_ids, np.mean([len(ids) for ids, _, _ in written.values()]))
    np.testing.assert_allclose(figures.mean_entropy_nats, np.mean([s[0] for *_, s in written.values()]), rtol=1e-6)
    shards = [load_file(path) for path in sorted((tmp_path / "s").glob("train-*"))]
    logprob = np.concatenate([shard["next_logprob"] for shard in shards]).astype(float)
    np.testing.assert_allclose(figures.teacher_cross_entropy["train"], -np.nanmean(logprob), rtol=1e-3)


def test_size_is_seven_bytes_and_the_bits_of_the_ids(tmp_path):
    """32,000 tokens and 50 draws: 15 + 6 bits for each distinct id."""

    def bits(vocabulary_size, draws=None, kind="sampled"):
        return entry_bits(SimpleNamespace(vocabulary_size=vocabulary_size, draws=draws, kind=kind))

    assert bits(32_000, 50).width == 21
    assert bits(32_768, 50).id == 15
    assert bits(32_769, 63).width == 16 + 6
    assert bits(4096, 64).width == 12 + 7
    assert bits(32_000, kind="topk").width == 15 + 16
    assert bits(32_000, kind="full").width == 32
    written = write_signals(tmp_path / "s")
    bits = sum(16 * len(ids) for ids, _, _ in written.values())  # 10 + 6
    size = sum(path.stat().st_size for path in (tmp_path / "s").glob("*.safetensors"))
    assert 7 * len(written) + bits / 8 <= size <= 7 * len(written) + bits / 8 + 4 * 600


def test_store_travels_to_another_process(tmp_path):
    write_signals(tmp_path / "s")
    store = open_signals("--signals", tmp_path / "s", dataset_stub())
    first = store.batch("train", np.arange(20))
    state = pickle.dumps(store)
    assert len(state) < 20_000
    assert torch.equal(pickle.loads(state).batch("train", np.arange(20)).ids_NK, first.ids_NK)


@pytest.mark.parametrize("name", ["tokenizer", "dataset"])
def test_signals_of_something_else_are_refused_with_both_values(tmp_path, name):
    write_signals(tmp_path / "s")
    with pytest.raises(UserError, match=f"--signals.*{name}_sha256 is {SHA[name]}, not {'d' * 64}"):
        open_signals("--signals", tmp_path / "s", dataset_stub(**{name: "d" * 64}))


def change_manifest(folder, change):
    page = json.loads((folder / "manifest.json").read_text())
    change(page)
    (folder / "manifest.json").write_text(json.dumps(page))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda page: page.update(format="else"), "format indraquantum-signals"),
        (lambda page: page.update(format_version=4), "format_version 3 or lower, not 4"),
        (lambda page: page.update(draws="many"), "damaged: draws"),
        (lambda page: page.pop("seed"), "damaged: seed"),
        (lambda page: page["shards"][0].update(file="../../etc/x.safetensors"), "damaged: shards.0.file"),
        (lambda page: page["shards"][0].update(rows=[0, 8]), "rows"),
        (lambda page: page["shards"][0].update(rows=[7, 10]), "rows"),
        (lambda page: page["shards"][0].update(rows=[-2, 8]), "rows"),
        (lambda page: page["shards"].append(page["shards"][0]), "rows"),
        (lambda page: page["shards"][0].update(file="train-9.safetensors"), "is missing"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, change, message):
    write_signals(tmp_path / "s")
    change_manifest(tmp_path / "s", change)
    with pytest.raises(UserError, match=message):
        open_signals("--signals", tmp_path / "s", dataset_stub())


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="--signals"):
        open_signals("--signals", tmp_path / "nothing", dataset_stub())


def test_cut_off_and_changed_shards_are_refused(tmp_path):
    write_signals(tmp_path / "s")
    verify_signals("--signals", tmp_path / "s", dataset_stub())
    path = tmp_path / "s" / "train-2.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"must have {len(whole)} bytes"):
        open_signals("--signals", tmp_path / "s", dataset_stub())
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(UserError, match="sha256"):
        verify_signals("--signals", tmp_path / "s", dataset_stub())


@pytest.mark.parametrize("place", [0, 9, 30, 200])
def test_a_broken_header_is_one_line(tmp_path, place):
    write_signals(tmp_path / "s")
    path = tmp_path / "s" / "train-2.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 0x15
    path.write_bytes(content)
    store = open_signals("--signals", tmp_path / "s", dataset_stub())
    with pytest.raises(UserError, match="is damaged"):
        store.batch("train", np.arange(3))


def test_an_id_past_the_vocabulary_is_refused(tmp_path):
    write_signals(tmp_path / "s")
    path = tmp_path / "s" / "train-2.safetensors"
    size = load_file(path)["packed"].size
    content = path.read_bytes()
    path.write_bytes(content[:-size] + b"\xff" * size)
    store = open_signals("--signals", tmp_path / "s", dataset_stub())
    with pytest.raises(UserError, match="past the vocabulary"):
        store.batch("train", np.arange(3))
