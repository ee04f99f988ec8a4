"""GGUF files: transformers' own reader, which shares no code with ours, finds the same model and tokenizer in them."""

from __future__ import annotations

import itertools
import json
import random
import re
import urllib.request
from dataclasses import replace
from pathlib import Path

import gguf
import jinja2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from byte_tokenizer import EOS, byte_tokenizer
from indraquantum.config import ExportSettings
from indraquantum.data.fast_tokenizer import chat_template, save_chat_tokenizer
from indraquantum.data.prompt import Message, format_alpaca
from indraquantum.data.same_tokenizer import require_same_tokenizer
from indraquantum.data.tokenizer import TextTokenizer, load_tokenizer
from indraquantum.errors import UserError
from indraquantum.inference.export_gguf import EXAMPLE, modelfile, write
from indraquantum.inference.gguf_tokenizer import TokenType, gguf_tokenizer
from indraquantum.inference.load import Loaded
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from small_model import make, tokens

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer(world):
    return load_tokenizer("--tokenizer", str(world.tokenizer))


def loaded_of(tokenizer, **options):
    sizes = {"d_model": 32, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": tokenizer.vocabulary_size}
    model = make(**{**sizes, **options})
    with torch.no_grad():
        model.head.scale_1.mul_(10)
        if model.bias_V is not None:
            model.bias_V.normal_(std=3)
    plain = InferenceModel(ModelShape.from_values(model.config.to_dict()), model.state_dict())
    return model, Loaded(plain, tokenizer, model.config.to_dict(), None, None)


@pytest.mark.parametrize(
    ("options", "outtype", "within"),
    [
        ({"bias": "none"}, "f32", 1e-4), ({}, "f32", 1e-4), ({"bias": "none", "num_key_value_heads": 1}, "f32", 1e-4),
        ({}, "f16", 0.1), ({"bias": "none"}, "q8_0", 1.0), ({"d_model": 37, "state_width": 14}, "f32", 1e-4),
        ({"bias": "none", "d_model": 37, "state_width": 16}, "q8_0", 1.0),
    ],
    ids=str,
)  # fmt: skip
def test_another_reader_finds_the_model(tokenizer, tmp_path, options, outtype, within):
    model, loaded = loaded_of(tokenizer, **options)
    write(loaded, tmp_path, ExportSettings(as_="gguf", outtype=outtype))
    name = f"model-{outtype}.gguf"
    reader = gguf.GGUFReader(tmp_path / name)
    architecture = "llama" if options.get("bias") == "none" else "qwen2"
    assert reader.get_field("general.architecture").contents() == architecture
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kind for name, kind in kinds.items() if name.endswith("norm.weight")} == {"F32"}
    assert kinds["blk.0.attn_q.weight"] == kinds["output.weight"] == outtype.upper()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=name, dtype=torch.float32)
    ids = tokens(3, 17)
    with torch.no_grad():
        expected, found = model(ids).logits, theirs(ids).logits
    if architecture == "qwen2":  # transformers has no bias there; llama.cpp adds it
        bias = next(tensor for tensor in reader.tensors if tensor.name == "output.bias")
        assert bias.tensor_type.name == "F32"
        found = found + torch.from_numpy(bias.data.copy())
    assert (found - expected).abs().max() < within
    if outtype != "f32":
        assert (found - expected).abs().max() > 1e-4  # it is another format


