"""`indra eval`: each piece alone under plain torch as reference, bytes and bins counted by hand."""

from __future__ import annotations

import collections
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch

from indraquantum import cli
from indraquantum.config import EvalSettings, PrepareSettings, TrainSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.prepare import prepare
from indraquantum.errors import UserError
from indraquantum.evaluation.figures import (
    Band,
    Predictions,
    _readings_of_logits,
    evaluate,
    expected_calibration_error,
    frequency_bands,
    pearson,
)
from indraquantum.evaluation.test_split import readings_path
from indraquantum.files import SEAL, write_manifest_json
from indraquantum.inference.load import load_model
from indraquantum.inference.report import evaluate_checkpoint, evaluation_table
from indraquantum.metrics import read_metrics
from indraquantum.teacher.signals import open_signals
from indraquantum.training.loop import train


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    report = train(
        TrainSettings(data=world.data, output=folder / "run", logs=folder / "logs", threads=1, d_model=14, layers=1,
                      heads=2, mlp_width=22, batch_tokens=480, learning_rate=5e-3, max_steps=12)
    )  # fmt: skip
    return report.checkpoint


@pytest.fixture(scope="module")
def found(world, checkpoint, tmp_path_factory):
    file = tmp_path_factory.mktemp("figures") / "figures.json"
    evaluation = evaluate_checkpoint(checkpoint, EvalSettings(data=world.data, signals=world.signals, json_file=file))
    return evaluation, json.loads(file.read_text())


@pytest.fixture(scope="module")
def reference(world, checkpoint):
    """Each labelled position: source, loss, max p, entropy, hit, |c|, arg c, the teacher's two figures, next token."""
    dataset = open_dataset("--data", world.data)
    signals = open_signals("--signals", world.signals, dataset)
    model, _ = load_model(checkpoint, torch.device("cpu"))
    split, rows = dataset.validation, []
    place = 0
    for (start, length), document in zip(split.pieces.tolist(), split.piece_documents.tolist(), strict=True):
        ids = torch.tensor(split.tokens[start : start + length].astype(np.int64))
        stop = min(start + length + 1, split.document_offsets[document + 1])
        labels = split.tokens[start + 1 : stop].tolist()
        with torch.no_grad():
            output = model(ids[None])
        teacher = signals.batch("validation", np.arange(place, place + length))
        for i, label in enumerate(labels):
            log_p = output.logits[0, i].double().log_softmax(-1)
            rows.append((
                int(split.document_sources[document]), -log_p[label].item(), log_p.max().exp().item(),
                -(log_p.exp() * log_p).sum().item(), log_p.argmax().item() == label, output.magnitude[0, i].item(),
                output.phase[0, i].item(), teacher.confidence_N[i].item(), teacher.entropy_N[i].item(), label,
            ))  # fmt: skip
        place += length
    return [np.array(column) for column in zip(*rows, strict=True)]


def test_loss_accuracy_and_bits_of_each_source(world, found, reference):
    dataset, (evaluation, written) = open_dataset("--data", world.data), found
    (
        source_N,
        loss_N,
        *_,
    ) = reference
    correct_N = reference[4]
    for number, name in enumerate([*dataset.source_names, "all"]):
        here_N = np.full(len(source_N), True) if name == "all" else source_N == number
        figures = evaluation.sources[name]
        assert figures.tokens == here_N.sum()
        assert figures.cross_entropy == pytest.approx(loss_N[here_N].mean(), rel=1e-4)
        assert figures.perplexity == pytest.approx(math.exp(loss_N[here_N].mean()), rel=1e-3)
        assert figures.accuracy == pytest.approx(correct_N[here_N].mean())
        assert written["sources"][name]["cross_entropy"] == figures.cross_entropy
    size = 0
    for document in range(dataset.validation.num_documents):
        start, stop = dataset.validation.document_offsets[document : document + 2]
        size += len(dataset.tokenizer.decode(dataset.validation.tokens[start:stop].tolist()).encode())
    assert evaluation.sources["all"].bits_per_byte == pytest.approx(loss_N.sum() / math.log(2) / size, rel=1e-4)


