"""A tokenizer for which you can find every id by hand: each word and each run of punctuation has its own id."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

# Not in alphabetical order, BOS and EOS not first: one id mistaken for another shows up.
TEXT = """<unk> the </s> cat <s> sat on mat . ### Instruction : Input Response Add 2 3 5 and < > unk s </ a b c d e f
dog ran Name it red @-@ = Title"""
WORDS = TEXT.split()
IDS = {word: number for number, word in enumerate(WORDS)}
UNK, EOS, BOS = IDS["<unk>"], IDS["</s>"], IDS["<s>"]


def save_tiny_tokenizer(folder: Path) -> Path:
    """Write it into `folder` in Hugging Face's format, and return the folder."""
    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ids(text: str) -> list[int]:
    """The ids of words separated by single spaces."""
    return [IDS[word] for word in text.split()]
