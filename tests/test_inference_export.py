"""`indra export`: what transformers reads is the checkpoint's model and tokenizer, to the bit."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
import torch.nn.functional as F

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.inference.load import load_model
from indraquantum.training.loop import train

TEXTS = ["the cat sees a dog", "", "Who <s> hears </s> my bird?", " at  night\n\n"]


def indra(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture(scope="module", params=["quantum", "none"])
def exported(request, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    settings = TrainSettings(
        data=world.data, output=folder / "run", logs=folder / "logs", threads=1, projector=request.param, d_model=12,
        layers=1, heads=2, mlp_width=22, batch_tokens=480, max_steps=3,
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
def test_its_tokenizer_gives_the_ids_of_training(exported, text):
    from transformers import AutoTokenizer

    checkpoint, folder = exported
    _, tokenizer = load_model(checkpoint, torch.device("cpu"))
    again = AutoTokenizer.from_pretrained(folder)
    assert again(text)["input_ids"] == tokenizer.encode_prompt(text)
    assert again.decode(tokenizer.encode_prompt(text), skip_special_tokens=True) == text
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_a_pipeline_writes_for_a_batch_what_it_writes_for_each(exported, monkeypatch):
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(exported[1])
    tokenizer.pad_token = tokenizer.eos_token  # as for a Llama
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
    tokenizer.pad_token = tokenizer.eos_token
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


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_sums_are_those_of_sha256sum(exported):
    _, folder = exported
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del expected["SHA256SUMS"]
    assert {line[66:]: line[:64] for line in lines} == expected
    assert {line[64:66] for line in lines} == {"  "}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
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
