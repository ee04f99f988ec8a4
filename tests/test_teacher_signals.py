"""The reader against a plain dictionary of what was written; manifests and shards that are not what they say."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from indraquantum.errors import UserError
from indraquantum.files import sha256_of
from indraquantum.teacher.manifest import FORMAT_VERSION, Manifest, read_manifest, statistics_of, write_manifest
from indraquantum.teacher.packing_bits import pack_bits, unpack_bits
from indraquantum.teacher.sampling import PositionSignals
from indraquantum.teacher.shard import entry_bits, write_shard
from indraquantum.teacher.signals import open_signals, verify_signals

VOCABULARY = 1009
ROW_LENGTHS = [11, 7, 13, 0, 5, 13, 2, 13, 13]  # real positions of the training rows
SHA = {name: character * 64 for name, character in zip(("teacher", "tokenizer", "dataset"), "abc", strict=True)}


def dataset_stub(tokenizer=SHA["tokenizer"], dataset=SHA["dataset"]):
    train = SimpleNamespace(num_rows=9, row_token_offsets=np.concatenate([[0], np.cumsum(ROW_LENGTHS)]))
    validation = SimpleNamespace(num_rows=2, row_token_offsets=np.array([0, 3, 20]))
    words = SimpleNamespace(sha256=tokenizer, vocabulary_size=VOCABULARY)
    return SimpleNamespace(train=train, validation=validation, content_sha256=dataset, tokenizer=words)


def random_signals(positions, draws, seed):
    draw = np.random.default_rng(seed)
    tokens = np.sort(draw.zipf(1.3, (positions, draws)) % VOCABULARY, axis=1)
    found = [np.unique(row, return_counts=True) for row in tokens]
    confidence = 1 - draw.random(positions, np.float32) * np.float32(1 - 1 / VOCABULARY)
    rest = np.maximum(1 - confidence, np.float32(1e-6))
    least = -np.log(confidence)
    most = confidence * least - rest * np.log(rest / (VOCABULARY - 1))
    logprob = -least - draw.random(positions, np.float32)
    logprob[::5] = np.nan
    return PositionSignals(
        ids_M=np.concatenate([ids for ids, _ in found]),
        amounts_M=np.concatenate([counts for _, counts in found]),
        ids_per_position_N=np.array([len(ids) for ids, _ in found]),
        entropy_N=least + draw.random(positions, np.float32) * (most - least),
        confidence_N=confidence,
        next_logprob_N=logprob,
        temperature_entropy_N=draw.random(positions, np.float32) * np.float32(np.log(VOCABULARY)),
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
        (lambda page: page.update(format_version=FORMAT_VERSION + 1), f"format_version {FORMAT_VERSION} or lower"),
        (lambda page: page.update(draws="many"), "damaged: draws"),
        (lambda page: page.pop("seed"), "damaged: seed"),
        (lambda page: page["shards"][0].update(file="../../etc/x.safetensors"), "damaged: shards.0.file"),
        (lambda page: page["shards"][0].update(rows=[0, 8]), r"train-2\S* and train-0\.safetensors both hold row 0"),
        (lambda page: page["shards"][0].update(rows=[7, 9]), r"has rows \[7, 9\], which the dataset does not have"),
        (lambda page: page["shards"][0].update(rows=[7, 10]), r"has rows \[7, 10\], which the dataset does not have"),
        (lambda page: page["shards"][0].update(rows=[-2, 8]), r"shards.0.*rows \[-2, 8\] must be"),
        (lambda page: page["shards"][0].update(rows=[8, 7]), r"shards.0.*rows \[8, 7\] must be"),
        (lambda page: page["shards"].append(page["shards"][0]), "both hold row 7"),
        (
            lambda page: page["shards"][2].update(rows=[0, 4]),
            "train-2.safetensors and train-3.safetensors both hold row 3",
        ),
        (lambda page: page["shards"][0].update(file="train-3.safetensors"), "two shards name the same file"),
        (lambda page: page.update(vocabulary_size=VOCABULARY - 1), f"vocabulary_size is {VOCABULARY - 1}, not"),
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
    with pytest.raises(UserError, match="outside the vocabulary"):
        store.batch("train", np.arange(3))


def seal_again(folder):
    """Write the manifest anew for the files, so that every hash is right for any content."""
    page = read_manifest("--signals", folder)
    paths = [folder / entry.file for entry in page.shards]
    facts = [{"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in paths]
    shards = [entry.model_copy(update=fact) for entry, fact in zip(page.shards, facts, strict=True)]
    write_manifest(folder, page.model_copy(update={"shards": tuple(shards)}))


def change_shard(folder, name, change):
    """Let `change` have a tensor of one shard, and seal it."""
    tensors = load_file(folder / "train-2.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "train-2.safetensors")
    seal_again(folder)


def put(place, value):
    def change(values):
        values[place] = value
        return values

    return change


def other_entry(place, change):
    """Replace the number of one entry, an id above a count or a probability, by what `change` makes of it."""

    def packed(stream):
        manifest = Manifest.model_construct(kind="sampled", vocabulary_size=VOCABULARY, draws=50)
        width = entry_bits(manifest).width
        numbers = unpack_bits(stream, np.arange((len(stream) - 8) * 8 // width), width)
        numbers[place] = change(int(numbers[place]), numbers)
        return pack_bits(numbers, width)

    return packed


COUNT = 6  # bits of a count of up to 50
IMPOSSIBLE = {
    "no probability": ("confidence", put(4, 7), r"confidence is 7, but must be from 0.00099\d+ to 1$"),
    "less than even": ("confidence", put(0, 1e-4), r"confidence is 0.0001\d*, but must be from"),
    "confidence nan": ("confidence", put(4, np.nan), "confidence is nan"),
    "below zero": ("entropy", put(2, -3), r"entropy is -3, but must be from -0.000976562 to 6.92"),
    "above ln V": ("entropy", put(2, 7), r"entropy is 7, but must be from"),
    "entropy nan": ("entropy", put(2, np.nan), "entropy is nan"),
    "tempered": ("temperature_entropy", put(2, np.inf), "temperature_entropy is inf"),
    "above certainty": ("next_logprob", put(1, 0.5), r"next_logprob is 0.5, but must be from -65504 to 0"),
    "a label too few": ("next_logprob", put(1, np.nan), r"next_logprob holds \d+ numbers that are not nan, but must"),
    "past the vocabulary": ("packed", other_entry(0, lambda n, _: (VOCABULARY << COUNT) + n % 64), "id is 1009, but"),
    "twice": (
        "packed",
        other_entry(1, lambda n, entries: (entries[0] >> COUNT << COUNT) + n % 64),
        "above the one before",
    ),
    "never drawn": ("packed", other_entry(0, lambda n, _: n >> COUNT << COUNT), "count is 0, but must be from 1 to"),
    "drawn too often": ("packed", other_entry(0, lambda n, _: n | 63), "count is 63, but must be from 1 to 50"),
    "less than -log c": ("entropy", lambda entropy: entropy * 0, r"entropy is 0, but must be at least .* confidence"),
    "more than the rest": ("confidence", lambda c: c * 0 + 1, r"entropy is .* must be at most 0.01.* confidence 1$"),
    "likelier than c": ("next_logprob", lambda p: p * 0, "next_logprob is (-)?0, but must be at most -.* confidence"),
    "another sum": (
        "entropy",
        lambda entropy: entropy * 0.99,
        "entropy sums to .*, but must be .* as in the manifest",
    ),
    "too few draws": ("packed", other_entry(0, lambda n, _: n ^ 1), r"sum of a position's counts is (49|51), but"),
}


@pytest.mark.parametrize(("name", "change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_sealed_signals_that_no_teacher_can_have_given_are_refused_by_name(tmp_path, name, change, message):
    write_signals(tmp_path / "s", temperature=2.0)
    change_shard(tmp_path / "s", name, change)
    with pytest.raises(
        UserError, match=rf"^--signals: got .*train-2.safetensors; holds impossible signals: .*{message}"
    ):
        verify_signals("--signals", tmp_path / "s", dataset_stub())


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ({"ids": 3}, "ids_per_position sums to .*, but must be 3 as in the manifest$"),
        ({"confidence": -5.0}, "confidence sums to .*, but must be -5.0 as in the manifest$"),
        ({"label_logprob_nats": 5.0}, "next_logprob sums to .*, but must be 5.0 as in the manifest$"),
        ({"entropy_nats": None}, "entropy sums to .*, but must be None as in the manifest$"),
    ],
)
def test_totals_that_are_not_the_shards_are_refused(tmp_path, sums, message):
    write_signals(tmp_path)
    page = read_manifest("--signals", tmp_path)
    first, *others = page.shards
    changed = first.model_copy(update={"sums": first.sums.model_copy(update=sums)})
    write_manifest(tmp_path, page.model_copy(update={"shards": (changed, *others)}))
    with pytest.raises(UserError, match=message):
        verify_signals("--signals", tmp_path, dataset_stub())


@pytest.mark.parametrize("name", ["no probability", "below zero", "tempered", "drawn too often"])
def test_the_reader_refuses_what_it_would_hand_on(tmp_path, name):
    write_signals(tmp_path / "s", temperature=2.0)
    change_shard(tmp_path / "s", *IMPOSSIBLE[name][:2])
    store = open_signals("--signals", tmp_path / "s", dataset_stub())
    with pytest.raises(UserError, match=r"holds impossible signals|a probability is not from 0 to 1"):
        store.batch("train", np.arange(9))


def kept_signals(kind, ids, probs):
    """One held-out split of equal positions of the kinds topk and full."""
    count = 20
    return PositionSignals(
        np.tile(ids, count), np.tile(np.float32(probs), count), np.full(count, len(ids)),
        *np.ones((4, count), np.float32) * np.array([[0.9], [0.5], [-0.9], [0.5]], np.float32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "probs", "message"),
    [
        ("topk", [0.5, 0.25, 0.25], None),
        ("topk", [0.75, 0.25, 0.25], "sum of a position's probabilities is 1.25, but must be from 0 to 1.0009"),
        ("topk", [-0.5, 0.25, 0.25], "probability is -0.5, but must be from 0 to 1"),
        ("topk", [1.5, 0.25, 0.25], "probability is 1.5, but must be from 0 to 1"),
        ("topk", [np.nan, 0.25, 0.25], "probability is nan"),
        ("full", [0.2, 0.3, 0.5], None),
        ("full", [0.2, 0.3, 0.4], "sum of a position's probabilities is 0.9, but must be from 0.999"),
    ],
)
def test_probabilities_of_the_other_kinds_are_checked(tmp_path, kind, probs, message):
    fields = {f"{name}_sha256": value for name, value in SHA.items()}
    manifest = Manifest(
        **fields, kind=kind, vocabulary_size=3, temperature=1.0, top_k=3 if kind == "topk" else None, seed=0,
        rows_per_shard=3, teacher="stub", teacher_revision=None, shards=(), complete=False,
        statistics=statistics_of(()),
    )  # fmt: skip
    signals = kept_signals(kind, [0, 1, 2], probs)
    entry = write_shard(tmp_path, "validation-0.safetensors", "validation", (0, 2), signals, manifest, "float32")
    write_manifest(tmp_path, manifest.model_copy(update={"shards": (entry,), "statistics": statistics_of((entry,))}))
    data = dataset_stub()
    data.tokenizer.vocabulary_size = 3
    if message is None:
        verify_signals("--signals", tmp_path, data)
        return
    with pytest.raises(UserError, match=message):
        verify_signals("--signals", tmp_path, data)
