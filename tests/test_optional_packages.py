"""Packages that are no dependencies: where one is missing or broken, one line names it and how to install it."""

import runpy
import sys

import pytest

from indraquantum.cli import main
from indraquantum.errors import UserError, optional_package

MISSING, BROKEN = ModuleNotFoundError("No module named 'x'"), OSError("libx.so: cannot open\nshared object file")


@pytest.mark.parametrize(
    ("error", "reason"), [(MISSING, "No module named 'x'"), (BROKEN, "libx.so: cannot open shared")]
)
def test_whatever_an_import_raises_is_one_line(error, reason):
    with pytest.raises(UserError) as caught, optional_package("--engine", "x", "x", "indraquantum[x]"):
        raise error
    assert str(caught.value).startswith(f"--engine: got x; needs the package x, which can't be imported here ({reason}")
    assert str(caught.value).endswith(": pip install 'indraquantum[x]'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MISSING, BROKEN])
def test_the_harness_without_its_package_leaves_with_one_line(without_package, monkeypatch, capsys, error):
    without_package("lm_eval", error)
    monkeypatch.delitem(sys.modules, "indraquantum.inference.lm_eval", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module("indraquantum.inference.lm_eval", run_name="__main__")
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.endswith("pip install 'indraquantum[lm-eval]'\n")


@pytest.mark.parametrize("package", ["uvicorn", "starlette"])
def test_a_server_without_its_packages_leaves_with_one_line(without_package, capsys, package):
    without_package(package, MISSING)
    with pytest.raises(SystemExit) as left:
        main(["serve", "checkpoint.pt"])
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"indra: error: indra: got serve; needs the package {package}, which can't be imported")
    assert message.endswith("pip install 'indraquantum[serve]'\n")
