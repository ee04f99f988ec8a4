"""`indra doctor` and `indra --version` give what a bug report needs, even if something is broken."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version

import pytest

import indraquantum
from indraquantum import cli, doctor
from indraquantum.doctor import _short


def indra(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return left.value.code, capsys.readouterr()


def test_version(capsys):
    assert indra(capsys, "--version") == (0, (indraquantum.__version__ + "\n", ""))


def test_the_report_tells_what_is_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path / "cache"))
    status, said = indra(capsys, "doctor", "--json-file", tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert (status, said.err) == (0, "")
    assert found["versions"]["indraquantum"] == indraquantum.__version__
    for name in ("torch", "transformers", "tokenizers", "httpx2", "filelock"):
        assert found["versions"][name] == version(name)
    assert found["optional packages"]["peft"] == version("peft")
    assert {"gguf", "onnxruntime", "starlette", "uvicorn"} <= found["optional packages"].keys()
    assert "pytest" not in found["optional packages"]
    assert found["torch"]["device of auto"] == "cpu"
    assert found["torch"]["16-bit units"] == "the CPU has none (INDRA_BFLOAT16 says so)"
    assert found["torch"]["threads"] == int(os.environ["OMP_NUM_THREADS"])
    assert found["torch"]["products of the CPU"] == "onednn:512x1000 (INDRA_PRODUCTS asks for it)"
    assert found["environment"]["INDRA_PRODUCTS"] == "onednn:512x1000"
    for section in found.values():
        for name, value in section.items():
            assert f"{name:22} {value}" in said.out


def test_memory_that_holds_copies_of_files_is_free(monkeypatch):
    from indraquantum.teacher import batch_size

    monkeypatch.setattr(batch_size, "free_memory", lambda: 3 << 30)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 7 << 18}.__getitem__)  # as on macOS
    assert doctor._memory() == "3.0 GiB free of 7.0 GiB"


def test_the_kept_choice_is_told(capsys, tmp_path, monkeypatch):
    from indraquantum.kernels import measured

    monkeypatch.delenv("INDRA_PRODUCTS")
    monkeypatch.setenv("INDRAQUANTUM_CACHE", str(tmp_path))
    assert "not measured yet" in indra(capsys, "doctor")[1].out
    (tmp_path / "ways.json").write_text(json.dumps({measured._machine(): "torch:256x2000"}))
    assert f"{'products of the CPU':22} torch:256x2000" in indra(capsys, "doctor")[1].out


def test_it_never_fails(capsys, monkeypatch, without_package):
    without_package("torch", ImportError("its build is broken"))
    monkeypatch.setattr("indraquantum.doctor.cache_folder", lambda: 1 / 0)
    status, said = indra(capsys, "doctor")
    assert status == 0
    assert "unknown (ImportError: its build is broken)" in said.out
    assert "unknown (ZeroDivisionError: division by zero)" in said.out


def test_the_sources_alone_have_no_list_of_packages(capsys, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    status, said = indra(capsys, "doctor")
    assert status == 0
    assert f"{'torch':22} {version('torch')}\n" in said.out


def test_variables_are_told_as_they_are(capsys, monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "")
    assert f"{'MKL_NUM_THREADS':22} (empty)\n" in indra(capsys, "doctor")[1].out
    monkeypatch.setenv("HOME", "/home/somebody")
    for value, told in (
        ("/home/somebody/a", "~/a"), ("/home/somebody", "~"), ("/srv//a", "/srv//a"), ("0,1", "0,1"), ("a//b", "a//b"),
    ):  # fmt: skip
        assert _short(value) == told


def test_no_home_folder_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "somebody"))
    monkeypatch.delenv("INDRAQUANTUM_CACHE", raising=False)
    said = indra(capsys, "doctor")[1].out
    assert "~/.cache/indraquantum" in said
    assert "somebody" not in said


@pytest.mark.parametrize(("native", "told"), [(True, "native"), (False, "emulated, or none")])
def test_a_gpu_is_described(capsys, monkeypatch, native, told):
    import torch

    facts = {
        "is_available": True, "device_count": 1, "get_device_name": "NVIDIA T4", "get_device_capability": (7, 5),
        "is_bf16_supported": native,
    }  # fmt: skip
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    variables = {"NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "a:1", "PYTORCH_ENABLE_MPS_FALLBACK": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = indra(capsys, "doctor")[1].out
    expected = variables | {
        "devices": "cpu, NVIDIA T4 (compute capability 7.5)", "CUDA of this build": "12.8", "bfloat16 of the GPU": told
    }  # fmt: skip
    for name, value in expected.items():
        assert f"{name:22} {value}\n" in said
