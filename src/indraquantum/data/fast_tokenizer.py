"""The dataset's tokenizer for transformers: it gives the ids of `encode_prompt`, and AutoTokenizer can load its folder.

It begins a text as in training, with BOS if there is one, and treats `</s>` within a text as text. Like Llama's
tokenizer it has no padding token. It pads on the left, so that a batch of prompts can be continued.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from indraquantum.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write the tokenizer into `folder`, so that transformers and `load_tokenizer` can load it."""
    fast = transformers_tokenizer(tokenizer)
    fast.save_pretrained(folder)
    # transformers adds flags and tokens of its own. Without them the file has the same hash as the dataset's.
    (folder / "tokenizer.json").write_text(_with_beginning(tokenizer).to_str(), encoding="utf-8")


def transformers_tokenizer(tokenizer: TextTokenizer) -> PreTrainedTokenizerFast:
    """Return a tokenizer for transformers that gives the ids of `encode_prompt`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_with_beginning(tokenizer),
        bos_token=None if tokenizer.bos_id is None else tokenizer.beginning,
        eos_token=tokenizer.ending,
        split_special_tokens=True,
        padding_side="left",
    )


def _with_beginning(tokenizer: TextTokenizer) -> Tokenizer:
    """Return the library's tokenizer with a post-processor that begins a text as `encode_prompt` does."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(tokenizer.to_json())
    bos = [] if tokenizer.bos_id is None else [(tokenizer.beginning, tokenizer.bos_id)]
    backend.post_processor = TemplateProcessing(single=[*(token for token, _ in bos), "$A"], special_tokens=bos)
    return backend
