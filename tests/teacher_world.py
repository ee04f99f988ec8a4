"""What the tests of the teacher share: a tokenizer, a dataset of random documents and a random Llama."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from indraquantum.data.prepared import PreparedDataset, content_hash
from indraquantum.data.split import Split
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.teacher import capture as capture_module

VOCABULARY = 263  # 2 control tokens, 256 bytes, 5 merges
ROW = 13


def write_tokenizer(folder, text="the cat and the hat and the rat " * 3):
    """A byte-level BPE of 263 tokens, `<s>` 0 and `</s>` 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def random_documents(lengths, seed):
    """Documents of the given lengths: BOS, random ids, EOS."""
    draw = np.random.default_rng(seed)
    return [np.array([0, *draw.integers(2, VOCABULARY, length - 2), 1], np.uint16) for length in lengths]


def make_split(documents, row_length=ROW):
    """Documents laid into rows one after the other, cut where a row ends."""
    offsets = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    pieces, row_pieces, room = [], [0], row_length
    for begin, end in pairwise(offsets.tolist()):
        while begin < end:
            size = min(room, end - begin)
            pieces.append((begin, size))
            begin, room = begin + size, room - size
            if room == 0:
                row_pieces.append(len(pieces))
                room = row_length
    if row_pieces[-1] != len(pieces):
        row_pieces.append(len(pieces))
    tokens, sources = np.concatenate(documents), np.zeros(len(documents), np.uint8)
    return Split(tokens, offsets, sources, np.array(pieces), np.array(row_pieces), row_length, padding_id=1)


def make_dataset(folder, seed=0):
    """19 training rows and 3 held-out ones; the last row of each is not full."""
    train = make_split(random_documents([5, 3, 8, 29, 4, 11, 2, 7] * 3 + [31], seed))
    validation = make_split(random_documents([6, 9, 17], seed + 1))
    return as_dataset(train, validation, load_tokenizer("--tokenizer", str(folder)))


def as_dataset(train, validation, tokenizer):
    """Two splits as a prepared dataset that was never on disk."""
    sha256 = content_hash({"train": train, "validation": validation}, ["random"], tokenizer)
    return PreparedDataset(train, validation, train.row_length, ("random",), tokenizer, sha256, {})


def write_teacher(folder, seed=0, vocabulary=VOCABULARY, **changes):
    """A random Llama with weights large enough to have opinions, and the tokenizer beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 12,
            "intermediate_size": 17,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "max_position_embeddings": 31,
            "initializer_range": 0.5,
            **changes,
        }
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model.eval()


def stop_after_a_shard(settings, dataset, shard_tokens):
    """Capture, and interrupt it as soon as the manifest lists a shard."""
    write = capture_module.write_manifest

    def stopping(folder, manifest):
        write(folder, manifest)
        if manifest.shards:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture_module, "write_manifest", stopping)
        with pytest.raises(KeyboardInterrupt):
            capture_module.capture(settings, dataset, shard_tokens)
