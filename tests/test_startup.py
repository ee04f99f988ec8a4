"""Commands load what they need and no more. Modules are counted, never seconds."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models

from indraquantum.model import IndraQuantumConfig, IndraQuantumPhase2
from indraquantum.training.checkpoint import Checkpoint, save_checkpoint

# Each takes a tenth of a second to some seconds to import.
HEAVY = {
    "torch",
    "numpy",
    "pyarrow",
    "matplotlib",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "sklearn",
    "scipy",
    "pandas",
    "sympy",
    "httpx2",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "tokenizers",
}
# A hundredth of a second each, which is a lot for a list of runs or a help text.
LIGHTER = {"wrapt", "asyncio", "tqdm", "yaml"}  # fmt: skip
# Runs the commands, lists of arguments, one after the other and prints what was imported in the end.
PROGRAM = """
import contextlib, io, json, sys
from indraquantum.cli import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            main(arguments)
        except SystemExit as left:
            assert left.code == 0, (arguments, left.code)
print(json.dumps(list(sys.modules)))
"""


def heavy_imports_of(*commands, also=frozenset()):
    command = [sys.executable, "-c", PROGRAM, json.dumps([list(map(str, arguments)) for arguments in commands])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return (HEAVY | also) & set(json.loads(result.stdout))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as training writes it, of a model that has learned nothing."""
    vocabulary = {word: number for number, word in enumerate(["?", "<s>", "</s>", *"abcdefgh"])}
    config = IndraQuantumConfig(vocab_size=len(vocabulary), d_model=8, num_hidden_layers=1, intermediate_size=8)
    model = IndraQuantumPhase2(config)
    tokenizer = {"json": Tokenizer(models.WordLevel(vocabulary, unk_token="?")).to_str(), "bos_id": 1, "eos_id": 2}
    path = tmp_path_factory.mktemp("startup") / "checkpoint_v4_epoch_1.pt"
    save_checkpoint(path, Checkpoint(
        model_config=config.to_dict(), model=model.state_dict(), average={}, optimizer={}, step=1, tokens=1,
        finished=True, pending=None, guard={}, best={}, loss_scale={}, settings={"stages": {}}, tokenizer=tokenizer,
    ))  # fmt: skip
    return path


def test_writing_and_evaluating_text_import_no_transformers(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c d\ne f g h\n" * 20, encoding="utf-8")
    write = ("test", checkpoint, "--prompt", "a", "--max-new-tokens", 3)
    evaluate = ("eval", checkpoint, "--text", text, "--row-length", 8)
    found = heavy_imports_of(write, evaluate)
    if torch.__version__ < (2, 13):
        found.discard("sympy")  # torch 2.10 imports it for a random tensor on the meta device
    assert found == {"torch", "numpy", "tokenizers"}


def test_help_and_lists_of_runs_import_nothing_heavy(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("")
    lists = (("runs", "--logs", tmp_path), ("runs", "compare", "one", "two", "--logs", tmp_path))
    assert heavy_imports_of(("--help",), *lists, also=LIGHTER) == set()


def test_help_of_a_command_and_a_look_at_data_import_no_torch(world):
    helps = [(command, "--help") for command in ("train", "capture", "eval", "bench")]
    assert heavy_imports_of(*helps, also=LIGHTER) == set()
    assert heavy_imports_of(("data", "info", world.data)) == {"numpy"}
    assert heavy_imports_of(("data", "verify", world.data)) == {"numpy", "tokenizers"}


def test_a_command_builds_the_checks_of_its_own_settings_alone(tmp_path):
    program = """
import sys
from indraquantum import cli, config
cli.app(["runs", "--logs", sys.argv[1]], result_action="return_value")
classes = {each for each in vars(config).values() if isinstance(each, type) and issubclass(each, config.Settings)}
print("built:", *sorted(each.__name__ for each in classes if each.model_fields and each.__pydantic_complete__))
"""
    (tmp_path / "metrics.jsonl").write_text("")
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("built:"), result.stderr
    assert set(last.split()[1:]) <= {"RunsSettings"}
