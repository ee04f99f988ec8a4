"""`indra export`: what transformers reads is the checkpoint's model and tokenizer, to the bit."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import survival
from indraquantum import cli, evaluate
from indraquantum.config import ALPACA, WIKITEXT, ExportSettings, TrainSettings
from indraquantum.data.python_manual import write_manual_corpus
from indraquantum.errors import UserError
from indraquantum.files import combined_sha256
from indraquantum.inference import load as load_module
from indraquantum.inference import model_card as card_module
from indraquantum.inference.export import export_checkpoint
from indraquantum.inference.load import load, load_model
from indraquantum.inference.model_card import Exported, RunFacts, model_card
from indraquantum.model.inference_model import InferenceModel
from indraquantum.monitor.runs import summarise
from indraquantum.training.checkpoint import load_checkpoint, save_checkpoint
from indraquantum.training.loop import train

TEXTS = ["the cat sees a dog", "", "Who hears my bird?", " at  night\n\n"]


def indra(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture(scope="module", params=["quantum", "none"])
def exported(request, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    widths = {"d_model": 12} if request.param == "none" else {"d_model": 20, "state_width": 12}
    settings = TrainSettings(
        data=world.data, output=folder / "run", logs=folder / "logs", threads=1, projector=request.param, **widths,
        layers=1, heads=2, mlp_width=22, batch_tokens=480, max_steps=3, bias_start="zeros", table_start="normal",
    )  # fmt: skip
    checkpoint = train(settings).checkpoint
    assert indra("export", checkpoint, folder / "new" / "model") == 0
    return checkpoint, folder / "new" / "model"


def test_transformers_reads_the_same_model(exported):
    from transformers import AutoModelForCausalLM

    checkpoint, folder = exported
    model, tokenizer = load_model(checkpoint, torch.device("cpu"))
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    ids = torch.tensor([tokenizer.encode_prompt(TEXTS[0])])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    written = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (model, again)]
    assert torch.equal(*written)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_its_tokenizer_gives_the_ids_of_training(exported, text):
    from transformers import AutoTokenizer

    checkpoint, folder = exported
    _, tokenizer = load_model(checkpoint, torch.device("cpu"))
    again = AutoTokenizer.from_pretrained(folder)
    assert again(text)["input_ids"] == tokenizer.encode_prompt(text)
    assert again.decode(tokenizer.encode_prompt(text), skip_special_tokens=True) == text
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    spelled = f"{text} <s> {text} </s>"
    assert again(spelled, split_special_tokens=True)["input_ids"] == tokenizer.encode_prompt(spelled)


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_pipeline_writes_for_a_batch_what_it_writes_for_each(exported, monkeypatch):
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    write = pipeline("text-generation", model=str(exported[1]), tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        write.model.head.scale_1.mul_(20)  # choices far from rounding
    options = {"max_new_tokens": 7, "do_sample": False, "return_full_text": False}
    texts = ["the cat sees a dog", "my bird", "the old mouse follows the fish by the river"]
    batch = [written[0]["generated_text"] for written in write(texts, batch_size=3, **options)]
    assert len(set(batch)) == 3
    ids_by_text = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    for ids, found in zip(ids_by_text, batch, strict=True):
        start = ids.shape[1]
        for _ in range(7):
            with torch.no_grad():
                ids = torch.cat([ids, write.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert found == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_trainer_with_the_usual_collator_learns_the_next_token(exported, tmp_path):
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    model, tokenizer = (each.from_pretrained(exported[1]) for each in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.padding_side = "right"  # on the left, padding would be taught to be followed by BOS, as in a Llama
    texts = [
        "the cat sees a dog in the garden .",
        "my bird likes the fish .",
        "one horse",
        "a dog finds my bird at night .",
    ]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=40, learning_rate=1e-2,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=Dataset.from_list([{"input_ids": ids} for ids in rows]),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip

    def loss_and_copies():
        with torch.no_grad():
            logits = [model.eval()(torch.tensor([ids])).logits[0] for ids in rows]
        pairs = list(zip(logits, map(torch.tensor, rows), strict=True))
        losses = torch.cat([F.cross_entropy(z[:-1], ids[1:], reduction="none") for z, ids in pairs])
        return losses.mean().item(), torch.cat([z.argmax(-1) == ids for z, ids in pairs]).float().mean().item()

    before, _ = loss_and_copies()
    trainer.train()
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    after, copies = loss_and_copies()
    assert logged[0] == pytest.approx(before, rel=1e-3)
    assert after < before - 2
    assert copies < 0.2


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_nothing_is_replaced_and_a_bad_checkpoint_is_one_line(exported, tmp_path, capsys, monkeypatch):
    checkpoint, folder = exported
    before = sorted(path.name for path in folder.iterdir())
    assert indra("export", checkpoint, folder) == 2
    assert "FOLDER: got" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before
    monkeypatch.chdir(tmp_path)
    assert indra("export", checkpoint, ".") == 2
    assert "FOLDER: got .; must not be the current folder, which is replaced as a whole" in capsys.readouterr().err
    assert indra("export", tmp_path / "nowhere.pt", tmp_path / "new") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()


ALONE = """
import sys
sys.modules["indraquantum"] = None  # cannot be imported
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

