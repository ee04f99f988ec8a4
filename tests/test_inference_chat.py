"""The chat: the ids of each question, history that fits and that does not, pipes, and a terminal."""

import io
import os
import re
import subprocess
import sys
import types

import pytest
import torch

from indraquantum import cli
from indraquantum.config import ChatSettings
from indraquantum.data.prompt import format_alpaca
from indraquantum.errors import UserError
from indraquantum.inference import chat as chat_module
from indraquantum.inference.chat import Chat, Piece, colours, shaded
from indraquantum.inference.load import Loaded
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape
from indraquantum.training.checkpoint import Checkpoint, save_checkpoint
from small_model import make
from test_inference_decoder import byte_level

BOS, EOS, CONTEXT = 256, 257, 331


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    model = make(vocab_size=258, max_position_embeddings=CONTEXT)
    with torch.no_grad():
        model.head.scale_1.mul_(5)
        for layer in model.backbone.layers:
            layer.mlp.down_proj.weight.mul_(15)
        model.head.bias_V.fill_(-30.0)
        model.head.bias_V[64:90] = 0.0  # printable
    values = model.config.to_dict()
    plain = InferenceModel(ModelShape.from_values(values), model.state_dict())
    return Loaded(plain, byte_level(), values, frozenset({"magnitude"}), tmp_path_factory.mktemp("run") / "model.pt")


def settings(**values):
    return ChatSettings(**{"max_new_tokens": 11, "temperature": 0.0, **values})


def spied(chat, monkeypatch):
    """Note the ids that the model is given for each question."""
    given, begin = [], chat._decoder.begin
    monkeypatch.setattr(chat._decoder, "begin", lambda texts: given.extend(texts) or begin(texts))
    return given


def asked(chat, question):
    return "".join(piece.text for piece in chat.ask(question))


def test_an_answer_is_the_greedy_text_with_the_confidence_of_each_state(loaded):
    ids = loaded.tokenizer.encode_prompt(format_alpaca("Why?", ""))
    pieces = list(Chat(loaded, settings()).ask("Why?"))
    model = loaded.inference_model
    for piece in pieces:
        with torch.no_grad():
            states = model.hidden_states(torch.tensor([ids]))[0, -1]
            token = model.logits(states, model.lift_table()).argmax().item()
        assert piece.text == loaded.tokenizer.decode([token])
        assert piece.confidence == pytest.approx(model.amplitude(states).abs().item(), rel=1e-4)
        ids.append(token)
    assert len(pieces) == 11


def test_earlier_exchanges_come_before_as_documents_of_their_own(loaded, monkeypatch):
    chat, tokenizer = Chat(loaded, settings(history=1)), loaded.tokenizer
    given = spied(chat, monkeypatch)
    answers = [asked(chat, question) for question in "abc"]
    documents = [
        [*tokenizer.encode_prompt(format_alpaca(question, "") + answer), EOS]
        for question, answer in zip("abc", answers, strict=True)
    ]
    prompts = [tokenizer.encode_prompt(format_alpaca(question, "")) for question in "abc"]
    assert given == [prompts[0], documents[0] + prompts[1], documents[1] + prompts[2]]
    chat.reset()
    assert asked(chat, "b") == asked(Chat(loaded, settings()), "b")
    assert given[-1] == prompts[1]
    alone = Chat(loaded, settings(history=0))
    assert [asked(alone, "a"), asked(alone, "b")] == [answers[0], asked(Chat(loaded, settings()), "b")]


def test_what_does_not_fit_the_context_is_left_out_oldest_first(loaded, monkeypatch):
    chat = Chat(loaded, settings(history=9))
    given, forgotten = spied(chat, monkeypatch), []
    for number in range(9):
        asked(chat, f"question {number}")
        forgotten.append(chat.forgotten)
    assert max(map(len, given)) + 11 <= CONTEXT
    assert forgotten[:3] == [0, 0, 0]
    assert forgotten[-1] > 3
    text = loaded.tokenizer.decode(given[-1])
    kept = [number for number in range(9) if f"question {number}" in text]
    assert kept == list(range(forgotten[-1], 9))
    with pytest.raises(UserError, match=rf"question: got \d+ tokens; must be at most {CONTEXT - 1} tokens"):
        list(chat.ask("a" * CONTEXT))
    with pytest.raises(UserError, match="must be UTF-8"):
        list(chat.ask("\udcff"))
    assert asked(chat, "and now") != ""


