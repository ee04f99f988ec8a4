"""The tokens that begin and end documents, for all kinds of tokenizers on the hub. One without BOS trains a model."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from indraquantum.config import (
    EvalSettings,
    PrepareSettings,
    ShowSettings,
    TeacherSettings,
    TestSettings,
    TrainSettings,
)
from indraquantum.data.dataset import open_dataset
from indraquantum.data.inspect import describe, show_rows
from indraquantum.data.prepare import prepare
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError
from indraquantum.inference.export import export_checkpoint
from indraquantum.inference.generate import generate_text
from indraquantum.inference.load import load_model
from indraquantum.inference.report import evaluate_checkpoint
from indraquantum.teacher.teacher_files import check_tokenizer, find_teacher
from indraquantum.training.loop import train
from indraquantum.training.pretrain_teacher import pretrain_teacher

ENDOFTEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
LLAMA = ("<s>", "</s>")
QWEN = (ENDOFTEXT, START, END)


def save(folder, special, config=None, special_map=None, leading=None, trailing=None):
    """A byte-level BPE whose first ids are `special`, with the files of its kind beside it."""
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    if leading or trailing:
        around = [token for token in (leading, trailing) if token]
        backend.post_processor = processors.TemplateProcessing(
            single=[*([leading] if leading else []), "$A", *([trailing] if trailing else [])],
            special_tokens=[(token, special.index(token)) for token in dict.fromkeys(around)],
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, page in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        if page is not None:
            (folder / name).write_text(json.dumps(page))
    return folder


NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT_START = "<|begin_of_text|>"
KINDS = {
    # name: special tokens, what lies beside them, BOS and EOS
    "llama": (LLAMA, {"config": NAMED | {"add_bos_token": True}}, "<s>", "</s>"),
    "no config": (LLAMA, {}, "<s>", "</s>"),
    "gpt2 on the hub": ([ENDOFTEXT], {"config": {"model_max_length": 1024}}, ENDOFTEXT, ENDOFTEXT),
    "gpt2 saved": (
        [ENDOFTEXT], {"config": {"bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "add_bos_token": False}},
        ENDOFTEXT, ENDOFTEXT,
    ),
    "special map": (
        [ENDOFTEXT, END], {"config": {}, "special_map": {"bos_token": {"content": END}, "eos_token": ENDOFTEXT}},
        END, ENDOFTEXT,
    ),
    "config before map": (LLAMA, {"config": NAMED, "special_map": {"bos_token": "</s>", "eos_token": "<s>"}}, *LLAMA),
    "map where the config has null": (LLAMA, {"config": NAMED | {"bos_token": None}, "special_map": NAMED}, *LLAMA),
    "qwen": (QWEN, {"config": {"bos_token": None, "eos_token": END, "add_bos_token": False}}, None, END),
    "null alone": (LLAMA, {"config": NAMED | {"bos_token": None}}, None, "</s>"),
    "add_bos_token false alone": (QWEN, {"config": {"eos_token": END, "add_bos_token": False}}, None, END),
    "named, but not set before texts": (LLAMA, {"config": NAMED | {"add_bos_token": False}}, None, "</s>"),
    "llama 3": (
        [TEXT_START, END], {"config": {"bos_token": TEXT_START, "eos_token": END}, "leading": TEXT_START},
        TEXT_START, END,
    ),
    "post-processor alone": (["[CLS]", "[SEP]"], {"leading": "[CLS]", "trailing": "[SEP]"}, "[CLS]", "[SEP]"),
    "add_eos_token": (
        LLAMA, {"config": NAMED | {"add_eos_token": True}, "leading": "<s>", "trailing": "</s>"}, "<s>", "</s>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_documents_begin_as_each_kinds_models_expect(tmp_path, kind):
    special, files, bos, eos = KINDS[kind]
    tokenizer = load_tokenizer("--tokenizer", str(save(tmp_path, special, **files)))
    ids = {token: number for number, token in enumerate(special)}
    text = tokenizer.backend.encode("The cat", add_special_tokens=False).ids
    before = [] if bos is None else [ids[bos]]
    assert [document.tolist() for document in tokenizer.encode_documents(["The cat"])] == [[*before, *text, ids[eos]]]
    assert tokenizer.encode_prompt("The cat") == [*before, *text]
    for spelled in special:  # text never becomes a control token
        (document,) = tokenizer.encode_documents([f"{spelled} a {spelled}"])
        assert not set(document[len(before) : -1].tolist()) & set(ids.values())
        assert tokenizer.decode(document) == f"{spelled} a {spelled}"


@pytest.mark.parametrize(("start", "before"), [("bos", [1]), ("eos", [2]), ("none", [])])
def test_an_option_says_how_documents_begin(tmp_path, start, before):
    folder = save(tmp_path, (ENDOFTEXT, "<s>", "</s>"), config=NAMED | {"add_bos_token": False})
    tokenizer = load_tokenizer("--tokenizer", str(folder), start)
    assert tokenizer.encode_documents(["a"])[0].tolist()[:-2] == before


def test_a_bos_that_is_not_there_is_not_invented(tmp_path):
    folder = save(tmp_path, QWEN, config={"bos_token": None, "eos_token": END})
    with pytest.raises(UserError, match=r"--document-start: got bos; must be auto, eos or none: .* names no BOS"):
        load_tokenizer("--tokenizer", str(folder), "bos")


@pytest.mark.parametrize(
    ("file", "page", "words"),
    [
        ("tokenizer_config.json", [], "must be a JSON object"),
        ("special_tokens_map.json", "<s>", "must be a JSON object"),
        ("tokenizer_config.json", {"bos_token": 7}, "text of a token, or null, as its bos_token"),
        ("tokenizer_config.json", {"eos_token": {"content": None}}, "text of a token, or null, as its eos_token"),
        ("special_tokens_map.json", {"bos_token": ["<s>"]}, "text of a token, or null, as its bos_token"),
        ("tokenizer_config.json", {"add_bos_token": "no"}, "true or false as its add_bos_token"),
        ("tokenizer_config.json", {"eos_token": "<|nowhere|>"}, "eos_token in tokenizer_config.json that is in"),
    ],
)
def test_entries_of_another_type_are_refused_in_one_line(tmp_path, file, page, words):
    save(tmp_path, LLAMA)
    (tmp_path / file).write_text(json.dumps(page))
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer("--tokenizer", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_control_token_that_is_not_marked_as_special_stays_out_of_text(tmp_path):
    save(tmp_path, LLAMA, config=NAMED)
    page = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in page["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(page))
    (document,) = load_tokenizer("--tokenizer", str(tmp_path)).encode_documents(["a</s>b"])
    assert (document[0], document[-1]) == (0, 1)
    assert not set(document[1:-1].tolist()) & {0, 1}


def test_a_unigram_tokenizer_whose_vocabulary_holds_its_control_tokens(tmp_path):
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], *([letter, -3.0] for letter in "</s>ab"), ["ab", -4.0]]
    backend = Tokenizer(models.Unigram([tuple(piece) for piece in pieces], unk_id=0, byte_fallback=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    (document,) = load_tokenizer("--tokenizer", str(tmp_path)).encode_documents(["a</s>ab<s>"])
    assert document.tolist() == [1, 7, 3, 4, 5, 6, 9, 3, 5, 6, 2]


def test_a_unigram_tokenizer_that_lacks_a_character_of_its_control_tokens(tmp_path):
    """SentencePiece trains such models by default: no `<` was frequent enough. The characters are unknown then."""
    pieces = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], *([letter, -3.0] for letter in "sab"), ["ab", -4.0]]
    backend = Tokenizer(models.Unigram([tuple(piece) for piece in pieces], unk_id=0, byte_fallback=False))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer("--tokenizer", str(tmp_path))
    documents = tokenizer.encode_documents(["a</s>ab<s>", "ab<s", "sab"])
    assert [document.tolist() for document in documents] == [
        [1, 4, 0, 0, 3, 0, 6, 0, 3, 0, 2],
        [1, 6, 0, 3, 2],
        [1, 3, 6, 2],
    ]


# The whole way without BOS.


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "lines.txt"
    words = ("cat", "dog", "tree", "river", "hill")
    path.write_text("\n".join(f"Über {a} {b} and {a} again {n}." for n in range(2) for a in words for b in words))
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, lines):
    """A dataset whose documents begin with their text."""
    folder = tmp_path_factory.mktemp("qwen")
    save(folder / "tokenizer", QWEN, config={"bos_token": None, "eos_token": END})
    prepare(
        PrepareSettings(text=(str(lines),), wikitext_samples=0, alpaca_samples=0, tokenizer=str(folder / "tokenizer"),
                        max_length=40, output=folder / "d.pkl")
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def checkpoint(qwen):
    return train(
        TrainSettings(data=qwen / "d", output=qwen / "run", logs=qwen / "logs", threads=1, d_model=8, layers=1,
                      heads=2, mlp_width=14, batch_tokens=400, max_steps=2, no_teacher=True)
    ).checkpoint  # fmt: skip


def test_the_manifest_says_that_documents_begin_with_their_text(qwen):
    dataset = open_dataset("--data", qwen / "d", verify=True)
    assert dataset.manifest["bos_id"] is None
    assert dataset.manifest["options"]["document_start"] == "auto"
    assert dataset.tokenizer.bos_id is None
    split = dataset.train
    documents = [split.tokens[start:stop].tolist() for start, stop in pairwise(split.document_offsets)]
    texts = [dataset.tokenizer.decode(document) for document in documents]
    assert documents == [[*dataset.tokenizer.encode_text(text), 2] for text in texts]
    assert all(text.startswith("Über ") for text in texts)
    assert "documents begin with their text" in describe(qwen / "d")
    assert "Über" in show_rows(qwen / "d", ShowSettings(rows=1)).split("\n")[2]


def test_the_folder_of_a_dataset_is_its_tokenizer(qwen, lines, tmp_path):
    """Its tokenizer.json names no BOS and no EOS; the manifest does."""
    tokenizer = load_tokenizer("--tokenizer", str(qwen / "d"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    assert load_tokenizer("--tokenizer", str(qwen / "d"), "eos").control_ids == (2, 2)
    save(tmp_path / "llama", LLAMA, config=NAMED)
    options = {"tokenizer": str(tmp_path / "llama"), "document_start": "eos", "output": tmp_path / "eos.pkl"}
    prepare(PrepareSettings(text=(str(lines),), wikitext_samples=0, alpaca_samples=0, max_length=40, **options))
    begins = [load_tokenizer("--tokenizer", str(tmp_path / "eos"), start).bos_id for start in ("auto", "bos", "none")]
    assert begins == [1, 0, None]
    assert open_dataset("--data", qwen / "d.pkl", str(qwen / "d")).tokenizer.eos_id == 2
    prepare(
        PrepareSettings(text=(str(lines),), wikitext_samples=0, alpaca_samples=0, tokenizer=str(qwen / "d"),
                        max_length=40, output=tmp_path / "again.pkl")
    )  # fmt: skip
    first, again = (open_dataset("--data", path) for path in (qwen / "d", tmp_path / "again"))
    assert first.content_sha256 == again.content_sha256


def test_the_first_token_is_no_label_and_its_bytes_are_not_counted(qwen, checkpoint, lines):
    dataset = open_dataset("--data", qwen / "d")
    batch = dataset.validation.batch(np.arange(dataset.validation.num_rows))
    documents = dataset.validation.num_documents
    assert (batch.labels >= 0).sum() == dataset.validation.num_tokens - documents
    found = evaluate_checkpoint(checkpoint, EvalSettings(text=str(lines), row_length=40))
    texts = lines.read_text().split("\n")
    # Byte-level: a text of n bytes is n tokens; all but the first are predicted, and EOS.
    assert found.sources["text"].tokens == sum(len(text.encode()) for text in texts)
    nats = found.sources["text"].cross_entropy * found.sources["text"].tokens
    predicted = sum(len(text.encode()) - 1 for text in texts)
    assert found.sources["text"].bits_per_byte == pytest.approx(nats / np.log(2) / predicted)


def test_documents_of_one_token_have_no_figure_per_byte(checkpoint, tmp_path):
    (tmp_path / "letters.txt").write_text("a\nb\n")
    found = evaluate_checkpoint(checkpoint, EvalSettings(text=str(tmp_path / "letters.txt"), row_length=40))
    assert found.sources["text"].tokens == 2  # EOS of each
    assert np.isnan(found.sources["text"].bits_per_byte)


def test_a_prompt_begins_with_its_text_and_must_have_one(checkpoint):
    model, tokenizer = load_model(checkpoint, torch.device("cpu"))
    assert model.config.bos_token_id is None
    assert generate_text(model, tokenizer, TestSettings(max_new_tokens=2, show_state=True), "Ü").tokens
    with pytest.raises(UserError, match="--prompt: got ''; must not be empty"):
        generate_text(model, tokenizer, TestSettings(max_new_tokens=2), "")


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_checkpoint(checkpoint, folder)
    return folder


@pytest.mark.parametrize("text", ["Über cat", " two  spaces", f"{END}a{ENDOFTEXT}"])
def test_its_export_begins_with_the_text_and_has_the_same_hash(qwen, exported, text):
    from transformers import AutoTokenizer

    tokenizer = open_dataset("--data", qwen / "d").tokenizer
    again = AutoTokenizer.from_pretrained(exported)
    assert again(text, split_special_tokens=True)["input_ids"] == tokenizer.encode_prompt(text)
    assert again.bos_token_id is None
    loaded = load_tokenizer("--tokenizer", str(exported))
    assert (loaded.sha256, loaded.bos_id, loaded.eos_id) == (tokenizer.sha256, None, 2)


def test_data_prepared_with_the_export_are_the_same_everywhere(qwen, checkpoint, exported, lines, tmp_path):
    prepare(
        PrepareSettings(text=(str(lines),), wikitext_samples=0, alpaca_samples=0, tokenizer=str(exported),
                        max_length=40, output=tmp_path / "again.pkl")
    )  # fmt: skip
    first, again = (open_dataset("--data", folder, verify=True) for folder in (qwen / "d", tmp_path / "again"))
    assert first.tokenizer.to_json() != again.tokenizer.to_json()  # transformers' post-processor
    assert first.content_sha256 == again.content_sha256  # so signals and runs are the same too
    evaluate_checkpoint(checkpoint, EvalSettings(data=tmp_path / "again"))
    settings = TrainSettings(data=tmp_path / "again", output=tmp_path / "run", logs=tmp_path / "logs", threads=1,
                             d_model=8, layers=1, heads=2, mlp_width=14, batch_tokens=400, max_steps=1,
                             no_teacher=True, start_from=checkpoint)  # fmt: skip
    assert train(settings).checkpoint.is_file()


def test_its_teacher_has_the_same_tokenizer(qwen, tmp_path):
    pretrain_teacher(
        TeacherSettings(
            data=qwen / "d", output=tmp_path / "teacher", logs=tmp_path / "logs", width=8, layers=1, heads=2, steps=1
        )
    )
    dataset = open_dataset("--data", qwen / "d")
    check_tokenizer(find_teacher("--teacher", str(tmp_path / "teacher")), dataset)
    assert load_tokenizer("--tokenizer", str(tmp_path / "teacher")).control_ids == dataset.tokenizer.control_ids


def test_a_pickle_begins_as_its_rows_do(qwen):
    save(qwen / "with_start", QWEN, config={"bos_token": START, "eos_token": END})
    dataset = open_dataset("--data", qwen / "d.pkl", str(qwen / "with_start"))
    assert dataset.tokenizer.bos_id is None
    assert dataset.manifest["bos_id"] is None


def test_data_that_begin_otherwise_are_not_measured_as_if_they_did_not(qwen, checkpoint, lines, tmp_path):
    prepare(
        PrepareSettings(text=(str(lines),), wikitext_samples=0, alpaca_samples=0, tokenizer=str(qwen / "tokenizer"),
                        max_length=40, output=tmp_path / "e.pkl", document_start="eos")
    )  # fmt: skip
    with pytest.raises(UserError, match=r"begin with their text and end with <\|im_end\|>.*begin with <\|im_end\|>"):
        evaluate_checkpoint(checkpoint, EvalSettings(data=tmp_path / "e"))
