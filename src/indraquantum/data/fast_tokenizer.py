"""The dataset's tokenizer for transformers: it gives the ids of `encode_prompt`, and AutoTokenizer can load its folder.

It begins a text as in training, with BOS if there is one. It pads on the left, so that a batch of prompts can be
continued. There are two forms: in the plain one, `</s>` within a text is text, and there is no padding token, as in
Llama's tokenizer. An exported model has the form for chats, whose template writes control tokens as text, so they are
read as control tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indraquantum.data.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


ZERO_BYTE = "<0x00>"  # as SentencePiece spells it
# The form of `prompt.exchanges`. The system messages so far are the instruction, and the user's text is its input.
CHAT_TEMPLATE = """\
{%- set ns = namespace(system='', is_open=false) -%}
{%- for message in messages -%}
{%- if message['content'] is not string -%}
{{- raise_exception('content: must be text') -}}
{%- elif message['role'] in ['system', 'developer'] -%}
{%- if ns.is_open or (loop.last and add_generation_prompt) -%}
{{- raise_exception('messages: each system message must come before a message of user') -}}
{%- endif -%}
{%- set ns.system = ns.system + ('\\n\\n' if ns.system and message['content'] else '') + message['content'] -%}
{%- elif message['role'] in ['user', 'assistant'] and (message['role'] == 'user') == ns.is_open -%}
{{- raise_exception('messages: must be messages of user and assistant in turn, beginning with user') -}}
{%- elif message['role'] == 'user' -%}
{%- set ns.is_open = true -%}
{{- bos_token -}}
{%- if ns.system -%}
{{- '### Instruction:\\n' + ns.system + '\\n\\n### Input:\\n' + message['content'] + '\\n\\n### Response:\\n' -}}
{%- else -%}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' -}}
{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{%- set ns.is_open = false -%}
{{- message['content'] + eos_token -}}
{%- else -%}
{{- raise_exception('role: got ' + message['role'] + '; must be system, developer, user or assistant') -}}
{%- endif -%}
{%- endfor -%}"""


def chat_template(tokenizer: TextTokenizer) -> str:
    """Return the template for chats. Without a BOS it names none, because llama.cpp would write another token there."""
    return CHAT_TEMPLATE if tokenizer.bos_id is not None else CHAT_TEMPLATE.replace("{{- bos_token -}}\n", "")


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write the tokenizer into `folder`, so that transformers and `load_tokenizer` can load it."""
    _save(transformers_tokenizer(tokenizer), tokenizer, folder)


def save_chat_tokenizer(tokenizer: TextTokenizer, folder: Path, longest: int) -> None:
    """Write the tokenizer in its form for chats, with Alpaca's template.

    Args:
        tokenizer: the tokenizer.
        folder: where to write it.
        longest: the longest text, in tokens, that the model takes.
    """
    reachable = _unknown_stays_text(tokenizer)
    fast = transformers_tokenizer(reachable, split_special_tokens=False, model_max_length=longest)
    fast.pad_token = tokenizer.backend.id_to_token(padding_id(tokenizer))
    fast.chat_template = _spaced(chat_template(tokenizer), tokenizer)
    _save(fast, reachable, folder)


def _spaced(template: str, tokenizer: TextTokenizer) -> str:
    """Return the template with the space before each prompt that training has there.

    Training encodes each exchange by itself. In a chat it follows control tokens, where Metaspace's `first`, which
    transformers 5 writes for Llama's tokenizers, adds no space of its own. Before a text that has one, it never does.
    """
    outer = json.loads(tokenizer.to_json())["pre_tokenizer"] or {}
    steps = outer.get("pretokenizers", [outer])
    has_first = any(step.get("prepend_scheme") == "first" for step in steps)
    return template.replace("'### Instruction", "' ### Instruction") if has_first else template


def _unknown_stays_text(tokenizer: TextTokenizer) -> TextTokenizer:
    """Return the tokenizer without its token for unknown text as a special one, because WikiText spells it: `<unk>`."""
    description = json.loads(tokenizer.to_json())
    unknown = description["model"].get("unk_token")
    kept = [token for token in description["added_tokens"] if token["content"] != unknown]
    if len(kept) == len(description["added_tokens"]) or unknown not in description["model"]["vocab"]:
        return tokenizer
    content = json.dumps(description | {"added_tokens": kept})
    return TextTokenizer.from_json(content, tokenizer.bos_id, tokenizer.eos_id)


def padding_id(tokenizer: TextTokenizer) -> int:
    """Return the token to pad with: that of the byte 0, which no text holds, if the tokenizer has it; otherwise EOS.

    Collators give no label to the padding token. If that is EOS, a model that is trained further forgets to stop.
    """
    found = tokenizer.backend.token_to_id(ZERO_BYTE)
    return tokenizer.eos_id if found is None else found


def _save(fast: PreTrainedTokenizerFast, tokenizer: TextTokenizer, folder: Path) -> None:
    fast.save_pretrained(folder)
    # transformers adds flags and tokens of its own. Without them the file has the same hash as the dataset's.
    (folder / "tokenizer.json").write_text(_with_beginning(tokenizer).to_str(), encoding="utf-8")


def transformers_tokenizer(tokenizer: TextTokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer for transformers that gives the ids of `encode_prompt`; `options` are of its class."""
    from transformers import PreTrainedTokenizerFast

    defaults = {"split_special_tokens": True, "padding_side": "left"}
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_beginning(tokenizer),
        bos_token=None if tokenizer.bos_id is None else tokenizer.beginning,
        eos_token=tokenizer.ending,
        **defaults | options,
    )


def _with_beginning(tokenizer: TextTokenizer) -> Tokenizer:
    """Return the library's tokenizer with a post-processor that begins a text as `encode_prompt` does."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend = Tokenizer.from_str(tokenizer.to_json())
    bos = [] if tokenizer.bos_id is None else [(tokenizer.beginning, tokenizer.bos_id)]
    backend.post_processor = TemplateProcessing(single=[*(token for token, _ in bos), "$A"], special_tokens=bos)
    return backend
