"""The page of `indra export --as page`: what is in the folder, where its runtime comes from, and bad input."""

from __future__ import annotations

import json
import re
import shutil
import stat
from pathlib import Path

import pytest
import torch

from indraquantum import cli
from indraquantum.config import TrainSettings
from indraquantum.data.tokenizer import load_tokenizer
from indraquantum.errors import UserError
from indraquantum.files import damaged_file, read_sums
from indraquantum.inference import browser_runtime, export_page
from indraquantum.inference.export_llama import Agreement
from indraquantum.inference.load import Loaded, load
from indraquantum.training.loop import train
from page_world import pack_hollow
from tiny_tokenizer import save_tiny_tokenizer


def indra(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(argument) for argument in arguments])
    return exit_.value.code


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return train(
        TrainSettings(data=world.data, output=folder / "run", logs=folder / "logs", threads=1, d_model=17,
                      state_width=12, layers=1, heads=2, mlp_width=22, batch_tokens=480, max_steps=2)
    ).checkpoint  # fmt: skip


@pytest.fixture
def no_graph(monkeypatch):
    """Writing the graph takes seconds, and test_inference_onnx.py tests it."""
    monkeypatch.setattr(export_page, "write_graph", lambda model, file, quantised: file.write_bytes(bytes(5)))
    monkeypatch.setattr(export_page, "agreement", lambda model, file: Agreement(0.0, 0.0))


def export(checkpoint, folder, *options):
    return indra("export", checkpoint, folder, "--as", "page", *options)


