"""Decoding of several texts that come and go; each text's logits are those of one pass over it alone, uncached."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer
from indraquantum.inference.token_texts import TextStream, token_texts
from indraquantum.model.decoder import Decoder, PackedModel
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from small_model import NARROW, V, make
from tiny_tokenizer import save_tiny_tokenizer

VARIANTS = [
    {},
    {"projector": "none", "rope_theta": 100.0},
    {"projector": "mlp", "head": "born", "ends": "shared"},
    {"bias": "none", "num_attention_heads": 4, "num_key_value_heads": 2},
    NARROW,
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_texts_that_come_and_go_have_the_logits_of_each_alone(variant):
    full = make(max_position_embeddings=61, **variant)
    model = InferenceModel(ModelShape.from_values(full.config.to_dict()), full.state_dict())
    packed, draw = PackedModel(model), random.Random(0)
    decoder, texts, told = Decoder(packed, slots=4), [], []

    def tell(logits_BV, first):
        told.extend((list(text), logits_V) for text, logits_V in zip(texts[first:], logits_BV, strict=True))

    for _ in range(40):
        if len(texts) < 4 and draw.random() < 0.4:
            new = [
                [draw.randrange(V) for _ in range(draw.randint(1, 9))] for _ in range(draw.randint(1, 4 - len(texts)))
            ]
            states = decoder.begin(new)
            ends = torch.tensor([len(text) - 1 for text in new])
            texts += new
            tell(packed.logits(states[torch.arange(len(new)), ends]), len(texts) - len(new))
        if texts:
            latest = [draw.randrange(V) for _ in texts]
            for text, token in zip(texts, latest, strict=True):
                text.append(token)
            tell(packed.logits(decoder.step(torch.tensor(latest))), 0)
        if texts and (draw.random() < 0.3 or max(map(len, texts)) > 55):
            slot = draw.randrange(len(texts))
            decoder.release(slot)
            texts[slot] = texts[-1]
            texts.pop()
    assert len(told) > 60
    for text, logits_V in told:
        torch.testing.assert_close(logits_V, full(torch.tensor([text])).logits[0, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_there_may_be_more_texts_than_a_text_has_positions():
    full = make(max_position_embeddings=3)
    model = InferenceModel(ModelShape.from_values(full.config.to_dict()), full.state_dict())
    packed = PackedModel(model)
    decoder, texts = Decoder(packed, slots=7), [[number, 5] for number in range(7)]
    decoder.begin(texts)
    logits_BV = packed.logits(decoder.step(torch.arange(7)))
    for number, text in enumerate(texts):
        alone_V = full(torch.tensor([[*text, number]])).logits[0, -1]
        torch.testing.assert_close(logits_BV[number], alone_V, atol=1e-5, rtol=1e-5)


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({s: n for n, s in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}, merges=[]))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TextTokenizer(backend, 256, 257)


TEXTS = [
    "the cat sat on the mat . " * 3,
    "zwölf Boxkämpfer jagen 日本語 quer über 🦀🦀🦀 den €-Deich " * 2,
    "a  b\n\n c\t1999 ,\n",
]


@pytest.mark.parametrize("kind", ["bytes", "words", "sentencepiece"])
def test_shares_of_tokens_make_up_the_text(kind, tmp_path, request):
    if kind == "bytes":
        tokenizer = byte_level()
    elif kind == "words":
        tokenizer = load_tokenizer("--tokenizer", str(save_tiny_tokenizer(tmp_path)))
    else:
        tokenizer = load_tokenizer("--tokenizer", str(request.getfixturevalue("shared") / "tokenizer"))
    for text in TEXTS:
        ids = tokenizer.encode_prompt(text)
        for start in (1, 2, 5):
            shares = token_texts(tokenizer, ids[:start], ids[start:])
            assert tokenizer.decode(ids[:start]) + "".join(shares) == tokenizer.decode(ids)
            assert len(shares) == len(ids) - start


def test_an_incomplete_character_is_held_back_until_the_end():
    tokenizer = byte_level()
    stream = TextStream(tokenizer, [256])
    crab = tokenizer.encode_text("🦀")
    assert [stream.add(token) for token in [*crab, *crab[:3]]] == ["", "", "", "🦀", "", "", ""]
    assert stream.finish() == "\ufffd"
    assert token_texts(tokenizer, [256], crab[:2]) == ["", "\ufffd"]
