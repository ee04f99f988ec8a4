"""`indra export`: what transformers reads is the checkpoint's model and tokenizer, to the bit."""

from __future__ import annotations

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
