"""Measures a checkpoint and prints its figures: the command `indra eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from indraquantum.config import EvalSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.packing import packed_split
from indraquantum.data.padded import open_pickle
from indraquantum.data.prepared import PreparedDataset
from indraquantum.data.same_tokenizer import require_same_control_tokens, require_same_tokenizer
from indraquantum.data.sources import read_wikitext
from indraquantum.data.split import Split
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.evaluation.figures import Alignment, Band, Evaluation, evaluate
from indraquantum.evaluation.halves import bytes_by_source
from indraquantum.evaluation.test_split import read_test_split
from indraquantum.files import check_new_file, without_nan, write_json
from indraquantum.inference.load import Loaded, load
from indraquantum.kernels.measured import way_for
from indraquantum.kernels.ways import put_in_force
from indraquantum.progress import tell, warn
from indraquantum.tables import text_table
from indraquantum.teacher.manifest import MANIFEST_NAME, read_manifest, signals_beside
from indraquantum.teacher.signals import SignalStore, verify_signals


def evaluate_checkpoint(path: Path, settings: EvalSettings) -> Evaluation:
    """Measure the checkpoint at `path`, print the table, and write the JSON file if `settings` name one.

    Raises:
        UserError: `path` is not a checkpoint, its tokenizer is not the dataset's, or there is nothing to predict.
    """
    device = choose_device(settings)
    put_in_force(way_for(device))
    if settings.json_file is not None:
        check_new_file("--json-file", settings.json_file)
    found = measure(load(path, device, settings.weights), settings, f"indra eval {path}")
    print(evaluation_table(found))
    if settings.json_file is not None:
        write_json(settings.json_file, without_nan(asdict(found)))
    return found


def measure(loaded: Loaded, settings: EvalSettings, command: str) -> Evaluation:
    """The figures of a model that is loaded, on what `settings` name.

    Args:
        loaded: model and tokenizer.
        settings: data or text to predict; where to compute, and which weights, is settled already.
        command: what to note down where the test split is read.

    Raises:
        UserError: another tokenizer than the dataset's, or nothing to predict.
    """
    model, tokenizer, device = loaded.inference_model, loaded.tokenizer, loaded.inference_model.device
    if settings.text is not None:
        if settings.split != "validation":
            raise UserError("--split", settings.split, "must be left out with --text, which has no splits")
        if settings.signals is not None:
            raise UserError("--signals", settings.signals, "must be left out with --text, which has no signals")
        if "data" in settings.model_fields_set:
            raise UserError("--data", settings.data, "must be left out with --text: one of the two is measured")
        if settings.row_length > (limit := model.config.max_position_embeddings):
            raise UserError("--row-length", settings.row_length, f"must be at most {limit} for this model")
        split, source_bytes = text_split(settings.text, tokenizer, settings.row_length)
        return evaluate(model, split, source_bytes, device)
    if "row_length" in settings.model_fields_set:
        raise UserError("--row-length", settings.row_length, "must be left out without --text: a dataset has its rows")
    if settings.data.is_file():
        dataset = open_pickle("--data", settings.data, tokenizer)
    else:
        dataset = open_dataset("--data", settings.data, verify=True)
    theirs = dataset.tokenizer
    require_same_tokenizer("--data", settings.data, "must have the checkpoint's tokenizer", tokenizer, theirs)
    require_same_control_tokens("--data", settings.data, "those that the checkpoint learned", tokenizer, theirs)
    if loaded.trained_on and dataset.content_sha256 not in loaded.trained_on:
        warn(
            f"note: {settings.data} is not a dataset of the run that trained this model; if they share texts, it may "
            "know the ones that are held out here"
        )
    measured = dataset.test if settings.split == "test" else dataset.validation
    longest = 0 if measured is None else int(measured.pieces[:, 1].max())
    if longest > (limit := model.config.max_position_embeddings):
        allowed = f"has {longest} tokens of a document in a row; must be at most {limit} for this model"
        raise UserError("--data", settings.data, allowed)
    if settings.split == "test":
        return _evaluate_on_test(loaded, settings, dataset, command)
    source_bytes, signals = bytes_by_source(dataset, dataset.validation), _find_signals(settings, dataset)
    return evaluate(model, dataset.validation, source_bytes, device, signals, _training_counts(dataset))


def text_split(name: str, tokenizer: TextTokenizer, row_length: int) -> tuple[Split, dict[str, int]]:
    """Return the documents of a text file in packed rows, and their bytes.

    Raises:
        UserError: the file can't be read or has no document.
    """
    texts = read_wikitext("--text", name)
    documents = tokenizer.encode_documents(texts)
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    split = packed_split(np.concatenate(documents), offsets, row_length, tokenizer.eos_id)
    unpredicted = sum(map(tokenizer.unpredicted_bytes, documents))
    return split, {"text": sum(len(text.encode()) for text in texts) - unpredicted}


def _evaluate_on_test(loaded: Loaded, settings: EvalSettings, dataset: PreparedDataset, command: str) -> Evaluation:
    """Return the figures on the test split and record the reading. There are no signals for this split."""
    if settings.signals is not None:
        raise UserError("--signals", settings.signals, "must be left out with --split test, which has no signals")
    reading = read_test_split("--split", settings.data, dataset, command)
    tell(str(reading))
    model = loaded.inference_model
    source_bytes = bytes_by_source(dataset, reading.split)
    return evaluate(model, reading.split, source_bytes, model.device, counts_V=_training_counts(dataset))


def _training_counts(dataset: PreparedDataset) -> np.ndarray:
    """Return how often the training text has each token, (V,)."""
    return dataset.train.label_counts(dataset.tokenizer.vocabulary_size)


def evaluation_table(found: Evaluation) -> str:
    """Return the figures as a few plain lines."""
    rows = [
        [
            name, f"{of.tokens:,}", f"{of.cross_entropy:.3f}", f"{of.perplexity:.2f}", f"{of.bits_per_byte:.3f}",
            f"{of.accuracy:.3f}", f"{of.calibration_error:.3f}",
        ]
        for name, of in found.sources.items()
    ]  # fmt: skip
    lines = [text_table(["source", "tokens", "nats/token", "perplexity", "bits/byte", "accuracy", "ECE"], rows)]
    if found.bands is not None:
        lines.append(_bands_table(found.bands))
    if found.alignment is not None:
        lines.append(_alignment_lines(found.alignment))
    lines.append(f"{found.parameters:,} parameters, {found.tokens_per_second:,.0f} tokens/s")
    return "\n".join(lines)


def _bands_table(bands: dict[str, Band]) -> str:
    """Return the loss by how often the predicted token occurs in the training text."""
    rows = [[name, f"{band.tokens:,}", f"{band.cross_entropy:.3f}"] for name, band in bands.items()]
    return text_table(["times in the training text", "tokens", "nats/token"], rows)


def _alignment_lines(alignment: Alignment) -> str:
    """Return the readouts' correlations beside those of the control."""
    return (
        f"Pearson correlation with the teacher at {alignment.positions:,} positions:\n"
        f"  confidence: magnitude {alignment.magnitude_confidence:.3f}, "
        f"the student's own max p {alignment.softmax_confidence:.3f}\n"
        f"  entropy: phase {alignment.phase_entropy:.3f}, the student's own entropy {alignment.softmax_entropy:.3f}"
    )


def _find_signals(settings: EvalSettings, dataset: PreparedDataset) -> SignalStore | None:
    """Return the given signals, or those beside the dataset if they belong to it and cover any held-out row.

    Raises:
        UserError: the given signals belong to another dataset or come from a served teacher, or signals are damaged.
    """
    if settings.signals is not None:
        if read_manifest("--signals", settings.signals).served:
            raise UserError(
                "--signals", settings.signals, "must not come from a served teacher, whose entropy is not exact"
            )
        return verify_signals("--signals", settings.signals, dataset)
    beside = signals_beside(settings.data)
    if not (beside / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest("--signals", beside)
    if manifest.served or manifest.dataset_sha256 != dataset.content_sha256:
        what = "a served teacher" if manifest.served else "another dataset"
        tell(f"No teacher signals are used: those in {beside} come from {what}.")
        return None
    store = verify_signals("--signals", beside, dataset)
    return store if store.coverage_by_split["validation"] > 0 else None