folder, out = sys.argv[1:]
asked = torch.load(f"{out}/asked.pt")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
ids = asked["ids"]
with torch.no_grad():
    output = model(ids)
answer = {"logits": output.logits, "magnitude": output.magnitude, "phase": output.phase}
answer["written"] = model.generate(ids[:1], do_sample=False, max_new_tokens=5)
answer["chat"] = tokenizer.apply_chat_template(asked["chat"], add_generation_prompt=True)["input_ids"]
answer["length"] = tokenizer.model_max_length
batch = tokenizer(["the cat", "a dog sees the fish"], padding=True)
answer["mask"] = batch["attention_mask"]
answer["pad"] = (tokenizer.pad_token_id, model.config.pad_token_id, model.generation_config.pad_token_id)
model.train()
loss = model(ids, labels=ids).loss
loss.backward()
answer["loss"] = loss.detach()
answer["gradients"] = {name: parameter.grad for name, parameter in model.named_parameters()}
model.resize_token_embeddings(model.config.vocab_size + 3)
model.save_pretrained(f"{out}/again")
again = AutoModelForCausalLM.from_pretrained(f"{out}/again", trust_remote_code=True)
with torch.no_grad():
    answer["grown"] = again(ids).logits[..., :-3]
try:
    model(ids, labels=ids, signals={})
except ValueError as error:
    answer["refused"] = str(error)
