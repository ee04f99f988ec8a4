"""`import indraquantum` registers the model with transformers, in either order of imports, and stays quick."""

import importlib
import json
import subprocess
import sys

import pytest

import indraquantum

CONFIG = {"model_type": "indraquantum", "vocab_size": 31, "d_model": 8, "num_hidden_layers": 1, "intermediate_size": 7}
BUILT = """
config = AutoConfig.from_pretrained({folder!r})
print(type(config).__name__, config.vocab_size, type(AutoModelForCausalLM.from_config(config)).__name__)
"""
ORDERS = {
    "first": "import indraquantum\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "last": "from transformers import AutoConfig, AutoModelForCausalLM\nimport indraquantum",
    "before a model": "import indraquantum\nfrom transformers import LlamaConfig, AutoConfig, AutoModelForCausalLM",
    "by a name": "from indraquantum.model import IndraQuantumConfig\n"
    "from transformers import AutoConfig, AutoModelForCausalLM",
}


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    "order", ["first", *(pytest.param(order, marks=pytest.mark.slow) for order in ORDERS if order != "first")]
)
def test_the_auto_classes_know_the_model(order, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = run(ORDERS[order] + BUILT.format(folder=str(tmp_path)))
    assert found == ["IndraQuantumConfig", "31", "IndraQuantumPhase2"]


def test_importing_it_after_transformers_registers_it_at_once(monkeypatch):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    monkeypatch.delitem(CONFIG_MAPPING_NAMES, "indraquantum")
    assert "indraquantum" not in CONFIG_MAPPING
    importlib.reload(indraquantum)
    assert CONFIG_MAPPING["indraquantum"].model_type == "indraquantum"


def test_importing_it_imports_nothing_large():
    assert run("import sys, indraquantum; print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))") == []


def test_the_registered_classes_are_the_models_own():
    from transformers import AutoConfig, AutoModelForCausalLM

    from indraquantum.model.configuration import IndraQuantumConfig
    from indraquantum.model.modeling import IndraQuantumPhase2

    config = AutoConfig.for_model(**CONFIG)
    assert type(config) is IndraQuantumConfig
    assert type(AutoModelForCausalLM.from_config(config)) is IndraQuantumPhase2
