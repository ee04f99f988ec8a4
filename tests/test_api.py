"""The package from Python: its names cost nothing to import, its functions return what they say, its errors are one
family and name arguments, and nothing is printed."""

from __future__ import annotations

import ast
import logging
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import indraquantum
from indraquantum import IndraError, InvalidInput, TrainingInterrupted, api, cli
from indraquantum.errors import UserError, options_named, worded

PACKAGE = Path(indraquantum.__file__).parent
RUN = {"threads": 1, "d_model": 8, "layers": 1, "heads": 2, "mlp_width": 12, "batch_tokens": 480, "device": "cpu"}


@pytest.fixture(autouse=True)
def _as_a_command():
    """In place of the suite's own: here messages and notes are as a program sees them."""


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    return indraquantum.train(
        data=world.data, signals=world.signals, output=folder / "run", logs=folder / "logs", max_steps=4, **RUN
    )


def test_importing_the_package_loads_nothing_large():
    code = "import sys, indraquantum; dir(indraquantum); print(sorted(sys.modules))"
    before, after = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for code in ("import sys, importlib.machinery, typing; print(sorted(sys.modules))", code)
    )
    loaded = set(ast.literal_eval(after)) - set(ast.literal_eval(before))
    assert {name.split(".")[0] for name in loaded} == {"indraquantum", "__future__"}


