"""A checkpoint as a folder that transformers reads: the command `indra export`.

    import indraquantum    # tells the Auto classes what the folder holds
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)

The tokenizer puts BOS before a text, as in training, and takes `</s>` within it for text. It has no padding token, like
Llama's, and pads on the left, so that a batch of prompts can be continued.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.evaluation.write import load_model
from indraquantum.files import atomic_folder, make_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def export_checkpoint(path: Path, folder: Path) -> None:
    """Write model and tokenizer of the checkpoint at `path` into `folder`, as a whole or not at all.

    Raises:
        UserError: `path` is no whole checkpoint, or `folder` holds anything already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("FOLDER", folder, "must be new or empty")
    if folder.resolve() == Path.cwd():  # the whole folder is put in place of the old one
        raise UserError("FOLDER", folder, "must not be the working folder")
    model, tokenizer = load_model(path, torch.device("cpu"))
    make_folder("FOLDER", folder.parent)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        transformers_tokenizer(tokenizer).save_pretrained(temporary)


def transformers_tokenizer(tokenizer: TextTokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer for transformers, which gives the ids of `encode_prompt`."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.to_json())
    bos, eos = (backend.id_to_token(number) for number in (tokenizer.bos_id, tokenizer.eos_id))
    backend.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, split_special_tokens=True, padding_side="left"
    )
