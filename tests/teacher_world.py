"""What the tests of the teacher share: a tokenizer, a dataset of random documents and a random Llama."""

import json
from itertools import pairwise

import numpy as np
import torch

from indraquantum.data.dataset import PreparedDataset, Split, content_hash
from indraquantum.data.tokenizer import load_tokenizer

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


def make_split(lengths, seed):
    """Documents of the given lengths, cut and laid into rows of 13 in order; longer ones go over several rows."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(2, VOCABULARY, sum(lengths)).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = 0, 1
    pieces, row_pieces, room = [], [0], ROW
    for begin, end in pairwise(offsets.tolist()):
        while begin < end:
            size = min(room, end - begin)
            pieces.append((begin, size))
            begin, room = begin + size, room - size
            if room == 0:
                row_pieces.append(len(pieces))
                room = ROW
    if row_pieces[-1] != len(pieces):
        row_pieces.append(len(pieces))
    sources = np.zeros(len(lengths), np.uint8)
    return Split(tokens, offsets, sources, np.array(pieces), np.array(row_pieces), ROW, padding_id=1)


def make_dataset(folder, seed=0):
    """19 training rows and 3 held-out ones; the last row of each is not full."""
    splits = {
        "train": make_split([5, 3, 8, 29, 4, 11, 2, 7] * 3 + [31], seed),
        "validation": make_split([6, 9, 17], seed + 1),
    }
    tokenizer = load_tokenizer("--tokenizer", str(folder))
    sha256 = content_hash(splits, ["random"], tokenizer)
    return PreparedDataset(splits["train"], splits["validation"], ROW, ("random",), tokenizer, sha256, {})


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