def test_loss_by_the_frequency_of_the_token(world, found, reference):
    train = open_dataset("--data", world.data).train
    counts = collections.Counter()
    for document in range(train.num_documents):
        start, stop = train.document_offsets[document : document + 2]
        counts.update(train.tokens[start + 1 : stop].tolist())
    losses = collections.defaultdict(list)
    for label, loss in zip(reference[-1].tolist(), reference[1].tolist(), strict=True):
        losses[len(str(counts[label])) if counts[label] else 0].append(loss)  # the number of digits
    names = ["0", "1 to 9", "10 to 99", "100 to 999", "1,000 to 9,999"]
    expected = {names[digits]: (len(found), np.mean(found)) for digits, found in sorted(losses.items())}
    bands = found[0].bands
    assert list(bands) == list(expected)
    assert len(bands) >= 2
    for name, (tokens, loss) in expected.items():
        assert bands[name].tokens == tokens
        assert bands[name].cross_entropy == pytest.approx(loss, rel=1e-4)
    assert found[1]["bands"]["10 to 99"]["tokens"] == bands["10 to 99"].tokens
    table = evaluation_table(found[0])
    assert re.search(rf"^10 to 99 +{bands['10 to 99'].tokens:,} +{bands['10 to 99'].cross_entropy:.3f}$", table, re.M)


def test_bands_of_frequency_by_hand():
    others = dict.fromkeys(Predictions._fields, np.zeros(7))
    known = Predictions(**others | {"labels_N": np.arange(7), "loss_N": np.arange(1.0, 8.0)})
    assert frequency_bands(known, np.array([0, 1, 9, 10, 9_999, 10_000, 123_456])) == {
        "0": Band(1, 1.0),
        "1 to 9": Band(2, 2.5),
        "10 to 99": Band(1, 4.0),
        "1,000 to 9,999": Band(1, 5.0),
        "10,000 or more": Band(2, 6.5),
    }


def test_calibration_error_counted_bin_by_bin(found, reference):
    confidence_N, correct_N = reference[2], reference[4]
    expected = 0.0
    for number in range(15):
        here_N = (confidence_N > number / 15) & (confidence_N <= (number + 1) / 15)
        if here_N.any():
            expected += here_N.mean() * abs(confidence_N[here_N].mean() - correct_N[here_N].mean())
    assert found[0].sources["all"].calibration_error == pytest.approx(expected, abs=1e-4)


def test_readouts_against_the_teacher_and_the_softmax_control(found, reference):
    alignment = found[0].alignment
    *_, max_p_N, entropy_N, _, magnitude_N, phase_N, confidence_N, teacher_entropy_N, _ = reference
    phase_N = np.where(phase_N <= -math.pi / 2, phase_N + 2 * math.pi, phase_N)
    assert alignment.positions == len(max_p_N)
    for measured, left_N, right_N in (
        (alignment.magnitude_confidence, magnitude_N, confidence_N),
        (alignment.phase_entropy, phase_N, teacher_entropy_N),
        (alignment.softmax_confidence, max_p_N, confidence_N),
        (alignment.softmax_entropy, entropy_N, teacher_entropy_N),
    ):
        assert measured == pytest.approx(np.corrcoef(left_N, right_N)[0, 1], abs=1e-4)


def test_calibration_error_by_hand():
    sure = np.array([0.95, 0.95, 0.95, 0.95])
    assert expected_calibration_error(sure, np.array([1, 1, 1, 0]), 10) == pytest.approx(0.2)
    mixed = np.array([0.25, 0.25, 1.0, 0.2])  # 0.2 closes the second of ten bins
    assert expected_calibration_error(mixed, np.array([1, 0, 1, 0]), 10) == pytest.approx((0.5 + 0.2) / 4)


def test_pearson_of_a_constant_is_unknown():
    for count in (3, 7, 10, 1000):  # the mean of so many 0.1 is not always 0.1
        constant, other = np.full(count, 0.1), np.arange(float(count))
        for sides in ((constant, other), (other, constant), (constant, np.full(count, 0.7))):
            assert math.isnan(pearson(*sides))
    assert math.isnan(pearson(np.zeros(0), np.zeros(0)))
    assert pearson(np.arange(4.0), -2 * np.arange(4.0)) == pytest.approx(-1)


