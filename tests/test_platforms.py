"""What depends on the system and its Python: Windows, macOS, the device of auto, a Python without readline."""

from __future__ import annotations

import importlib.abc
import io
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from indraquantum.config import DeviceSettings
from indraquantum.device import choose_device
from indraquantum.errors import UserError
from indraquantum.interrupts import Interrupted


@pytest.mark.parametrize("module", ["indraquantum", "indraquantum.cli"])
def test_windows_gets_one_line(module):
    code = f"import sys; sys.platform = 'win32'; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "WSL 2" in done.stderr


def test_auto_never_takes_mps_and_does_not_ask_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: not asked.append(1))
    assert choose_device(DeviceSettings()).type == "cpu"
    assert choose_device(DeviceSettings(device="cpu")).type == "cpu"
    assert not asked
    assert choose_device(DeviceSettings(device="mps")).type == "mps"
    with pytest.raises(UserError, match=r"--device: got cuda; must be a device of this machine: auto, mps, cpu"):
        choose_device(DeviceSettings(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(DeviceSettings()).type == "cuda"


def test_runs_of_an_ablation_are_not_forked_on_a_mac(monkeypatch):
    from indraquantum.ablation import processes

    methods = []
    monkeypatch.setattr(processes, "_start_server", lambda: methods.append("a server"))
    get_context = processes.multiprocessing.get_context
    monkeypatch.setattr(
        processes.multiprocessing, "get_context", lambda method: methods.append(method) or get_context(method)
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    assert processes.run_tasks([], 2, print) == []
    assert methods == ["spawn"]


def test_the_process_that_forks_the_runs_ignores_ctrl_c_while_it_loads(monkeypatch):
    from indraquantum.ablation import processes

    def handlers():
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGHUP)

    seen, before = [], handlers()
    monkeypatch.setattr(processes.forkserver, "ensure_running", lambda: seen.append(handlers()))
    processes._start_server()
    assert seen == [(signal.SIG_IGN, signal.SIG_IGN)]
    assert handlers() == before


@pytest.mark.parametrize(("signalled", "raised"), [(True, Interrupted), (False, EOFError)])
def test_a_signal_to_all_processes_while_runs_start_is_no_traceback(monkeypatch, signalled, raised):
    """`timeout` and a scheduler signal the process that forks the runs too."""
    from indraquantum.ablation import processes

    class Process:
        def __init__(self, **_):
            pass

        def start(self):
            if signalled:
                signal.raise_signal(signal.SIGTERM)
            raise EOFError("unexpected EOF")

    monkeypatch.setattr(processes, "_start_server", lambda: None)
    monkeypatch.setattr(processes.multiprocessing.context.ForkServerContext, "Process", Process)
    monkeypatch.setattr(processes.multiprocessing.context.SpawnContext, "Process", Process)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(raised):
            processes.run_tasks([SimpleNamespace(name="a")], 1, print)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_chat_needs_no_readline(monkeypatch, capsys):
    from indraquantum.inference import chat

    class Without(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "readline":
                raise ImportError(name)

    monkeypatch.delitem(sys.modules, "readline", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without(), *sys.meta_path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    monkeypatch.setattr(chat, "colours", lambda *_: False)
    chat._talk(None, SimpleNamespace(path="model.pt", aligned=None))
    assert "Chat with model.pt" in capsys.readouterr().out