def test_a_long_answer_ends_with_the_context(loaded):
    assert len(list(Chat(loaded, settings(max_new_tokens=1000)).ask("b"))) == CONTEXT - len(
        loaded.tokenizer.encode_prompt(format_alpaca("b", ""))
    )


def test_shades_rise_with_confidence_and_follow_the_terminal(loaded, monkeypatch):
    found = [shaded(Piece("x", confidence)) for confidence in (0.0, 0.19, 0.2, 0.5, 0.79, 0.8, 1.0, 7.0)]
    assert [found.index(each) for each in found] == [0, 0, 2, 3, 4, 5, 5, 5]
    assert re.sub(r"\x1b\[[\d;]*m", "", shaded(Piece("a\n\nb", 0.5))) == "a\n\nb"
    terminal, pipe = types.SimpleNamespace(isatty=lambda: True), io.StringIO()
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colours(loaded, terminal)
    assert not colours(loaded, pipe)
    assert not colours(Loaded(loaded.inference_model, loaded.tokenizer, {}, frozenset(), loaded.path), terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours(loaded, terminal)


@pytest.mark.parametrize(
    ("piped", "status", "error"),
    [(b"Why?\n", 0, ""), (b"a\r\nb\r\n", 0, ""), (b" \n", 2, "question: got nothing"), (b"\xff", 2, "must be UTF-8"),
     (b"a" * CONTEXT, 2, f"must be at most {CONTEXT - 1} tokens")],
)  # fmt: skip
def test_a_pipe_gets_the_answer_alone(loaded, monkeypatch, capsys, piped, status, error):
    monkeypatch.setattr(chat_module, "load", lambda *_: loaded)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped)))
    with pytest.raises(SystemExit) as left:
        cli.main(["chat", "model.pt", "--temperature", "0", "--max-new-tokens", "11"])
    out, err = capsys.readouterr()
    assert left.value.code == status
    assert error in err
    assert err.count("\n") == (status > 0)
    if not status:
        question = piped.decode().removesuffix("\n").removesuffix("\r")
        assert out == asked(Chat(loaded, settings()), question) + "\n"


def test_a_terminal_shows_colours_and_obeys_commands(loaded, tmp_path):
    """The command itself, with a real checkpoint and a terminal of its own."""
    path = tmp_path / "checkpoint_v4_epoch_1.pt"
    tokenizer = {"json": loaded.tokenizer.to_json(), "bos_id": BOS, "eos_id": EOS}
    stage = {"steps": 1, "weights": {"magnitude": 1.0}}
    save_checkpoint(path, Checkpoint(
        model_config=loaded.model_config, model=loaded.inference_model.state_dict(), average={}, optimizer={}, step=1,
        tokens=1, finished=True, pending=None, guard={}, best={}, loss_scale={}, settings={"stages": {"one": stage}},
        tokenizer=tokenizer,
    ))  # fmt: skip
    ours, theirs = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm-256color"}
    options = ["--temperature", "0", "--max-new-tokens", "11"]
    child = subprocess.Popen(
        [sys.executable, "-m", "indraquantum", "chat", str(path), *options],
        stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    for line in (b"Why?", b"/reset", b"/nonsense", b"a" * 400, b"and?", b"/quit", b""):
        while not shown.endswith(b"> ") and (part := read(ours)):
            shown += part
        os.write(ours, line + b"\n") if line else None
        shown += b"."
    assert child.wait() == 0
    os.close(ours)
    text = shown.decode()
    for part in ("Confidence:", "The chat is forgotten.", "There is no command /nonsense.", "question: got"):
        assert part in text
    answer = "".join(shaded(piece) for piece in Chat(loaded, settings()).ask("Why?"))
    assert answer.count("\x1b[38;5;") == 11
    assert answer in text


def test_a_line_that_is_not_text_is_one_line_and_the_chat_goes_on(loaded, monkeypatch, capsys):
    lines = iter([UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "unexpected end of data"), "Why?", EOFError()])

    def typed(_):
        if isinstance(line := next(lines), Exception):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    chat_module._talk(Chat(loaded, settings()), loaded)
    out, err = capsys.readouterr()
    assert err == "indra: error: question: got byte 0xe9 at 3; must be UTF-8 text\n"
    assert asked(Chat(loaded, settings()), "Why?") in out


def read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the child has closed it
        return b""
