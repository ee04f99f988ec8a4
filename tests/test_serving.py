"""The server, asked by the official client; the model's own full pass, uncached and alone, is the reference."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import jinja2
import openai
import pytest
import torch

from byte_tokenizer import BOS, EOS, byte_tokenizer
from indraquantum.config import ServeSettings
from indraquantum.data.fast_tokenizer import save_chat_tokenizer
from indraquantum.data.prompt import Message, chat_ids, exchanges, format_alpaca
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.inference.load import Loaded
from indraquantum.model.decoder import PackedModel
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from indraquantum.serving import engine as engine_module
from indraquantum.serving import server as server_module
from indraquantum.serving.answers import Form, TokenNames, WrittenToken
from indraquantum.serving.engine import Engine, Full, Job, Token
from indraquantum.serving.server import listening, server_of
from indraquantum.training.checkpoint import Checkpoint, save_checkpoint
from small_model import make

V, CONTEXT, SLOTS, QUEUE = 258, 311, 5, 150
KEY = "a key"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    model = make(vocab_size=V, max_position_embeddings=CONTEXT)
    with torch.no_grad():
        model.head.scale_1.mul_(5)
        for layer in model.backbone.layers:  # an untrained model would only repeat its last token
            layer.mlp.down_proj.weight.mul_(15)
        ascii_ids = [
            token for token in range(256) if len(tokenizer.decode([token])) == 1 < ord(tokenizer.decode([token])) < 127
        ]
        model.head.bias_V.fill_(-30.0)
        model.head.bias_V[ascii_ids] = 0.0  # so that texts are readable
    values = model.config.to_dict()
    plain = InferenceModel(ModelShape.from_values(values), model.state_dict())
    return Loaded(plain, tokenizer, values, None, tmp_path_factory.mktemp("run") / "model.pt")


@pytest.fixture(scope="module")
def serving(loaded):
    """A server in a thread of its own."""
    settings = ServeSettings(port=0, api_key=KEY, slots=SLOTS, queue=QUEUE, max_body=1, name="tiny")
    engine = Engine(PackedModel(loaded.inference_model), EOS, SLOTS, QUEUE)
    with listening(settings) as listener, engine:
        server = server_of(loaded, settings, engine, listener)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        yield SimpleNamespace(port=listener.getsockname()[1], engine=engine)
        server.should_exit = True
        thread.join()
    assert engine.load == (0, 0)


@pytest.fixture
def client(serving):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{serving.port}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def raw(serving):
    with httpx2.Client(
        base_url=f"http://127.0.0.1:{serving.port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=30
    ) as client:
        yield client


def logprobs_of(loaded, ids):
    """The log-probabilities (T, V) of the tokens after each position, from one whole pass."""
    model = loaded.inference_model
    with torch.no_grad():
        return model.logits(model.hidden_states(torch.tensor([ids]))[0], model.lift_table()).log_softmax(-1)


def greedy(loaded, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(logprobs_of(loaded, ids)[-1].argmax().item())
    return ids[-count:]


def quiet(serving):
    """Wait until no text is written or waits."""
    deadline = time.monotonic() + 60
    while serving.engine.load != (0, 0):
        assert time.monotonic() < deadline, f"still busy: {serving.engine.load}"
        time.sleep(0.01)


def test_greedy_text_and_log_probabilities_are_the_models_own(client, loaded, tokenizer):
    ids = tokenizer.encode_prompt("Tell me")
    answer = client.completions.create(model="tiny", prompt="Tell me", temperature=0, max_tokens=9, logprobs=3)
    (choice,) = answer.choices
    written = greedy(loaded, ids, 9)
    assert choice.text == tokenizer.decode(written)
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (8, 9)
    logprobs_TV = logprobs_of(loaded, ids + written)[len(ids) - 1 : -1]
    own = logprobs_TV.gather(1, torch.tensor(written)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), own, atol=1e-4, rtol=1e-4)
    for place, top in enumerate(choice.logprobs.top_logprobs):
        best = logprobs_TV[place].topk(3)
        assert list(top) == [tokenizer.decode([token]) for token in best.indices.tolist()]
        torch.testing.assert_close(torch.tensor(list(top.values())), best.values, atol=1e-4, rtol=1e-4)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == list(range(9))


def test_echo_and_prompt_logprobs_are_those_of_the_whole_text(client, loaded, tokenizer):
    ids = tokenizer.encode_prompt("zwölf €")
    answer = client.completions.create(
        model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0, extra_body={"prompt_logprobs": 4}
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == ("zwölf €", "length", 0)
    logprobs_TV = logprobs_of(loaded, ids)[:-1]
    own = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert choice.logprobs.token_logprobs[0] is None
    torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs[1:]), own, atol=1e-4, rtol=1e-4)
    assert choice.logprobs.text_offset == [0, 0, 1, 2, 2, 3, 4, 5, 6, 6, 6]
    assert [len(top) for top in choice.logprobs.top_logprobs[1:]] == [1] * (len(ids) - 1)
    entries = choice.model_extra["prompt_logprobs"]
    assert entries[0] is None
    assert len(entries) == len(ids)
    for place, (entry, actual) in enumerate(zip(entries[1:], ids[1:], strict=True)):
        order = logprobs_TV[place].argsort(descending=True).tolist()
        assert set(entry) == {str(token) for token in (*order[:4], actual)}
        for token, about in entry.items():
            assert about["logprob"] == pytest.approx(logprobs_TV[place, int(token)].item(), abs=1e-4)
            assert about["rank"] == order.index(int(token)) + 1


async def answers_at_once(serving, bodies):
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{serving.port}/v1", api_key=KEY, max_retries=0, timeout=60
    ) as client:
        return await asyncio.gather(*(client.completions.create(model="tiny", **body) for body in bodies))


def require_same(loaded, tokenizer, body, one, other):
    """The texts are equal. If they differ, rounding decided a draw between two neighbours, and the rest follows."""
    pairs = enumerate(zip(one.text, other.text, strict=False))
    same = next((place for place, (a, b) in pairs if a != b), len(one.text))
    logprobs = [torch.tensor(choice.logprobs.token_logprobs[:same]) for choice in (one, other)]
    torch.testing.assert_close(*logprobs, atol=1e-4, rtol=1e-4)
    if one.text != other.text:
        assert body["temperature"], "greedy texts must be equal"
        ids = tokenizer.encode_prompt(body["prompt"] + one.text[:same])
        probs_V = (logprobs_of(loaded, ids)[-1] / body["temperature"]).softmax(-1)
        line = probs_V.argsort(descending=True).tolist() if body["top_p"] < 1 else list(range(V))
        first, last = sorted(line.index(tokenizer.encode_text(choice.text[same])[0]) for choice in (one, other))
        assert probs_V[line[first + 1 : last]].sum() < 1e-4


def test_64_clients_at_once_get_what_each_gets_alone(serving, client, loaded, tokenizer):
    """Prompts and answers of many lengths, greedy and drawn, so that texts come and go in all slots."""
    bodies = [
        {"prompt": "ab" * (1 + number % 13), "max_tokens": 1 + number % 17, "seed": number, "logprobs": 1,
         "temperature": [0, 1, 0.7][number % 3], "top_p": [1, 0.8][number % 2], "n": 1 + (number % 11 == 0)}
        for number in range(64)
    ]  # fmt: skip
    together = asyncio.run(answers_at_once(serving, bodies))
    for body, answer in list(zip(bodies, together, strict=True))[::5]:
        alone = client.completions.create(model="tiny", **body)
        for one, other in zip(alone.choices, answer.choices, strict=True):
            require_same(loaded, tokenizer, body, one, other)
    assert [len(answer.choices[0].logprobs.tokens) for answer in together] == [1 + n % 17 for n in range(64)]
    quiet(serving)


def test_a_seed_decides_what_is_drawn_and_choices_differ(client):
    def drawn(seed):
        answer = client.completions.create(model="tiny", prompt="a", max_tokens=12, seed=seed, n=2)
        return [choice.text for choice in answer.choices]

    assert drawn(3) == drawn(3)
    assert len({*drawn(3), *drawn(4)}) == 4
    assert client.completions.create(model="tiny", prompt="a", max_tokens=12) is not None


@pytest.mark.parametrize(("seed", "different"), [({}, 3), ({"seed": 3}, 1)])
def test_equal_prompts_of_one_request_differ_unless_it_has_a_seed(client, seed, different):
    answer = client.completions.create(model="tiny", prompt=["a"] * 3, max_tokens=12, **seed)
    assert len({choice.text for choice in answer.choices}) == different


def test_draws_follow_the_distribution(client, loaded, tokenizer):
    """400 first tokens against their probabilities, after temperature and top-p, by chi squared."""
    probs_V = (logprobs_of(loaded, tokenizer.encode_prompt("q"))[-1] / 1.7).softmax(-1)
    best, order = probs_V.sort(descending=True)
    kept = int((best.cumsum(0) - best < 0.6).sum())
    assert 3 < kept < 60
    counts = torch.zeros(V)
    for seed in range(4):
        answer = client.completions.create(
            model="tiny", prompt="q", max_tokens=1, temperature=1.7, top_p=0.6, n=100, seed=seed
        )
        for choice in answer.choices:
            counts[tokenizer.encode_text(choice.text)[0]] += 1
    assert counts[order[kept:]].sum() == 0
    expected = 400 * best[:kept] / best[:kept].sum()
    squared = ((counts[order[:kept]] - expected) ** 2 / expected).sum().item()
    assert squared < kept + 4 * (2 * kept) ** 0.5


def test_a_stream_is_the_whole_answer_in_pieces(client):
    options = {
        "model": "tiny",
        "prompt": ["one", "two"],
        "temperature": 0,
        "max_tokens": 11,
        "logprobs": 2,
        "echo": True,
    }
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage
    for number, choice in enumerate(whole.choices):
        parts = [part for chunk in chunks for part in chunk.choices if part.index == number]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts][-1] == "length"
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [x for p in parts for x in getattr(p.logprobs, name)] == getattr(choice.logprobs, name)


@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_the_log_probabilities_have_the_whole_text_even_if_it_ends_within_a_character(
    client, tokenizer, room, monkeypatch
):
    euro = tokenizer.encode_prompt("€")[-3:]
    drawn = iter([*euro, euro[0]])
    monkeypatch.setattr(engine_module, "drawn", lambda *_: next(drawn))
    choice = client.completions.create(model="tiny", prompt="a", max_tokens=room, logprobs=0).choices[0]
    assert choice.text == ("�", "�", "€", "€�")[room - 1]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert len(choice.logprobs.tokens) == room


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_before_it(client, serving, loaded, tokenizer, stream):
    text = tokenizer.decode(greedy(loaded, tokenizer.encode_prompt("Tell me"), 20))
    stop = text[9:12]
    cut = text.index(stop)
    answer = client.completions.create(
        model="tiny", prompt="Tell me", temperature=0, max_tokens=20, logprobs=0, stop=[stop, "\x00"], stream=stream
    )
    parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert "".join(part.text for part in parts) == text[:cut]
    assert parts[-1].finish_reason == "stop"
    assert len([token for part in parts for token in part.logprobs.tokens]) == cut
    quiet(serving)


def test_of_several_stop_texts_the_earliest_match_ends_the_answer(client, loaded, tokenizer):
    """Both are complete with the same character."""
    text = tokenizer.decode(greedy(loaded, tokenizer.encode_prompt("Tell me"), 20))
    stops = [text[10:12], text[8:12]]
    assert [text.index(stop) for stop in stops] == [10, 8]
    for given in (stops, stops[::-1]):
        answer = client.completions.create(model="tiny", prompt="Tell me", temperature=0, max_tokens=20, stop=given)
        assert answer.choices[0].text == text[:8]


def test_the_tokens_of_a_prompt_count_once_for_all_its_answers(client):
    """BOS and a byte for each character."""
    for prompt, tokens in (("Tell me", 8), (["Tell me", "Tell"], 13)):
        usage = client.completions.create(model="tiny", prompt=prompt, n=3, max_tokens=2, seed=1).usage
        assert usage.prompt_tokens == tokens
        assert usage.total_tokens == tokens + usage.completion_tokens


def test_a_chat_has_the_ids_of_the_exported_template(client, loaded, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_chat_tokenizer(tokenizer, tmp_path, CONTEXT)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "One?"},
        {"role": "assistant", "content": " yes"}, {"role": "user", "content": "Two?"},
    ]  # fmt: skip
    for chat in (messages, messages[1:], messages[1:2]):
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = client.chat.completions.create(
            model="tiny", messages=chat, temperature=0, max_completion_tokens=7, logprobs=True, top_logprobs=2
        )
        (choice,) = answer.choices
        assert answer.usage.prompt_tokens == len(ids)
        assert choice.message.content == tokenizer.decode(greedy(loaded, ids, 7))
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 7
    chunks = list(client.chat.completions.create(model="tiny", messages=chat, temperature=0, max_tokens=7, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == "length"


FIRST, SECOND = ({"role": "system", "content": content} for content in ("Be short.", "Be kind."))
ASKED, ANSWERED = {"role": "user", "content": "One?"}, {"role": "assistant", "content": " yes"}


@pytest.mark.parametrize(
    ("chat", "instructions"),
    [
        ([FIRST, SECOND, ASKED], ["Be short.\n\nBe kind."]),
        ([FIRST, ASKED, ANSWERED, SECOND, ASKED], ["Be short.", "Be short.\n\nBe kind."]),
        ([FIRST | {"content": ""}, SECOND, ASKED], ["Be kind."]),
    ],
)
def test_no_system_message_is_lost(client, loaded, tokenizer, tmp_path, chat, instructions):
    from transformers import AutoTokenizer

    save_chat_tokenizer(tokenizer, tmp_path, CONTEXT)
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    texts = [format_alpaca(instruction, "One?") for instruction in instructions]
    assert tokenizer.decode(ids) == " yes".join(texts)
    answer = client.chat.completions.create(model="tiny", messages=chat, temperature=0, max_tokens=7)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == tokenizer.decode(greedy(loaded, ids, 7))


@pytest.mark.parametrize("chat", [[ASKED, FIRST], [ASKED, FIRST, ANSWERED, ASKED], [ASKED, ANSWERED, FIRST]])
def test_a_system_message_that_comes_too_late_is_refused(raw, tokenizer, tmp_path, chat):
    from transformers import AutoTokenizer

    assert "message of user" in raw.post("/v1/chat/completions", json={"messages": chat}).json()["error"]["message"]
    save_chat_tokenizer(tokenizer, tmp_path, CONTEXT)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(jinja2.TemplateError, match="must come before a message of user"):
        theirs.apply_chat_template(chat, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("chat", "said"),
    [([ASKED, ASKED], "in turn, beginning with user"), ([ANSWERED, ASKED], "in turn, beginning with user"),
     ([ASKED, ANSWERED, ANSWERED, ASKED], "in turn, beginning with user"),
     ([{"role": "tool", "content": "x"}, ASKED], "role"),
     ([{"role": "user", "content": 3}], "content")],
)  # fmt: skip
def test_the_template_refuses_the_chats_that_the_server_refuses(raw, tokenizer, tmp_path, chat, said):
    from transformers import AutoTokenizer

    assert raw.post("/v1/chat/completions", json={"messages": chat}).status_code == 400
    save_chat_tokenizer(tokenizer, tmp_path, CONTEXT)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(jinja2.TemplateError, match=said):
        theirs.apply_chat_template(chat, add_generation_prompt=True)


def test_a_developer_is_a_system_in_the_template_too(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_chat_tokenizer(tokenizer, tmp_path, CONTEXT)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        theirs.apply_chat_template([FIRST | {"role": role}, ASKED], tokenize=False) for role in ("system", "developer")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_chat_has_the_ids_of_training_where_sentencepiece_adds_a_space(tmp_path, scheme):
    """As transformers 5 writes Llama's tokenizers: the space is Metaspace's, and `first` is only before a text."""
    from transformers import AutoTokenizer

    words = ["<unk>", "<s>", "</s>", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256)), "#", "\u2581#", "<code>"]
    description = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [
            {"id": number, "content": words[number], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": number < 3} for number in (0, 1, 2, len(words) - 1)
        ],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": {word: number for number, word in enumerate(words)}, "merges": [["\u2581", "#"]]},
    }  # fmt: skip
    ours = TextTokenizer.from_json(json.dumps(description), 1, 2)
    save_chat_tokenizer(ours, tmp_path, CONTEXT)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = [FIRST, ASKED, ANSWERED, ASKED | {"content": "a<code>#"}]
    messages = [Message(message["role"], message["content"]) for message in chat]
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == chat_ids(ours, exchanges(messages))
    assert ids[1] == words.index("#" if scheme == "never" else "\u2581#")
    for text in ("# one", " # one", "", "#\n#", "#<code># x", "<code>#"):
        assert theirs(text)["input_ids"] == ours.encode_prompt(text)


@pytest.mark.parametrize("fields", [{"top_p": 0, "temperature": 1.3}, {"top_p": 0.0, "stop": "", "temperature": 2}])
def test_what_openai_allows_is_allowed(raw, loaded, tokenizer, fields):
    body = {"prompt": "Tell me", "max_tokens": 6} | fields
    answer = raw.post("/v1/completions", json=body | {"stream_options": None}).json()
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(loaded, tokenizer.encode_prompt("Tell me"), 6))
    streamed = raw.post("/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": None}})
    assert streamed.status_code == 200


def test_a_chat_that_is_too_long_is_refused_under_its_own_name(raw):
    asked = {"messages": [{"role": "user", "content": "a" * 2 * CONTEXT}]}
    refused = raw.post("/v1/chat/completions", json=asked).json()["error"]
    assert refused["param"] == "messages"
    assert refused["message"].startswith("messages: got ")


def test_eos_ends_an_answer(client, loaded):
    bias_V = loaded.inference_model.head.bias_V
    with torch.no_grad():
        bias_V[EOS] = 1000.0
    try:
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "?"}], n=2)
    finally:
        with torch.no_grad():
            bias_V[EOS] = -30.0
    assert [(c.message.content, c.finish_reason) for c in answer.choices] == [("", "stop")] * 2
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_lists_eos_so_that_lm_eval_scores_each_token(client, loaded, tokenizer, stream):
    """lm-eval asks for one token and leaves the last entry out, whichever token it is."""
    ids, bias_V = tokenizer.encode_prompt("Tell me"), loaded.inference_model.head.bias_V
    with torch.no_grad():
        bias_V[EOS] = 1000.0
    try:
        answer = client.completions.create(
            model="tiny", prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True, stream=stream
        )
        parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        logprobs_TV = logprobs_of(loaded, ids)
    finally:
        with torch.no_grad():
            bias_V[EOS] = -30.0
    assert ("".join(part.text for part in parts), parts[-1].finish_reason) == ("Tell me", "stop")
    tokens, values, tops, offsets = (
        [entry for part in parts for entry in getattr(part.logprobs, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert tokens == ["<s>", *"Tell me", "</s>"]
    assert offsets == [0, *range(7), 7]
    actual = logprobs_TV.gather(1, torch.tensor([*ids[1:], EOS])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(values[1:]), actual, atol=1e-4, rtol=1e-4)
    for token, value, top in list(zip(tokens, values, tops, strict=True))[1:]:
        assert top[token] == value
        assert set(top) == {token, "</s>"}


@pytest.mark.parametrize("prompt", [[BOS], [BOS, EOS]])
def test_a_prompt_without_text_is_echoed_too(client, prompt):
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=1, logprobs=0, echo=True)
    assert len(answer.choices[0].logprobs.tokens) == len(prompt) + 1


@pytest.mark.parametrize("count", [0, 2])
def test_the_likeliest_tokens_have_the_written_one_among_them(client, tokenizer, count, monkeypatch):
    drawn = iter(tokenizer.encode_text("€"))
    monkeypatch.setattr(engine_module, "drawn", lambda *_: next(drawn))
    logprobs = client.completions.create(model="tiny", prompt="a", max_tokens=3, logprobs=count).choices[0].logprobs
    assert logprobs.tokens == ["", "", "€"]
    told = zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    assert [top[token] for token, top in told] == logprobs.token_logprobs
    assert [len(top) for top in logprobs.top_logprobs] == [count + 1] * 3


class Twins:
    """A tokenizer with several tokens of the same text, as byte fallback has them."""

    vocabulary = {1: "a", 2: "<0x61>", 3: "b", 4: "<0x62>", 9: "-"}
    backend = SimpleNamespace(id_to_token=vocabulary.get)

    def encode_text(self, text):
        return [9]

    def decode(self, ids):
        return "".join({1: "a", 2: "a", 3: "b", 4: "b", 9: "-"}[token] for token in ids)


@pytest.mark.parametrize(
    ("written", "listed"),
    [
        ((1, -1.0), {"a": -1.0, "<0x61>": -2.0, "b": -3.0, "<3>": -4.0}),
        ((2, -2.0), {"<1>": -1.0, "a": -2.0, "b": -3.0, "<3>": -4.0}),
    ],
)
def test_of_several_tokens_with_the_same_text_the_written_one_is_called_so(written, listed):
    """lm-eval takes a token for greedy if its text is that of the largest value."""
    form = Form(TokenNames(Twins()), "tiny", "id", 0)
    assert form.top("a", *written, [(1, -1.0), (2, -2.0), (4, -3.0), (3, -4.0)]) == listed
    assert form.top("a", *written, [(1, -1.0)]) == dict(list(listed.items())[: written[0]])


def test_what_is_no_whole_text_has_no_bytes_in_the_lists_of_a_chat(tokenizer):
    form, (start, *_), (letter,) = Form(TokenNames(tokenizer), "", "", 0), *map(tokenizer.encode_text, ("€", "z"))
    ranked = [(letter, -0.5), (start, -1.0), (EOS, -2.0)]
    whole, part = form.chat_logprobs(
        [WrittenToken("z", Token(letter, -0.5, ranked)), WrittenToken("�", Token(start, -1.0, []))]
    )["content"]
    assert (whole["bytes"], part["bytes"]) == ([122], None)
    assert [entry["bytes"] for entry in whole["top_logprobs"]] == [[122], None, None]


def test_a_chat_lists_each_written_token_as_its_entry_shows_it(tokenizer):
    form, euro = Form(TokenNames(tokenizer), "", "", 0), tokenizer.encode_text("€")
    ranked = [(token, -1.0) for token in euro]
    told = zip(("", "", "€"), euro, strict=True)
    content = form.chat_logprobs([WrittenToken(text, Token(token, -1.0, ranked)) for text, token in told])["content"]
    assert [(entry["token"], bytes(entry["bytes"])) for entry in content] == [("", b""), ("", b""), ("€", "€".encode())]
    for number, entry in enumerate(content):
        others = entry.pop("top_logprobs")
        assert others.pop(number) == entry
        assert [other["bytes"] for other in others] == [None, None]


def test_the_model_is_listed(client, raw):
    (card,) = client.models.list().data
    assert (card.id, card.model_extra["max_model_len"]) == ("tiny", CONTEXT)
    assert client.models.retrieve("tiny") == card
    with pytest.raises(openai.NotFoundError, match="does not exist; this server has 'tiny'"):
        client.completions.create(model="gpt", prompt="a")
    assert raw.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


LONG = "a" * CONTEXT
WRONG = [
    ({"prompt": LONG}, "prompt: got 312 tokens; must be at most 310 tokens, because the model's context is 311"),
    ({"prompt": "abc", "max_tokens": 308}, "prompt: got 4 tokens and 308 to write; must be at most 3 tokens"),
    ({"prompt": [5] * 313, "max_tokens": 0}, "prompt: got 313 tokens; must be at most 312 tokens"),
    ({"prompt": [V]}, f"prompt: got the token {V}; must be below {V}"),
    ({"prompt": [-1]}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
    ({}, "prompt: Field required"),
    ({"prompt": [True]}, "prompt"), ({"prompt": {"a": 1}}, "prompt"), ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens: must be greater than or equal to 0"),
    ({"prompt": "a", "temperature": 3}, "temperature: must be less than or equal to 2"),
    ({"prompt": "a", "n": True}, "n: must be a valid integer"), ({"prompt": "a", "temperature": "0.5"}, "temperature"),
    ({"prompt": "a", "n": 100_000}, "n: must be"), ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "prompt_logprobs": 129}, "prompt_logprobs"),
    ({"prompt": "a", "stop": ["b"] * 5}, "stop: must be at most 4"),
    ({"prompt": "a", "stop": 3}, "stop: must be a text or"),
    ({"prompt": [5, -1]}, "prompt: must be a text, a list of token ids"),
    ({"prompt": "a", "stream": -1}, "stream: must be a valid boolean"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x: there is no such"),
    ({"prompt": "a", "max_tokens": 10**9}, "max_tokens: got 1000000000; must be below 311"),
    ({"prompt": "a", "frequency_penalty": 0.5}, "frequency_penalty: must be 0"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias.5: must be 0"),
    ({"prompt": [5] * 311, "max_tokens": 1, "echo": True, "logprobs": 1}, "prompt: got 311 tokens and 1 to write"),
    ({"prompt": "a", "presence_penalty": 1.5}, "presence_penalty"), ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 3}, "best_of: got 3"),
    ({"prompt": "a", "temprature": 1}, "temprature: there is no such"),
    ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "can't be streamed"),
    ({"prompt": "a", "seed": 2**70}, "seed"),
    ({"prompt": ["a"] * 200}, f"prompt: got 200 texts to write; must be at most {QUEUE}, the length of this server's"),
    ({"prompt": ["a", "b"], "n": 100}, f"prompt: got 200 texts to write; must be at most {QUEUE}"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_a_wrong_request_is_refused_in_one_line_with_the_field(raw, body, message):
    answer = raw.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0.0, "presence_penalty": 0.0}, {"frequency_penalty": 0, "presence_penalty": None},
        {"logit_bias": {}}, {"logit_bias": {"5": 0.0}}, {"best_of": 1, "n": 1, "suffix": ""},
    ],
    ids=str,
)  # fmt: skip
def test_fields_that_change_nothing_are_taken(raw, fields):
    assert raw.post("/v1/completions", json={"prompt": "a", "max_tokens": 1} | fields).status_code == 200


NEUTRAL = {
    "response_format": {"type": "text"}, "modalities": ["text"], "tools": [], "tool_choice": "none", "functions": [],
    "parallel_tool_calls": True, "function_call": "auto", "reasoning_effort": "none", "service_tier": "auto",
    "logit_bias": {}, "prompt_cache_key": "a",
}  # fmt: skip


@pytest.mark.parametrize("fields", [NEUTRAL, dict.fromkeys([*NEUTRAL, "audio", "prediction"])], ids=["empty", "null"])
def test_fields_of_a_chat_that_change_nothing_are_taken(raw, fields):
    asked = {"messages": [ASKED], "temperature": 0, "max_tokens": 3}
    plain, answer = (raw.post("/v1/chat/completions", json=asked | more) for more in ({}, fields))
    assert (answer.status_code, answer.json()["choices"]) == (200, plain.json()["choices"])


def test_an_earlier_answer_may_be_sent_back_as_a_client_or_lm_eval_writes_it(client):
    first = client.chat.completions.create(model="tiny", messages=[ASKED], max_tokens=3).choices[0].message
    written = [first.model_dump(), {"role": "assistant", "content": first.content, "type": "text", "tool_calls": []}]
    later = {client.chat.completions.create(
        model="tiny", messages=[ASKED, message, ASKED], max_tokens=3, temperature=0
    ).choices[0].message.content for message in written}  # fmt: skip
    assert len(later) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools: must be left out; this server does not have it"),
        ({"response_format": {"type": "json_object"}}, "response_format.type: must be 'text'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice: must be 'none' or 'auto'"),
        ({"messages": [ASKED | {"audio": {"id": "a"}}]}, "messages.0.audio: must be left out"),
        ({"messages": [ASKED | {"type": "image"}]}, "messages.0.type: must be 'text'"),
        ({"messages": [ASKED | {"typ": None}]}, "messages.0.typ: there is no such"),
    ],
)
def test_fields_of_a_chat_that_ask_for_more_are_refused(raw, fields, message):
    answer = raw.post("/v1/chat/completions", json={"messages": [ASKED], "max_tokens": 1} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_more_answers_than_the_queue_is_long_are_refused(raw, serving, monkeypatch, path):
    monkeypatch.setattr(serving.engine, "longest_queue", 3)
    given = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    assert raw.post(f"/v1/{path}", json=given | {"n": 3, "max_tokens": 1}).status_code == 200
    answer = raw.post(f"/v1/{path}", json=given | {"n": 4, "max_tokens": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"
    assert answer.json()["error"]["message"].startswith("n: got 4 texts to write; must be at most 3, ")


def test_a_request_beyond_a_full_queue_may_be_repeated(serving, raw):
    with connection_of(serving, {"prompt": "a", "max_tokens": 300, "n": 128, "stream": True}):
        while serving.engine.load[1] < QUEUE - 100:
            time.sleep(0.005)
        answer = raw.post("/v1/completions", json={"prompt": "a", "n": 100})
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert error["message"] == "too many texts are waiting; try again later"
    quiet(serving)


def test_texts_that_nobody_waits_for_leave_the_queue(loaded):
    engine = Engine(PackedModel(loaded.inference_model), EOS, slots=1, longest_queue=2)  # its thread never starts
    jobs = [Job([5], 1, print) for _ in range(2)]
    engine.submit(jobs)
    with pytest.raises(Full):
        engine.submit([Job([5], 1, print)])
    for job in jobs:
        job.cancelled = True
    engine.submit([Job([5], 1, print) for _ in range(2)])
    assert engine.load == (0, 2)


def test_the_longest_texts_that_fit_are_written(client, loaded):
    answer = client.completions.create(model="tiny", prompt=[5] * 300, max_tokens=11, temperature=0)
    assert answer.usage.completion_tokens == 11
    assert client.completions.create(model="tiny", prompt=[5] * 310).usage.completion_tokens == 1
    measured = client.completions.create(
        model="tiny", prompt=[5] * 312, max_tokens=1, extra_body={"prompt_logprobs": 0}
    )
    assert measured.usage.completion_tokens == 0
    entries = measured.choices[0].model_extra["prompt_logprobs"]
    last = logprobs_of(loaded, [5] * 311)[-1, 5].item()
    assert entries[-1]["5"]["logprob"] == pytest.approx(last, abs=1e-4)
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a" * 200}])
    assert chat.usage.total_tokens == CONTEXT


WRONG_CHATS = [
    [], [{"role": "assistant", "content": "a"}], [{"role": "tool", "content": "a"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": "a"}] * 2,
    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
]  # fmt: skip


@pytest.mark.parametrize("messages", WRONG_CHATS)
def test_a_wrong_chat_is_refused(raw, messages):
    answer = raw.post("/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert "messages" in answer.json()["error"]["message"]


HOSTILE = [b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"null", b'"text"', b'{"prompt": "\\ud800"}', b"\xff\xfe{}",
           b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}',
           b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "n": 1.5}']  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE, ids=lambda content: content[:30].decode("latin-1"))
def test_hostile_json_is_refused(raw, content):
    answer = raw.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_large_body_is_refused_whether_or_not_its_size_is_said(raw, serving):
    headers = {"Content-Type": "application/json"}
    # 3 MiB is more than the sockets hold, so the client only sees the answer if the server reads on.
    for size in (1 << 20 | 1, 3 << 20):
        assert raw.post("/v1/completions", content=b"x" * size, headers=headers).status_code == 413

    def endless():
        while True:
            yield b"x" * 65536

    with contextlib.suppress(httpx2.TransportError):  # the server may close before all is sent
        assert raw.post("/v1/completions", content=endless(), headers=headers).status_code == 413
    connection = http.client.HTTPConnection("127.0.0.1", serving.port)
    connection.putrequest("POST", "/v1/completions")
    for name, value in (("Authorization", f"Bearer {KEY}"), *headers.items(), ("Content-Length", str(1 << 30))):
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_only_the_own_names_the_key_and_json_are_let_in(raw):
    json_body = {"prompt": "a", "max_tokens": 1}
    assert (
        raw.post("/v1/completions", json=json_body, headers={"Host": "evil.example"}).json()["error"]["code"]
        == "wrong_host"
    )
    for host in ("localhost:99", "127.0.0.1", "[::1]:1", "LOCALHOST"):
        assert raw.post("/v1/completions", json=json_body, headers={"Host": host}).status_code == 200
    for key in ("", "Bearer", "Bearer no", f"Basic {KEY}"):
        answer = raw.post("/v1/completions", json=json_body, headers={"Authorization": key})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert raw.get("/health", headers={"Authorization": ""}).status_code == 200
    text = raw.post("/v1/completions", content=json.dumps(json_body), headers={"Content-Type": "text/plain"})
    assert text.status_code == 415
    assert raw.get("/v1/completions").status_code == 405
    assert "nowhere" in raw.get("/nowhere").json()["error"]["message"]


def connection_of(serving, body, receive_buffer=None):
    """A connection that has sent a request and read nothing."""
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", serving.port))
    content = json.dumps(body).encode()
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {KEY}\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.mark.parametrize("given", ["option", "environment"])
@pytest.mark.parametrize("key", ["schlüssel", "a\nb", " "])
def test_a_key_that_no_request_can_hold_is_refused(monkeypatch, key, given):
    monkeypatch.delenv("INDRA_API_KEY", raising=False)
    if given == "environment":
        monkeypatch.setenv("INDRA_API_KEY", key)
    settings = ServeSettings(port=0, api_key=key if given == "option" else None)
    with listening(settings) as listener, pytest.raises(UserError) as refused:
        server_of(None, settings, None, listener)
    name = "--api-key" if given == "option" else "INDRA_API_KEY"
    assert str(refused.value).startswith(f"{name}: got a key; must be of printable ASCII characters only")


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_connection_frees_its_slots(serving, client, stream, monkeypatch):
    body = {"prompt": "a", "max_tokens": 300, "n": SLOTS * 8, "stream": stream}
    passes, logits = [], serving.engine.packed.logits
    monkeypatch.setattr(serving.engine.packed, "logits", lambda states: passes.append(1) or logits(states))
    with connection_of(serving, body) as connection:
        while serving.engine.load[0] < SLOTS:
            time.sleep(0.005)
        # A reset, as of a client that was killed.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    quiet(serving)
    assert len(passes) < 300 * 6  # 8 times the slots would take 300 * 8
    assert client.completions.create(model="tiny", prompt="b", max_tokens=2).usage.completion_tokens == 2


def test_a_reader_that_takes_nothing_holds_no_slot_and_is_cut(serving, client, monkeypatch):
    monkeypatch.setattr(server_module, "READER_SECONDS", 0.2)
    body = {"prompt": "a", "max_tokens": 300, "n": 30, "stream": True, "logprobs": 20}
    with connection_of(serving, body, receive_buffer=2048) as slow:
        while serving.engine.load == (0, 0):
            time.sleep(0.005)
        assert client.completions.create(model="tiny", prompt="b", max_tokens=2).usage.completion_tokens == 2
        quiet(serving)
        slow.settimeout(30)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := slow.recv(1 << 20):
                received += len(part)
    part = client.completions.create(**body | {"model": "tiny", "stream": False, "n": 5})
    assert received < 6 * len(part.to_json())


def test_a_failed_pass_is_an_error_and_the_server_goes_on(serving, client, monkeypatch, caplog):
    packed, logits = serving.engine.packed, serving.engine.packed.logits
    left = iter([True, True, False])

    def failing(states):
        if next(left, True):
            return logits(states)
        raise RuntimeError("no memory")

    monkeypatch.setattr(packed, "logits", failing)
    with pytest.raises(openai.InternalServerError, match="the model failed"):
        client.completions.create(model="tiny", prompt="b", max_tokens=9)
    left = iter([True, True, False])
    with pytest.raises(openai.APIError, match="the model failed"):
        list(client.completions.create(model="tiny", prompt="b", max_tokens=9, stream=True))
    assert client.completions.create(model="tiny", prompt="b", max_tokens=9).usage.completion_tokens == 9


def test_a_taken_port_and_a_foreign_address_are_named(serving):
    with (
        pytest.raises(UserError, match=f"--port: got {serving.port}; is taken by another program"),
        listening(ServeSettings(port=serving.port)),
    ):
        pass
    for host in ("192.0.2.1", "not an address"):
        with pytest.raises(UserError, match="--host: got"), listening(ServeSettings(host=host, port=0)):
            pass


def test_the_command_ends_running_answers_when_a_signal_comes(loaded, tmp_path):
    path = tmp_path / "run" / "checkpoint_v4_epoch_1.pt"
    path.parent.mkdir()
    tokenizer = {"json": loaded.tokenizer.to_json(), "bos_id": BOS, "eos_id": EOS}
    save_checkpoint(path, Checkpoint(
        model_config=loaded.model_config, model=loaded.inference_model.state_dict(), average={}, optimizer={}, step=1,
        tokens=1, finished=True, pending=None, guard={}, best={}, loss_scale={}, settings={"stages": {}},
        tokenizer=tokenizer,
    ))  # fmt: skip
    command = [sys.executable, "-m", "indraquantum", "serve", str(path), "--port", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "INDRA_API_KEY"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as child:
        line = child.stdout.readline()
        found = re.fullmatch(
            r"Serving run/checkpoint_v4_epoch_1 at (http://127\.0\.0\.1:\d+/v1), context 311 tokens.*\n", line
        )
        assert found, line
        with openai.OpenAI(base_url=found[1], api_key="none", max_retries=0) as client:
            name = client.models.list().data[0].id
            stream = client.completions.create(model=name, prompt="a", max_tokens=300, stream=True)
            first = next(iter(stream))
            child.send_signal(signal.SIGTERM)
            chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert len("".join(chunk.choices[0].text for chunk in chunks)) == 300
        told = child.stdout.read()
        assert child.wait() == 0
    assert told.startswith("Stopping: ")
    assert told.endswith("The server has stopped.\n")


def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory as Linux tells it")
def test_thousands_of_requests_with_cut_connections_and_slow_readers_lose_nothing_and_no_memory(serving, client):
    """Rounds of 64 clients at once, each with connections that are cut and readers that take nothing."""
    memory = []
    for number in range(40):
        others = [connection_of(serving, {"prompt": "a", "max_tokens": 300, "stream": True, "n": 2}) for _ in range(8)]
        bodies = [
            {"prompt": "ab" * (1 + i % 40), "max_tokens": 1 + i % 31, "seed": i, "extra_body": {"prompt_logprobs": 5}}
            for i in range(64)
        ]
        found = asyncio.run(answers_at_once(serving, bodies))
        assert [answer.usage.completion_tokens for answer in found] == [1 + i % 31 for i in range(64)]
        for connection in others:
            connection.close()
        if number == 0:
            first = [answer.choices[0].text for answer in found]
        assert [answer.choices[0].text for answer in found] == first
        memory.append(resident_mib())
    quiet(serving)
    assert memory[-1] - memory[9] < 16, memory


def test_a_vocabulary_smaller_than_the_list_of_the_likeliest_is_listed_whole():
    logits = torch.tensor([[0.0, 2.0, 1.0]]).expand(2, 3)
    packed = SimpleNamespace(logits=lambda states: logits)
    told = engine_module.Engine._prompt_tokens(SimpleNamespace(packed=packed), torch.zeros(3, 1), [0, 1, 2], 128)
    assert [[token for token, _ in about.top] for about in told[1:]] == [[1, 2, 0]] * 2
    assert [token for token, _ in engine_module._written(logits[0], 1, 20).top] == [1, 2, 0]