def test_a_text_file_has_its_own_documents_and_bytes(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" = Title = \n\nthe cat sees a dog at night .\nmy bird hears the fish — by the river .\n", "utf-8")
    evaluation = evaluate_checkpoint(checkpoint, EvalSettings(text=str(text)))
    model, tokenizer = load_model(checkpoint, torch.device("cpu"))
    total, tokens, size = 0.0, 0, 0
    for line in text.read_text("utf-8").splitlines()[2:]:
        ids = tokenizer.encode_documents([line])[0].astype(np.int64)
        with torch.no_grad():
            log_p = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        total -= sum(log_p[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        tokens, size = tokens + len(ids) - 1, size + len(line.strip().encode())
    figures = evaluation.sources["text"]
    assert figures.tokens == tokens
    assert figures.cross_entropy == pytest.approx(total / tokens, rel=1e-4)
    assert figures.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert evaluation.alignment is None
    assert "bits/byte" in capsys.readouterr().out


def test_a_run_on_a_pickle_is_measured_with_the_tokenizer_that_it_carries(world, tmp_path, capsys):
    report = train(
        TrainSettings(data=world.pickle, tokenizer=str(world.tokenizer), output=tmp_path / "run", no_teacher=True,
                      logs=tmp_path / "logs", d_model=6, layers=1, heads=2, mlp_width=22, max_steps=3)
    )  # fmt: skip
    capsys.readouterr()
    found = evaluate_checkpoint(report.checkpoint, EvalSettings(data=world.pickle))
    assert "not a dataset" not in capsys.readouterr().err
    evaluate_checkpoint(report.checkpoint, EvalSettings(data=world.data))
    said = f"note: {world.data} is not a dataset of the run that trained this model; if they share texts"
    assert said in capsys.readouterr().err
    dataset = open_dataset("--data", world.pickle, str(world.tokenizer))
    tokens = dataset.validation.num_tokens - dataset.validation.num_documents
    assert sum(figures.tokens for name, figures in found.sources.items() if name != "all") == tokens
    assert found.sources["all"].cross_entropy == pytest.approx(read_metrics(report.metrics)[-1]["held_out"]["all"])


def test_rows_of_a_text_are_as_long_as_asked(checkpoint, tmp_path):
    """A long document, a row at a time: nothing before a row is seen from within it."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sees a dog at night . " * 20 + "\n")
    model, tokenizer = load_model(checkpoint, torch.device("cpu"))
    ids = torch.from_numpy(tokenizer.encode_documents([text.read_text().strip()])[0].astype(np.int64))
    assert len(ids) > 100
    for length in (48, 128):
        total = 0.0
        for start in range(0, len(ids) - 1, length):
            with torch.no_grad():
                log_p = model(ids[None, start : start + length]).logits[0].log_softmax(-1)
            labels = ids[start + 1 : start + length + 1]
            total -= log_p[torch.arange(len(labels)), labels].sum().item()
        figures = evaluate_checkpoint(checkpoint, EvalSettings(text=str(text), row_length=length)).sources["text"]
        assert (figures.tokens, figures.cross_entropy) == (
            len(ids) - 1,
            pytest.approx(total / (len(ids) - 1), rel=1e-4),
        )


def signals_beside(world, folder, **changes):
    """The world's data with its signals beside them, whose manifest is changed."""
    shutil.copytree(world.data, folder / "mixed")
    shutil.copytree(world.signals, folder / "teacher_signals")
    path = folder / "teacher_signals" / "manifest.json"
    content = json.loads(path.read_text())
    del content[SEAL]
    write_manifest_json(path, content | changes)
    return folder / "mixed", folder / "teacher_signals"


@pytest.mark.parametrize(
    ("changes", "beside", "asked"),
    [
        ({"dataset_sha256": "0" * 64}, "another dataset", "must belong to the dataset"),
        ({"served": True}, "a served teacher", "must not come from a served teacher"),
    ],
)
def test_signals_beside_that_tell_nothing_are_left_and_asked_for_refused(
    world, checkpoint, found, tmp_path, capsys, changes, beside, asked
):
    data, signals = signals_beside(world, tmp_path, **changes)
    evaluation = evaluate_checkpoint(checkpoint, EvalSettings(data=data))
    assert evaluation.alignment is None
    assert evaluation.sources == found[0].sources
    assert f"No teacher signals are used: those in {signals} come from {beside}." in capsys.readouterr().out
    with pytest.raises(UserError, match=asked):
        evaluate_checkpoint(checkpoint, EvalSettings(data=data, signals=signals))


@pytest.mark.parametrize("damaged", ["mixed/validation/tokens.npy", "teacher_signals/validation-000000.safetensors"])
def test_damaged_data_and_signals_are_refused(world, checkpoint, tmp_path, damaged):
    data, _ = signals_beside(world, tmp_path)
    content = bytearray((tmp_path / damaged).read_bytes())
    content[-1] ^= 1
    (tmp_path / damaged).write_bytes(content)
    with pytest.raises(UserError, match=r"sha256|SHA-256"):
        evaluate_checkpoint(checkpoint, EvalSettings(data=data))


def test_a_learner_without_readouts_has_no_correlation(world):
    from transformers import AutoModelForCausalLM

    from indraquantum.training.pretrain_teacher import LlamaLearner

    dataset = open_dataset("--data", world.data)
    learner = LlamaLearner(AutoModelForCausalLM.from_pretrained(world.teacher).eval())
    signals = open_signals("--signals", world.signals, dataset)
    sizes = {"wikitext": 1000, "alpaca": 1000}
    alignment = evaluate(learner, dataset.validation, sizes, torch.device("cpu"), signals).alignment
    assert math.isnan(alignment.magnitude_confidence)
    assert alignment.softmax_confidence > 0.99  # it is the teacher itself
    assert alignment.softmax_entropy > 0.99


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--data", "nowhere"), "--data: got nowhere; does not exist"),
        (("--text", "a.txt", "--signals", "here"), "--signals: got here; must be left out with --text"),
        (("--text", "a.txt", "--row-length", "4096"), "--row-length: got 4096; must be at most 2048 for this model"),
        (("--json-file", "."), "--json-file: got .; must be a file, not a folder"),
        (("--json-file", "/dev/null/figures.json"), "--json-file: got /dev/null; must be a folder that can be written"),
    ],
)
def test_bad_input_is_one_line(checkpoint, capsys, arguments, said):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["eval", str(checkpoint), *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert said in error
    assert error.count("\n") == 1


def test_the_readings_of_logits_are_those_of_their_softmax():
    logits_nV = 4 * torch.randn(5, 37, generator=torch.Generator().manual_seed(0))
    labels_n, before_nV = torch.tensor([3, 0, 36, 7, 7]), logits_nV.clone()
    loss_n, confidence_n, entropy_n, correct_n = _readings_of_logits(logits_nV, labels_n)
    assert torch.equal(logits_nV, before_nV)
    for place, label in enumerate(labels_n.tolist()):
        odds = [math.exp(value) for value in logits_nV[place].tolist()]
        p = [value / math.fsum(odds) for value in odds]
        assert loss_n[place].item() == pytest.approx(-math.log(p[label]), rel=1e-12)
        assert confidence_n[place].item() == pytest.approx(max(p), rel=1e-12)
        assert entropy_n[place].item() == pytest.approx(-math.fsum(x * math.log(x) for x in p), rel=1e-12)
        assert correct_n[place].item() == (p.index(max(p)) == label)


def test_rows_beyond_the_context_are_refused(world, checkpoint, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("\n".join(f"the cat {n} sees a dog at night . " * 300 for n in range(400)))
    prepare(
        PrepareSettings(text=(str(text),), wikitext_samples=0, alpaca_samples=0, tokenizer=str(world.tokenizer),
                        max_length=4096, output=tmp_path / "long.pkl")
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"--data: got \S+; has \d+ tokens of a document in a row; must be at most 2048"
    ):
        evaluate_checkpoint(checkpoint, EvalSettings(data=tmp_path / "long"))
    with pytest.raises(UserError, match=r"tokens of a document in a row; must be at most 2048"):
        evaluate_checkpoint(checkpoint, EvalSettings(data=tmp_path / "long", split="test"))
    assert not readings_path(tmp_path / "long").exists()
