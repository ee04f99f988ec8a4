"""The name of the processor, as `indra doctor` shows it and as the quickest way of computing is kept for it."""

from __future__ import annotations

import subprocess

import pytest

from indraquantum import processor
from indraquantum.kernels import measured


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("processor : 0\nmodel name : Some CPU\n\nprocessor : 1\nmodel name : Some CPU", "Some CPU"),
        ("processor : 0\nCPU part : 0xd0c\n\nModel : Raspberry Pi 5\n", "Raspberry Pi 5"),
        ("processor : 0\nCPU implementer : 0x41\nCPU part\t: 0xd0c\n", "aarch64, CPU implementer 0x41, CPU part 0xd0c"),
        ("", "aarch64"),
    ],
)
def test_the_processor_has_a_name(tmp_path, monkeypatch, lines, told):
    (tmp_path / "cpuinfo").write_text(lines)
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert processor.processor_name() == told
    assert measured._machine().startswith(f"{told}, ")  # the quickest way is kept for each model


def test_a_processor_without_a_name_has_that_of_its_kind(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("sysctl")))
    assert measured._machine().startswith("arm64, ")
