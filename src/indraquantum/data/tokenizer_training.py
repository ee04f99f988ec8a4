"""Trains a byte-level BPE tokenizer on a prose file and an instruction file, for worlds that have none of their own."""

from __future__ import annotations

import json
from pathlib import Path

from indraquantum.data.prompt import format_alpaca


def train_tokenizer(prose: Path, instructions: Path, vocabulary: int, folder: Path) -> None:
    """Train a tokenizer and save it in Hugging Face's format.

    Args:
        prose: text, one paragraph a line.
        instructions: JSON list of Alpaca samples.
        vocabulary: tokens at most, `<s>` 0 and `</s>` 1 among them.
        folder: where tokenizer.json and tokenizer_config.json go.
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
    fast.save_pretrained(folder)
