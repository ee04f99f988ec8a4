"""A tokenizer with a token for each byte, and BOS and EOS after them."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from indraquantum.data.tokenizer import TextTokenizer

BOS, EOS = 256, 257


def byte_tokenizer() -> TextTokenizer:
    """Return a tokenizer with a token for each byte, which shows what happens to characters outside ASCII."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocabulary | {"<s>": BOS, "</s>": EOS}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TextTokenizer(backend, BOS, EOS)