def test_the_folder_has_all_that_the_page_needs(checkpoint, tmp_path, monkeypatch, no_graph, capsys):
    contents = pack_hollow(tmp_path / "npm", monkeypatch)
    page = tmp_path / "page"
    assert export(checkpoint, page, "--runtime", tmp_path / "npm") == 0
    assert "python -m http.server" in capsys.readouterr().out
    assert damaged_file(page, read_sums(page)) is None
    assert {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()} == {
        *read_sums(page), "SHA256SUMS",
    } == {
        "index.html", "page.css", "page.js", "page_worker.js", "state.css", "state.js", "icon.svg", "model.json",
        "model.onnx", "tokenizer.json", "README.md", "SHA256SUMS", "runtime/ort.js", "runtime/ort.wasm",
        "runtime/ort.LICENSE", "runtime/tokenizers.js", "runtime/tokenizers.LICENSE",
    }  # fmt: skip
    assert all((page / "runtime" / name).read_bytes() == content for name, content in contents.items())
    model, ours = json.loads((page / "model.json").read_text()), load(checkpoint, torch.device("cpu"))
    about = {"bytes": 5, "layers": 1, "heads": 2, "head_dim": 12, "vocabulary": 320, "bos": 0, "eos": 1}
    assert model.items() >= about.items()
    assert (model["control"], model["names"]) == ([0, 1], {"0": "<s>", "1": "</s>"})
    assert model["aligned"] == sorted(ours.aligned) == ["magnitude", "phase"]
    tokenizer = json.loads((page / "tokenizer.json").read_text())
    assert tokenizer["added_tokens"] == []  # so that "</s>" in a prompt stays text
    assert tokenizer["model"]["merges"] == json.loads(ours.tokenizer.to_json())["model"]["merges"]


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_text(checkpoint, tmp_path, monkeypatch, no_graph, capsys):
    pack_hollow(tmp_path / "npm", monkeypatch)
    page = tmp_path / "page"
    assert export(checkpoint, page, "--runtime", tmp_path / "npm") == 0
    assert f"--directory {page}` shows it" in capsys.readouterr().out
    html = (page / "index.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["connect-src"] == rules["worker-src"] == rules["style-src"] == "'self'"
    assert rules["script-src"] == "'self' 'wasm-unsafe-eval'"
    assert not re.search(r"<script(?! src)|\son\w+=|\sstyle=|<style", html)  # the policy would refuse it
    for name in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert (page / name).is_file()
    for path in [path for path in page.iterdir() if path.suffix in (".html", ".js", ".css", ".svg")]:
        text = path.read_text()
        assert set(re.findall(r"https?://[^\s\"'`]*", text)) <= {"http://www.w3.org/2000/svg"}, path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Return `npm(script)`: this shell script is then npm, and the cache is empty."""
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()

    def put(script: str | None) -> None:
        path = tmp_path / "bin" / "npm"
        path.unlink(missing_ok=True)
        if script is not None:
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin" if script else str(tmp_path / "bin"))

    return put


def test_npm_downloads_once_into_the_cache(checkpoint, tmp_path, monkeypatch, no_graph, npm):
    pack_hollow(tmp_path / "npm", monkeypatch)
    npm(f'cp {tmp_path}/npm/*.tgz "$6" && echo "$2" >> {tmp_path}/asked')
    assert export(checkpoint, tmp_path / "page") == 0
    wanted = [f"{package.name}@{package.version}" for package in browser_runtime.PACKAGES]
    assert (tmp_path / "asked").read_text().split() == wanted
    npm(None)
    assert export(checkpoint, tmp_path / "again") == 0
    assert (tmp_path / "again" / "runtime" / "ort.js").read_bytes() == b"the content of ort.js"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "needs npm, which is not installed, to download onnxruntime-web@1.30.0; or give --runtime FOLDER with "),
        ("echo npm error; echo 'code E404' >&2; exit 1", "but npm failed (code E404); give --runtime FOLDER with "),
        ("exit 0", "but npm failed ("),
        ('echo other > "$6/onnxruntime-web-1.30.0.tgz"', "but npm gave another file; give --runtime FOLDER with "),
    ],
)
def test_npm_that_fails_is_one_line(checkpoint, tmp_path, npm, capsys, script, said):
    npm(script)
    assert export(checkpoint, tmp_path / "page") == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1
    assert error[0].startswith("indra: error: --as: got page; needs ")
    assert said in error[0]
    assert not (tmp_path / "page").exists()


def test_a_runtime_that_is_missing_or_damaged_is_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    pack_hollow(tmp_path / "npm", monkeypatch)
    assert export(checkpoint, tmp_path / "page", "--runtime", tmp_path / "nowhere") == 2
    error = capsys.readouterr().err
    assert "must be a folder with onnxruntime-web-1.30.0.tgz and huggingface-tokenizers-0.2.0.tgz" in error
    assert error.count("\n") == 1
    damaged = tmp_path / "npm" / "huggingface-tokenizers-0.2.0.tgz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert export(checkpoint, tmp_path / "page", "--runtime", tmp_path / "npm") == 2
    error = capsys.readouterr().err
    assert f"--runtime: got {damaged}; is damaged or another version" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "page").exists()


def test_a_format_of_gguf_is_refused(checkpoint, tmp_path, capsys):
    assert export(checkpoint, tmp_path / "page", "--outtype", "q8_0") == 2
    assert "--outtype: got q8_0; must be int8 or f32 for --as page" in capsys.readouterr().err


def test_a_tokenizer_that_browsers_do_not_know_is_refused(tmp_path, world):
    loaded = Loaded(None, load_tokenizer("--tokenizer", str(save_tiny_tokenizer(tmp_path))), {}, None, Path())
    with pytest.raises(UserError, match=r"as: got page; must be another form: .* tokenizer's model WordLevel"):
        export_page.browser_tokenizer(loaded)
    description = json.loads((world.tokenizer / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"String": "x"}, "behavior": "MergedWithNext", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [split, description["pre_tokenizer"]]}
    folder = shutil.copytree(world.tokenizer, tmp_path / "other")
    (folder / "tokenizer.json").write_text(json.dumps(description | {"pre_tokenizer": steps}))
    other = load_tokenizer("--tokenizer", str(folder))
    with pytest.raises(UserError, match="tokenizer's pre tokenizer Split with MergedWithNext"):
        export_page.browser_tokenizer(Loaded(None, other, {}, None, Path()))
