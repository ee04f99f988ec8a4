"""The sweep over processors runs each as it says, names what fails, and says so with its exit status."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SEEN = """
import os
def test_the_level():
    assert os.environ["ATEN_CPU_CAPABILITY"] == "default"
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"
def test_on_one_thread():
    assert os.environ["OMP_NUM_THREADS"] == "1"
"""


@pytest.fixture
def sweep(root, tmp_path):
    (tmp_path / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (tmp_path / "test_seen.py").write_text(SEEN)

    def run(*arguments):
        command = [sys.executable, str(root / "tests" / "processors.py"), *arguments, "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_it_names_what_fails_and_where(sweep):
    status, said = sweep("--only", "default-avx2-[12]")
    assert status == 1
    one, two, failed = said.splitlines()
    assert one.startswith("default-avx2-1   2 passed")
    assert two.startswith("default-avx2-2   1 failed, 1 passed")
    assert failed.startswith("  FAILED test_seen.py::test_on_one_thread")


def test_a_name_that_nothing_has_is_refused(sweep):
    status, said = sweep("--only", "avx9*")
    assert status == 2
    assert "--only avx9*: must match one of default-avx2-1, default-avx2-2" in said


def test_nothing_is_skipped_where_there_is_a_gpu(root):
    """GPUs are hidden from the tests, so that the tests may fork."""
    asked = "cuda." + "is_available"
    assert [path.name for path in (root / "tests").glob("*.py") if asked in path.read_text(encoding="utf-8")] == []
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_initialized()