torch.save(answer, f"{out}/answer.pt")
"""


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_it_loads_without_this_package_and_gives_the_same_bits(exported, tmp_path):
    checkpoint, folder = exported
    model, tokenizer = load_model(checkpoint, torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode_prompt("the cat sees a dog"), tokenizer.encode_prompt("a dog hears a cat")])
    chat = [{"role": "system", "content": "Say it."}, {"role": "user", "content": "a cat"}]
    torch.save({"ids": ids, "chat": chat}, tmp_path / "asked.pt")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", ALONE, folder, tmp_path], check=True, env=environment
    )
    answer = torch.load(tmp_path / "answer.pt")
    with torch.no_grad():
        ours = model(ids)
    assert torch.equal(answer["logits"], ours.logits)
    assert torch.equal(answer["magnitude"], ours.magnitude)
    assert torch.equal(answer["phase"], ours.phase)
    assert torch.equal(answer["written"], model.generate(ids[:1], do_sample=False, max_new_tokens=5))
    assert torch.equal(answer["grown"], ours.logits)
    asked = "### Instruction:\nSay it.\n\n### Input:\na cat\n\n### Response:\n"
    assert answer["chat"] == tokenizer.encode_prompt(asked)
    assert answer["length"] == 2048
    assert answer["mask"][0][0] == 0  # padding on the left
    assert answer["mask"][1] == [1] * len(answer["mask"][1])
    assert len(set(answer["pad"])) == 1
    assert answer["pad"][0] is not None
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(answer["loss"], loss.detach())
    for name, parameter in model.named_parameters():
        given = answer["gradients"][name]
        assert (given is None) == (parameter.grad is None), name
        if given is not None:
            torch.testing.assert_close(given, parameter.grad, msg=name)
    assert "need the package indraquantum" in answer["refused"]


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_its_code_is_one_readable_file(exported):
    code = exported[1] / "modeling_indraquantum.py"
    text = code.read_text()
    assert not re.search(r"^\s*(from|import) indraquantum", text, re.MULTILINE)
    config = Path(__file__).resolve().parent.parent / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, "-q", "--config", config, code], check=True)
    tree = ast.parse(text)
    defined = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert len(set(defined)) == len(defined)
    imported = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(set(imported)) == len(imported)


def test_the_class_of_this_package_goes_before_the_code_of_the_folder(exported, monkeypatch, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from indraquantum.model import IndraQuantumConfig, IndraQuantumPhase2

    for trust in (None, True):
        model = AutoModelForCausalLM.from_pretrained(exported[1], trust_remote_code=trust)
        assert type(model) is IndraQuantumPhase2
        assert type(AutoConfig.from_pretrained(exported[1], trust_remote_code=trust)) is IndraQuantumConfig
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())  # its code is not there


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_the_card_says_where_the_model_comes_from(world, exported, tmp_path, capsys):
    checkpoint, folder = exported
    unknown = (folder / "README.md").read_text()
    assert "does not know its data, its teacher and its figures: the records" in unknown
    assert indra("export", checkpoint, tmp_path / "model", "--logs", checkpoint.parent.parent / "logs") == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "does not know" not in card
    held_out = summarise(checkpoint.parent.parent / "logs" / "run" / "metrics.jsonl", tmp_path.parent).last_held_out
    for part in [
        'license: "cc-by-nc-4.0"', "non-commercial", "Steps: 3", str(world.teacher), "CC BY-SA", "@software",
        f"| alpaca | {held_out['alpaca']:.3f} |", "rows of 48 tokens", "phase",
        "1 layers of width 24, 320 tokens with embeddings of width 20, projector quantum",
    ]:  # fmt: skip
        assert part in card, part


def test_the_card_has_the_figures_of_its_own_checkpoint(world, tmp_path):
    settings = TrainSettings(
        data=world.data, output=tmp_path / "run", logs=tmp_path / "logs", threads=1, d_model=16, layers=1, heads=2,
        batch_tokens=480, max_steps=6, evaluate_every=2, save_every=3, learning_rate=0.05,
        ema_decay=0.5,
    )  # fmt: skip
    train(settings)
    figures = {}
    for name in ("step_3", "epoch_1"):
        path = tmp_path / "run" / f"checkpoint_v4_{name}.pt"
        assert indra("export", path, tmp_path / name, "--logs", tmp_path / "logs") == 0
        figures[name] = (tmp_path / name / "README.md").read_text().split("Cross-entropy of held-out text")[1]
    measured = evaluate(load(path, torch.device("cpu")), data=world.data).sources
    assert figures["epoch_1"].startswith(":\n")
    for name, source in measured.items():
        assert f"| {name} | {source.cross_entropy:.3f} |" in figures["epoch_1"]
    lines = map(json.loads, (tmp_path / "logs" / "run" / "metrics.jsonl").read_text().splitlines())
    held_out = {line["step"]: line["held_out"] for line in lines if line["held_out"]}
    assert figures["step_3"].startswith(" at step 2, before this model's step 3:\n")
    assert f"| all | {held_out[2]['all']:.3f} |" in figures["step_3"]
    assert f"{held_out[2]['all']:.3f}" != f"{held_out[6]['all']:.3f}"
    # The figures are those of the moving average.
    assert indra("export", path, tmp_path / "last", "--logs", tmp_path / "logs", "--weights", "last") == 0
    assert "Not recorded here." in (tmp_path / "last" / "README.md").read_text()


def card_of(path, **settings) -> str:
    """The card of the checkpoint at `path` with changed settings."""
    checkpoint = load_checkpoint("CHECKPOINT", path)
    facts = RunFacts.find(
        path, replace(checkpoint, settings=checkpoint.settings | settings), path.parent.parent / "logs"
    )
    return model_card("model", load(path, torch.device("cpu")), facts, Exported("", ""))


OTHER = combined_sha256(["other"])
WARM = {"warm": {"data": OTHER, "signals": OTHER}}


@pytest.mark.parametrize(
    ("settings", "licence", "parts"),
    [
        ({}, "other", ["- wikitext: "]),
        ({"start_from": OTHER}, "cc-by-nc-4.0", [
            "- Not recorded here: the data of the weights that it started from. Ask ",
            "- It started from other weights, whose training is not recorded here.",
        ]),
        ({"stages": WARM}, "cc-by-nc-4.0", ["- wikitext: ", "- Not recorded here: the data of stage warm. Ask "]),
    ],
    ids=["own data", "other weights", "other data"],
)  # fmt: skip
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_data_that_no_record_names_may_not_be_used_commercially(exported, monkeypatch, settings, licence, parts):
    manifest = {"sources": [{"name": "wikitext"}], "options": {}}  # without Alpaca
    monkeypatch.setattr(card_module, "_manifest", lambda *_: manifest)
    card = card_of(exported[0], **settings)
    for part in [f'license: "{licence}"', *parts]:
        assert part in card, part
    assert ("Not recorded here" in card) == ("non-commercial" in card) == (licence != "other")


@pytest.mark.parametrize(
    ("sources", "options", "settings", "is_known"),
    [
        (["wikitext", "alpaca"], {}, {}, True),
        (["wikitext"], {}, {}, True),
        (["wikitext", "alpaca"], {"alpaca": "alpaca_fr.json"}, {}, False),
        (["wikitext", "briefe"], {}, {}, False),
        (["wikitext"], {}, {"start_from": OTHER}, False),
    ],
)
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_the_card_names_the_language_of_known_data_alone(exported, monkeypatch, sources, options, settings, is_known):
    manifest = {
        "sources": [{"name": name} for name in sources],
        "options": {"wikitext": WIKITEXT, "alpaca": ALPACA} | options,
    }
    monkeypatch.setattr(card_module, "_manifest", lambda *_: manifest)
    card = card_of(exported[0], **settings)
    assert ('\nlanguage: ["en"]\n' in card) == is_known
    assert ("tatsu-lab/alpaca" in card) == ("alpaca" in sources and not options)


OF_WIKITEXT = "WikiText-103, from Wikipedia: CC BY-SA 3.0 and GFDL."
NOT_COMMERCIAL = "CC BY-NC 4.0, so for non-commercial use only."
OF_MANUAL = "Python's manual and docstrings: PSF licence."
GIVEN = "Given as a file or an address with --"


@pytest.mark.parametrize(
    ("text", "questions", "is_manual"),
    [
        ("/a/manual.txt", "/a/questions.json", True),
        ("/a/manual.txt", "/b/questions.json", False),
        ("/a/manual.txt", "/a/others.json", False),
    ],
)
def test_the_manual_is_two_files_in_one_folder(text, questions, is_manual):
    facts = RunFacts(1, 1, {}, options={"wikitext": text, "alpaca": questions})
    assert facts.is_manual == is_manual
    assert facts.may_be("wikitext", "wikitext") != is_manual


@pytest.mark.parametrize(
    ("options", "licences", "is_free"),
    [
        ({}, {"wikitext": OF_WIKITEXT}, True),
        ({"wikitext": f"{WIKITEXT}@main"}, {"wikitext": OF_WIKITEXT}, True),
        ({}, {"alpaca": f"Stanford Alpaca, written by OpenAI's text-davinci-003: {NOT_COMMERCIAL}"}, False),
        (None, {"wikitext": OF_MANUAL, "alpaca": OF_MANUAL}, True),
        (None,
         {"wikitext": OF_MANUAL, "alpaca_fr": f"If it is Stanford Alpaca, its licence is {NOT_COMMERCIAL}"}, False),
        ({"wikitext": "a.txt"},
         {"wikitext": f"{GIVEN}wikitext. If it is WikiText-103, its licence is CC BY-SA 3.0 and GFDL."}, True),
        ({"alpaca": "a.json"},
         {"alpaca": f"{GIVEN}alpaca. If it is Stanford Alpaca, its licence is {NOT_COMMERCIAL}"}, False),
        ({}, {"python": "Its licence is the one of that text."}, True),
    ],
    ids=["WikiText", "of a revision", "Alpaca", "manual", "manual and Alpaca", "a text", "instructions", "other text"],
)  # fmt: skip
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_the_card_names_the_licence_of_what_a_source_is_not_of_what_it_is_called(
    exported, monkeypatch, tmp_path, options, licences, is_free
):
    if options is None:
        corpus = write_manual_corpus(tmp_path, limit=2)
        options = {"wikitext": str(corpus.text), "alpaca": str(corpus.instructions)}
    manifest = {
        "sources": [{"name": name} for name in licences],
        "options": {"wikitext": WIKITEXT, "alpaca": ALPACA} | options,
    }
    monkeypatch.setattr(card_module, "_manifest", lambda *_: manifest)
    card = card_of(exported[0])
    assert dict(re.findall(r"^- (\w+): 0 documents, 0 tokens\. (.*)$", card, re.MULTILINE)) == licences
    assert f'license: "{"other" if is_free else "cc-by-nc-4.0"}"' in card
    assert ("**non-commercial**" in card) != is_free


def test_a_pickle_as_the_data_may_not_be_used_commercially():
    facts = RunFacts(1, 1, {}, held_out={"all": 2.0, "pickle": 2.0})
    assert facts.source_names == ()
    assert facts.non_commercial


@pytest.mark.parametrize(
    "settings", [{"signals": OTHER}, {"stages": WARM}, {"signals": None, "stages": WARM}],
    ids=["captured again", "of a stage too", "of a stage"],
)  # fmt: skip
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_teacher_whose_signals_are_not_there_is_not_named(world, exported, settings):
    known = f"- Teacher: {world.teacher}, asked once"
    assert known in card_of(exported[0])
    card = card_of(exported[0], **settings)
    assert known not in card
    assert "- Teacher: not recorded here." in card
    assert "does not know its teacher: " in card
    assert "- Teacher: none, cross-entropy alone." in card_of(exported[0], signals=None)


@pytest.mark.parametrize("tokenizer", [{}, {"json": "{}", "bos_id": 0, "eos_id": 1}])
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_checkpoint_without_a_tokenizer_is_one_line(exported, tmp_path, capsys, tokenizer):
    whole = load_checkpoint("CHECKPOINT", exported[0])
    save_checkpoint(tmp_path / "bare.pt", replace(whole, tokenizer=tokenizer))
    assert indra("export", tmp_path / "bare.pt", tmp_path / "new") == 2
    said = capsys.readouterr().err
    assert "bare.pt; must hold the tokenizer that it was trained with" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_folder_of_another_model_is_one_line(exported, tmp_path, capsys):
    assert indra("export", exported[0], tmp_path / "llama", "--as", "llama") == 0
    capsys.readouterr()
    for command in (["test", "--prompt", "a"], ["eval"]):
        assert indra(command[0], tmp_path / "llama", *command[1:]) == 2
        said = capsys.readouterr().err
        assert "must be a checkpoint, or a folder that `indra export` wrote as transformers" in said
        assert said.count("\n") == 1
    assert indra("export", tmp_path / "llama", tmp_path / "new") == 2
    assert "must be a checkpoint, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_folder_in_16_bits_is_read_in_float32(exported, tmp_path, kind):
    from indraquantum.model import IndraQuantumPhase2

    IndraQuantumPhase2.from_pretrained(exported[1]).to(kind).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported[1] / name, tmp_path)
    loaded, rounded = load(tmp_path, torch.device("cpu")), load(exported[1], torch.device("cpu"))
    for parameter in rounded.inference_model.parameters():
        parameter.data = parameter.to(kind).float()
    assert loaded.generate("the cat", max_new_tokens=5) == rounded.generate("the cat", max_new_tokens=5)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_device_without_room_for_the_model_is_one_line(exported, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(InferenceModel, "to", full)
    for path in exported:
        with pytest.raises(UserError, match=rf"^--device: got cuda; must have free memory for the model in {path};"):
            load(path, torch.device("cuda"))


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_weights_that_torch_refuses_in_one_line_are_one_line(exported, monkeypatch):
    def refuse(*_):
        raise RuntimeError("of a single line")

    monkeypatch.setattr(load_module, "InferenceModel", refuse)
    with pytest.raises(UserError, match=r"must hold weights that fit its own settings \(of a single line\)$"):
        load(exported[0], torch.device("cpu"))


@pytest.mark.parametrize("form", ["transformers", "llama"])
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_full_disk_is_one_line(exported, tmp_path, form):
    def limited():
        survival.fill_disk()
        export_checkpoint(exported[0], tmp_path / "new" / "model", ExportSettings(as_=form))

    assert survival.in_fork(limited, tmp_path / "said") == 2
    lines = (tmp_path / "said").read_text().splitlines()
    assert lines[-1].endswith("new/model: got File too large; must be on a writable disk with free space")
    assert not list((tmp_path / "new").iterdir())


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_sums_are_those_of_sha256sum(exported):
    _, folder = exported
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del expected["SHA256SUMS"]
    assert {line[66:]: line[:64] for line in lines} == expected
    assert {line[64:66] for line in lines} == {"  "}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_flipped_bit_of_an_exported_model_is_told(exported, tmp_path, name):
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(exported[1], tmp_path / "copy")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("0.0", "0.1", 1))
    if name != "config.json":
        (folder / "config.json").write_text(config)
        flip(folder / name)
    with pytest.raises(OSError, match=rf"{name} is damaged: its SHA-256 is not the one in SHA256SUMS"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "SHA256SUMS").unlink()
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("exported", ["quantum"], indirect=True)
def test_a_model_saved_in_its_place_is_no_damage(exported, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(exported[1], tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.bias_V.add_(1)
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.bias_V, model.bias_V)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_teacher_is_refused(world, tmp_path, capsys, name):
    folder = shutil.copytree(world.teacher, tmp_path / "teacher")
    if name == "config.json":
        (folder / name).write_text((folder / name).read_text().replace("1e-0", "1e-1", 1))
        assert (folder / name).read_bytes() != (world.teacher / name).read_bytes()
    else:
        flip(folder / name)
    assert indra("capture", "--data", world.data, "--teacher", folder, "--output", tmp_path / "signals") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{name}; is damaged: its SHA-256 is not the one in SHA256SUMS" in said
    assert not (tmp_path / "signals").exists()
