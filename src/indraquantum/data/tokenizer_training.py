"""Trains a byte-level BPE tokenizer on a prose file and an instruction file, for the demo and the tests."""

from __future__ import annotations

import json
from pathlib import Path

from indraquantum.data.prompt import format_alpaca
from indraquantum.data.system_errors import system_errors_shown


def train_tokenizer(prose: Path, instructions: Path, vocabulary: int, folder: Path) -> None:
    """Train a tokenizer and save it in Hugging Face's format.

    Args:
        prose: the text file, one paragraph a line.
        instructions: the JSON file with a list of Alpaca samples.
        vocabulary: the most tokens, including `<s>` with id 0 and `</s>` with id 1.
        folder: the folder for tokenizer.json and tokenizer_config.json.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts = prose.read_text(encoding="utf-8").split("\n")
    texts += [format_alpaca(**sample) for sample in json.loads(instructions.read_text(encoding="utf-8"))]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=vocabulary, min_frequency=2, special_tokens=["<s>", "</s>"], show_progress=False
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="</s>")
    with system_errors_shown(folder):
        fast.save_pretrained(folder)