def test_every_name_is_there_and_editors_see_the_same():
    assert set(indraquantum.__all__) <= set(dir(indraquantum))
    for name in indraquantum.__all__:
        assert getattr(indraquantum, name).__name__ == name
    tree = ast.parse(Path(indraquantum.__file__).read_text(encoding="utf-8"))
    (seen,) = [
        node.body for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    assert {alias.asname: (node.module, alias.name) for node in seen for alias in node.names} == {
        name: (getattr(indraquantum, name).__module__, name) for name in indraquantum.__all__
    }
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = indraquantum.nothing


def test_train_load_generate_and_evaluate(world, trained, tmp_path, capsys):
    loaded = indraquantum.load(trained.checkpoint, device="cpu")
    assert loaded.aligned == {"magnitude", "phase"}
    written = indraquantum.generate(loaded, "the cat", max_new_tokens=5, seed=3)
    assert "".join(token.text for token in written.tokens) == written.text
    assert written == loaded.generate("the cat", max_new_tokens=5, seed=3)
    assert written == indraquantum.generate(trained.checkpoint, "the cat", max_new_tokens=5, seed=3)
    assert loaded.generate("the cat", show_state=False, max_new_tokens=5, seed=3).tokens == []
    found = indraquantum.evaluate(loaded, data=world.data)
    assert found.sources["all"].cross_entropy == pytest.approx(trained.held_out["all"], abs=1e-5)
    assert found.alignment.positions > 0  # the signals beside the data
    text = tmp_path / "text.txt"
    text.write_text("the cat sees a dog in the garden .\n")
    assert list(indraquantum.evaluate(trained.checkpoint, text=str(text), row_length=48).sources) == ["text", "all"]
    assert capsys.readouterr() == ("", "")


def test_an_exported_folder_loads_as_its_checkpoint(trained, tmp_path):
    with pytest.raises(SystemExit) as left:
        cli.main(["export", str(trained.checkpoint), str(tmp_path / "exported")])
    assert left.value.code == 0
    first, again = (indraquantum.load(path) for path in (trained.checkpoint, tmp_path / "exported"))
    assert first.aligned == again.aligned
    assert first.tokenizer.sha256 == again.tokenizer.sha256
    states = first.model.state_dict()
    assert states.keys() == again.inference_model.state_dict().keys()
    assert all(torch.equal(states[name], value) for name, value in again.inference_model.state_dict().items())
    assert isinstance(again.model, indraquantum.IndraQuantumPhase2)
    assert not again.model.training
    assert again.generate("a dog", max_new_tokens=4, temperature=0) == first.generate(
        "a dog", max_new_tokens=4, temperature=0
    )
    weights = tmp_path / "exported" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(InvalidInput, match=r"checkpoint: got .*model\.safetensors; is damaged"):
        indraquantum.load(tmp_path / "exported")


@pytest.mark.parametrize("form", ["transformers", "llama", "gguf"])
def test_an_export_prints_nothing(trained, tmp_path, capsys, form):
    logs = trained.checkpoint.parent.parent / "logs"
    indraquantum.export(trained.checkpoint, tmp_path / "model", logs=logs, as_=form)
    assert (tmp_path / "model" / "README.md").is_file()
    assert capsys.readouterr() == ("", "")


def test_prepare_and_capture_take_a_settings_object_too(world, tmp_path, capsys):
    settings = indraquantum.PrepareSettings(
        text=(str(world.wikitext),), wikitext_samples=0, alpaca_samples=0, tokenizer=str(world.tokenizer),
        max_length=48, output=tmp_path / "d.pkl",
    )  # fmt: skip
    prepared = indraquantum.prepare(settings)
    assert prepared.folder == tmp_path / "d"
    captured = indraquantum.capture(data=prepared.folder, teacher=str(world.teacher), output=tmp_path / "s", threads=1)
    assert captured.coverage == {"train": 1.0, "validation": 1.0}
    assert captured.positions_asked == prepared.tokens + prepared.validation_tokens
    assert capsys.readouterr() == ("", "")


def test_paths_of_pathlib_are_taken_everywhere(world, tmp_path):
    given = {"wikitext_samples": 0, "alpaca_samples": 0, "max_length": 48}
    texts = [world.wikitext, (world.wikitext,), str(world.wikitext), [str(world.wikitext)]]
    prepared = [
        indraquantum.prepare(text=text, tokenizer=Path(world.tokenizer), output=tmp_path / f"d{number}.pkl", **given)
        for number, text in enumerate(texts)
    ]
    assert len({report.pickle.read_bytes() for report in prepared}) == 1
    assert indraquantum.CaptureSettings(teacher=Path(world.teacher)).teacher == str(world.teacher)


def test_a_loaded_model_is_exported_from_its_file(trained, tmp_path):
    logs = trained.checkpoint.parent.parent / "logs"
    indraquantum.export(indraquantum.load(trained.checkpoint), tmp_path / "a", logs=logs)
    indraquantum.export(trained.checkpoint, tmp_path / "b", logs=logs)
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert found[0] == found[1]


def test_notes_go_to_the_logger(world, trained, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, logger="indraquantum")
    output = trained.checkpoint.parent
    data = shutil.copytree(world.data, tmp_path / "data" / "mixed")  # the reading is recorded beside it
    indraquantum.evaluate(trained.checkpoint, data=data, split="test")
    assert "The test split is read for the first time." in caplog.text
    assert indraquantum.train(
        data=world.data, signals=world.signals, output=output, logs=output.parent / "logs", max_steps=4, **RUN
    ).held_out == pytest.approx(trained.held_out)
    assert "This run is finished: 4 steps" in caplog.text
    assert capsys.readouterr() == ("", "")


WRONG = {
    "unknown": ("train", (), {"epoch": 3}, "epoch: got 3; there is no such setting; did you mean epochs?"),
    "range": ("train", (), {"epochs": 0}, "epochs: got 0; must be greater than or equal to 1"),
    "two words": ("train", (), {"micro_batch_tokens": 0}, "micro_batch_tokens: got 0; must"),
    "type": ("capture", (), {"draws": "many"}, "draws: got many; must be a valid integer"),
    "a validator": ("capture", (), {"batch_tokens": "some"}, "batch_tokens: got some; must be auto, or"),
    "no data": ("train", (), {"data": "nowhere"}, "data: got nowhere; "),
    "heads": ("train", (), {"data": "DATA", "heads": 3, "state_width": 8}, "heads: got 3; must divide the width"),
    "ends": ("train", (), {"data": "DATA", "projector": "none", "ends": "separate", "no_teacher": True},
             "ends: got separate; must be shared with `projector` none"),
    "muon": ("train", (), {"data": "DATA", "no_teacher": True, "optimizer": "adamw", "muon_rate": 3.0},
             "muon_rate: got 3.0; must be 1 without `optimizer` muon"),
    "weight": ("train", (), {"data": "DATA", "no_teacher": True, "phase_weight": 1.0},
               "phase_weight: got 1.0; must be left out with `no_teacher`"),
    "teacher": ("capture", (), {"data": "DATA", "teacher": "none/there.x/y"}, "give its folder with `teacher` FOLDER"),
    "start": ("train", (), {"data": "DATA", "no_teacher": True, "start_from": "x.pt"}, "start_from: got x.pt; "),
    "dry run": ("train", (), {"dry_run": True}, "dry_run: got True; must be left out"),
    "resume": ("train", (), {"data": "DATA", "no_teacher": True, "resume": "later"}, "resume: got later; must be auto"),
    "output": ("prepare", (), {"output": "rows.txt"}, "output: got rows.txt; must end in .pkl"),
    "samples": ("prepare", (), {"wikitext_samples": 0, "alpaca_samples": 0},
                "wikitext_samples: got 0; must be above 0 where `alpaca_samples` is 0"),
    "tokenizer": ("prepare", (), {"tokenizer": "no/where.json"}, "give it with `tokenizer` FOLDER"),
    "amount": ("prepare", (), {"text": ("a=0x",)}, "text: got a=0x; must be PATH"),
    "top_k": ("capture", (), {"data": "DATA", "teacher": "TEACHER", "kind": "topk", "top_k": 999},
              "top_k: got 999; must be at most the vocabulary's"),
    "served": ("capture", (), {"teacher": "http://127.0.0.1:9/v1"}, "kind: got sampled; must be topk"),
    "other signals": ("capture", (), {"data": "DATA", "teacher": "TEACHER", "output": "SIGNALS", "seed": 9},
                      "; give another `output`"),
    "checkpoint": ("load", ("nowhere.pt",), {}, "checkpoint: got nowhere.pt; must be a checkpoint"),
    "folder": ("load", ("DATA",), {}, "must be a checkpoint, or a folder that `indra export` wrote"),
    "weights": ("load", ("CHECKPOINT",), {"weights": "ema"}, "weights: got ema; must be last or auto"),
    "device": ("load", ("CHECKPOINT",), {"device": "tpu"}, "device: got tpu; must be 'auto'"),
    "no prompt": ("generate", ("CHECKPOINT",), {}, "give either `prompt` TEXT or `instruction` TEXT"),
    "long": ("generate", ("CHECKPOINT", "a"), {"max_new_tokens": 99_999}, "max_new_tokens: got 99999; must be at most"),
    "two splits": ("evaluate", ("CHECKPOINT",), {"text": "x", "split": "test"},
                   "split: got test; must be left out with `text`"),
    "json": ("evaluate", ("CHECKPOINT",), {"json_file": "x"}, "json_file: got x; must be left out"),
    "both": ("train", (indraquantum.TrainSettings(),), {"epochs": 3},
             "settings: got TrainSettings; must be given alone"),
    "another": ("train", (indraquantum.TestSettings(),), {}, "settings: got TestSettings; must be TrainSettings"),
    "no settings": ("prepare", ("notes.txt",), {}, "settings: got str; must be PrepareSettings; or give options"),
    "no model": ("evaluate", (None,), {"data": "DATA"}, "model: got NoneType; must be what `load` returns"),
    "no writer": ("generate", (None, "x"), {}, "model: got NoneType; must be what `load` returns, or the path"),
    "no checkpoint": ("load", (None,), {}, "checkpoint: got NoneType; must be a path"),
    "no folder": ("export", ("CHECKPOINT", None), {}, "folder: got NoneType; must be a path"),
    "two texts": ("evaluate", ("CHECKPOINT",), {"text": "x", "data": "DATA"}, "must be left out with `text`: one of"),
    "no rows": ("evaluate", ("CHECKPOINT",), {"data": "DATA", "row_length": 64}, "row_length: got 64; must be left"),
    "loaded": ("evaluate", ("LOADED",), {"weights": "ema"}, "weights: got ema; must be left out for a loaded model"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_names_the_argument(world, trained, tmp_path, monkeypatch, name):
    function, positional, options, said = WRONG[name]
    known = {
        "DATA": world.data, "TEACHER": str(world.teacher), "SIGNALS": world.signals, "CHECKPOINT": trained.checkpoint,
    }  # fmt: skip
    if "LOADED" in positional:
        known["LOADED"] = indraquantum.load(trained.checkpoint)
    positional = [known.get(value, value) if isinstance(value, str) else value for value in positional]
    options = {key: known.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
    if function == "train" and options.get("data") == world.data:
        options = {**RUN, "output": tmp_path / "run", "logs": tmp_path / "logs", **options}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput) as raised:
        getattr(indraquantum, function)(*positional, **options)
    assert said in str(raised.value)
    assert not options_in(str(raised.value))
    with options_named():
        assert str(raised.value).startswith((raised.value.field, "--"))


def options_in(message: str) -> list[str]:
    """The options of a command line that `message` names, outside of quoted commands."""
    return re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"`[^`]*`", "", message))


def messages() -> list[tuple[str, str]]:
    """Return every text in the package that names an option, with its place. Values in f-strings become {}."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = set()  # parts of an f-string, and docstrings
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                inside.add(node.value)
            if isinstance(node, ast.JoinedStr):
                inside.update(node.values)
                text = "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
                text = node.value
            else:
                continue
            if options_in(text):
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", text))
    return found


def test_no_message_names_an_option_to_python():
    found = messages()
    assert len(found) > 150
    left = [(place, worded(text)) for place, text in found if options_in(worded(text))]
    assert [place for place, _ in left if not place.startswith("ablation/blocks.py")] == []  # a rule of a table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("give another --output, or --no-teacher", "give another `output`, or `no_teacher`"),
        ("(--micro-batch-tokens: 3)", "(`micro_batch_tokens`: 3)"),
        ("run `indra teacher --data x`, then --teacher y", "run `indra teacher --data x`, then `teacher` y"),
        ("with `--log-to none`", "with `log_to none`"),
        ("a--b and -- and ---: stay", "a--b and -- and ---: stay"),
    ],
)
def test_options_become_arguments(text, expected):
    assert worded(text) == expected
    with options_named():
        assert worded(text) == text


def test_an_error_keeps_its_value_as_it_was():
    error = UserError("--start-from", "--no-teacher", "is no --option")
    assert str(error) == "start_from: got --no-teacher; is no `option`"
    with options_named():
        assert str(error) == "--start-from: got --no-teacher; is no --option"


def test_the_system_s_refusal_belongs_to_the_family(trained, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr("indraquantum.inference.load.load", full)
    with pytest.raises(
        InvalidInput, match="disk: got No space left on device; must be on a writable disk with free space"
    ):
        indraquantum.load(trained.checkpoint)


def test_minutes_are_refused_in_several_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInput, match=r"^minutes: got 5\.0; must be left out with several processes"):
        indraquantum.train(minutes=5)


def test_a_signal_ends_the_call_and_not_the_program(world, tmp_path, monkeypatch):
    import indraquantum.training.loop as loop

    take_step = loop.take_step

    def interrupted(run):
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
        return take_step(run)

    options = {**RUN, "data": world.data, "no_teacher": True, "output": tmp_path / "run", "logs": tmp_path / "logs"}
    monkeypatch.setattr(loop, "take_step", interrupted)
    with pytest.raises(TrainingInterrupted, match="by SIGINT; the same call with `resume` auto resumes it") as raised:
        indraquantum.train(**options, max_steps=5)
    assert isinstance(raised.value, IndraError)
    assert isinstance(raised.value, KeyboardInterrupt)
    monkeypatch.setattr(loop, "take_step", take_step)
    assert api.train(**options, max_steps=5).steps == 5