def test_another_reader_finds_the_tokenizer(tokenizer, tmp_path):
    _, loaded = loaded_of(tokenizer)
    write(loaded, tmp_path, ExportSettings(as_="gguf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model-f16.gguf")
    for text in ("the cat sees a dog", "Who hears my bird? 12'll ", format_alpaca("Say it.", "now\n\n  then")):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode_text(text)
    again = load_tokenizer("--tokenizer", str(tmp_path / "model-f16.gguf"))
    require_same_tokenizer("--tokenizer", tmp_path, "must be the same", tokenizer, again)
    assert gguf_tokenizer(again, tokenizer.vocabulary_size).pre == "gpt-2"
    assert again.control_ids == tokenizer.control_ids
    field = gguf.GGUFReader(tmp_path / "model-f16.gguf").get_field
    assert field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert field("tokenizer.ggml.add_bos_token").contents() is True
    assert field("tokenizer.ggml.add_eos_token").contents() is False
    assert field("tokenizer.ggml.bos_token_id").contents() == tokenizer.bos_id
    types = field("tokenizer.ggml.token_type").contents()
    assert {i for i, kind in enumerate(types) if kind == TokenType.CONTROL} == set(tokenizer.control_ids)


def test_the_template_of_a_tokenizer_without_bos_writes_none(tokenizer, tmp_path):
    """llama.cpp takes token 1 or 11 for the BOS of a file that names none."""
    _, loaded = loaded_of(tokenizer)
    bare = TextTokenizer(tokenizer.backend, None, tokenizer.eos_id)
    write(replace(loaded, tokenizer=bare), tmp_path, ExportSettings(as_="gguf"))
    field = gguf.GGUFReader(tmp_path / "model-f16.gguf").get_field
    assert field("tokenizer.ggml.bos_token_id") is None
    template = field("tokenizer.chat_template").contents()
    assert "bos_token" not in template
    chat = [Message("system", "Be short."), Message("user", "One?"), Message("assistant", "yes"), Message("user", "?")]
    text = jinja2.Template(template).render(messages=chat, bos_token="another", eos_token="</s>")
    assert text == "</s>".join([format_alpaca("Be short.", "One?", "yes"), format_alpaca("Be short.", "?")])


GO_AS_JINJA = {
    "{{- range .Messages }}": "{%- for message in messages %}",
    '{{- if eq .Role "user" }}': '{%- if message.role == "user" %}',
    '{{ else if eq .Role "assistant" }}': '{% elif message.role == "assistant" %}',
    "{{ if $.System }}": "{% if system %}", "{{ $.System }}": "{{ system }}", "{{ .Content }}": "{{ message.content }}",
    "{{ end }}": "{% endif %}", "{{- end }}\n{{- end }}": "{%- endif %}\n{%- endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("system", ["", "Be short."])
def test_the_modelfile_is_the_chat_template_in_ollamas_language(tokenizer, tmp_path, system):
    _, loaded = loaded_of(tokenizer)
    exported = write(loaded, tmp_path, ExportSettings(as_="gguf"))
    content = (tmp_path / "Modelfile").read_text()
    assert content.startswith("FROM ./model-f16.gguf\n")
    assert "ollama create my-model -f Modelfile" in exported.example
    theirs = re.search(r'^TEMPLATE """(.*?)"""$', content, re.DOTALL | re.MULTILINE)[1]
    for action, counterpart in GO_AS_JINJA.items():
        assert action in theirs
        theirs = theirs.replace(action, counterpart)
    chat = [Message("user", "One?"), Message("assistant", "yes"), Message("user", "Two\nlines?")]
    chat = [Message("system", system), *chat] if system else chat
    names = {"bos_token": tokenizer.beginning, "eos_token": tokenizer.ending}
    ours = jinja2.Template(chat_template(tokenizer)).render(messages=chat, **names)
    assert tokenizer.beginning + jinja2.Template(theirs).render(messages=chat, system=system) == ours


def test_the_documentation_shows_the_modelfile():
    page = (ROOT / "docs" / "using-a-model.md").read_text(encoding="utf-8")
    assert f"```\n{modelfile('model-q8_0.gguf', byte_tokenizer())}```\n" in page
    without_bos = TextTokenizer(byte_tokenizer().backend, None, EOS)
    assert "{{ .Content }}</s>\n" in modelfile("model-q8_0.gguf", without_bos)


@pytest.mark.parametrize("program", ["llama-completion", "llama-cli"])
def test_a_text_is_continued_without_the_chat_that_a_template_opens(program):
    page = (ROOT / "docs" / "using-a-model.md").read_text(encoding="utf-8")
    for line in (page + EXAMPLE).splitlines():
        if line.startswith(program):
            assert ("-no-cnv" in line) == (' -p "' in line)


def merged_by_score(text, fields):
    """Split `text` as llama.cpp's tokenizer `llama` does: the neighbours with the best score merge, leftmost first."""
    ids = {token: number for number, token in enumerate(fields.tokens)}
    symbols = list((" " * fields.add_space_prefix + text).replace(" ", "\u2581"))
    while True:
        neighbours = enumerate(itertools.pairwise(symbols))
        pairs = [(fields.scores[ids[a + b]], -i) for i, (a, b) in neighbours if a + b in ids]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    found = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


@pytest.mark.shared
def test_scores_merge_as_the_real_tokenizer_does(shared):
    tokenizer = load_tokenizer("--tokenizer", str(shared / "tokenizer"))
    fields = gguf_tokenizer(tokenizer, 32_003)
    assert (fields.model, fields.add_space_prefix, fields.unknown_id) == ("llama", True, 0)
    kinds = (TokenType.NORMAL, TokenType.CONTROL, TokenType.BYTE, TokenType.NORMAL)
    assert (fields.types[0], fields.types[1], fields.types[3], fields.types[259]) == kinds
    assert fields.tokens[-1] == "[PAD32002]"
    assert fields.types[-1] == TokenType.UNUSED
    samples = json.loads((shared / "data" / "alpaca" / "alpaca_data.json").read_text())
    texts = [format_alpaca(**sample)[:160] for sample in random.Random(0).sample(samples, 20)]
    texts += [f"a{' ' * n}b{' ' * (n // 2)}" for n in range(1, 40, 3)] + [
        "  x",
        "\n\n \n",
        "caf\u00e9 \u4f60\u597d \U0001f600",
        "</s>",
    ]
    for text in texts:
        assert merged_by_score(text, fields) == tokenizer.encode_text(text), text


@pytest.mark.shared
def test_the_real_tokenizer_in_its_form_for_chats(shared, tmp_path):
    tokenizer = load_tokenizer("--tokenizer", str(shared / "tokenizer"))
    save_chat_tokenizer(tokenizer, tmp_path, 2048)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("an <unk> text", "a  b\n", "<unk>"):
        assert theirs(text)["input_ids"] == tokenizer.encode_prompt(text)
    chat = [{"role": "user", "content": "Hi <unk>"}, {"role": "assistant", "content": "Ho."}]
    both = theirs.apply_chat_template(chat)["input_ids"]
    assert both == [*tokenizer.encode_prompt(format_alpaca("Hi <unk>", "", "Ho.")), tokenizer.eos_id]
    assert (theirs.pad_token, theirs.pad_token_id) == ("<0x00>", 3)


def refused(tokenizer):
    with pytest.raises(UserError, match=r"tokenizer that llama\.cpp knows"):
        gguf_tokenizer(tokenizer, 10)


def test_tokenizers_that_llama_cpp_does_not_know_are_refused():
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4, "\u2581": 5, "c": 6, "abc": 7, "bc": 8}

    def wrap(model, **parts):
        backend = Tokenizer(model)
        for name, part in parts.items():
            setattr(backend, name, part)
        return TextTokenizer(backend, 0, 1)

    bpe = {"vocab": vocabulary, "merges": [("a", "b")]}
    refused(wrap(models.WordLevel(vocabulary, unk_token="a")))
    refused(wrap(models.BPE(**bpe)))  # not byte-level
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert gguf_tokenizer(wrap(models.BPE(**bpe), pre_tokenizer=byte_level), 10).pre == "gpt-2"
    refused(wrap(models.BPE(**bpe), pre_tokenizer=byte_level, normalizer=normalizers.Lowercase()))
    refused(wrap(models.BPE(**bpe), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)))
    like_sentencepiece = {"normalizer": normalizers.Replace(" ", "\u2581"), "decoder": decoders.Replace("\u2581", " ")}

    def by_bytes(merges, vocabulary=vocabulary, parts=like_sentencepiece):
        return wrap(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True), **parts)

    all_pairs = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    fields = gguf_tokenizer(by_bytes(all_pairs), 10)
    assert (fields.model, fields.add_space_prefix, fields.scores[4]) == ("llama", False, 0.0)
    refused(by_bytes(all_pairs, parts={}))  # spaces stay as they are
    refused(by_bytes(all_pairs[:3]))  # llama.cpp would also merge a and bc
    refused(by_bytes([("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]))  # bc between two ways to abc


def test_what_does_not_fit_is_one_line(tokenizer, tmp_path, without_package):
    _, narrow = loaded_of(tokenizer, d_model=20)
    with pytest.raises(UserError, match=r"outtype.*q8_0; must be f32 or f16: the width 40 is not a multiple of 32"):
        write(narrow, tmp_path, ExportSettings(as_="gguf", outtype="q8_0"))
    write(narrow, tmp_path, ExportSettings(as_="gguf"))
    without_package("gguf", ImportError("no gguf"))
    with pytest.raises(UserError, match=r"needs the package gguf.*pip install 'indraquantum\[gguf\]'"):
        write(narrow, tmp_path, ExportSettings(as_="gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"bias": "none"}, {}, {"bias": "none", "num_key_value_heads": 1}], ids=str)
def test_llama_cpp_computes_the_same(tokenizer, tmp_path, options):
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp, a build of llama.cpp, is not installed")
    _, loaded = loaded_of(tokenizer, **options)
    write(loaded, tmp_path, ExportSettings(as_="gguf", outtype="f32"))
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(tmp_path / "model-f32.gguf")
    parameters.n_ctx, parameters.warmup, parameters.cpuparams.n_threads = 64, False, 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    # llama.cpp's flash attention, which is on by default, rounds to 16 bits: 0.003 in these logits.
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)

    def ask(path, **body):
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
        return json.loads(urllib.request.urlopen(request).read())

    ours, size, checked = loaded.inference_model, loaded.inference_model.config.vocab_size, 0
    for start in ("the cat sees a dog", "a", "my bird", "Who hears <s> it?", "The fish by the river ."):
        for text in (start, f"{start} {start}", f"{start}\n\n", f"{start} 12"):
            ids = tokenizer.encode_prompt(text)
            assert ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"] == ids
            expected = ours.logits(ours.hidden_states(torch.tensor([ids]))[0, -1], ours.lift_table())
            best = int(expected.argmax())
            if best == tokenizer.eos_id or not tokenizer.decode([best]).isascii():
                continue  # the server reports a token once its text is a whole character
            answer = ask("/completion", prompt=ids, n_predict=1, n_probs=size, temperature=-1)
            listed = answer["completion_probabilities"][0]["top_logprobs"]
            assert [each["id"] for each in listed[:5]] == expected.topk(5).indices.tolist()
            found = torch.tensor([each["logprob"] for each in listed[:50]])
            likely = expected[[each["id"] for each in listed[:50]]]
            torch.testing.assert_close(found - found[0], likely - likely[0], atol=1e-4, rtol=0)
            checked += 1
    assert checked >= 3
