"""`indra export`: what transformers reads is the checkpoint's model and tokenizer, to the bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.evaluation.write import load_model
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


@pytest.mark.slow
def test_a_fresh_process_needs_one_import(exported):
    code = (
        "import indraquantum.model.modeling; from transformers import AutoModelForCausalLM; "
        f"print(type(AutoModelForCausalLM.from_pretrained({str(exported[1])!r})).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "IndraQuantumPhase2"


def test_nothing_is_replaced_and_a_bad_checkpoint_is_one_line(exported, tmp_path, capsys, monkeypatch):
    checkpoint, folder = exported
    before = sorted(path.name for path in folder.iterdir())
    assert indra("export", checkpoint, folder) == 2
    assert "FOLDER: got" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before
    monkeypatch.chdir(tmp_path)
    assert indra("export", checkpoint, ".") == 2
    assert "FOLDER: got .; must not be the working folder" in capsys.readouterr().err
    assert indra("export", tmp_path / "nowhere.pt", tmp_path / "new") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new").exists()
