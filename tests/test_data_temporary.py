"""A preparation that is killed: at any moment nothing is lost, and the next one clears what it left behind."""

from __future__ import annotations

import json
import os
import signal

import pytest

import survival
from indraquantum.data import dataset
from indraquantum.data import prepare as preparation
from indraquantum.data.dataset import open_dataset
from indraquantum.data.padded import checksum_path
from indraquantum.errors import UserError
from indraquantum.files import sha256_of
from test_data_prepare import settings, snapshot

NAMES = ["mixed", "mixed.pkl", "mixed.pkl.json"]
MOMENTS = [
    (preparation, "_encode", "before", 1),
    (preparation, "_encode", "after", 2),
    (preparation, "write_padded", "after", 1),
    (dataset, "save_npy", "after", 3),
    (os, "replace", "before", 1),  # the manifest
    (os, "replace", "before", 2),  # the old folder goes aside
    (os, "replace", "after", 2),  # neither folder is in its place
    (os, "replace", "after", 3),
    (preparation, "checksum_path", "after", 2),
    (os, "replace", "before", 4),  # the pickle
    (os, "replace", "after", 4),
    (os, "replace", "before", 5),  # its checksum
    (os, "replace", "after", 5),
]


@pytest.mark.parametrize(("owner", "name", "when", "occurrence"), MOMENTS)
def test_the_next_preparation_clears_what_a_killed_one_left(tmp_path, owner, name, when, occurrence):
    chosen = settings(tmp_path)
    preparation.prepare(chosen)
    before = snapshot(tmp_path / "out")
    changed = chosen.model_copy(update={"max_length": 9})
    in_folder = tmp_path / "out" / "bystander.tmp"
    in_folder.write_text("somebody else's")

    def killed():
        survival.at(owner, name, when, occurrence, survival.die)
        preparation.prepare(changed)

    assert survival.in_fork(killed) == -signal.SIGKILL
    # A file under its final name is complete at every moment.
    lengths = []
    for path in (tmp_path / "out" / "mixed", tmp_path / "out" / "mixed.pkl"):
        if path.exists():
            opened = open_dataset("--data", path, str(tmp_path / "tokenizer"), verify=True)
            lengths.append(opened.row_length)
    assert set(lengths) <= {13, 9}
    # A preparation that is wrong changes nothing; one that is interrupted brings back what was moved aside.
    with pytest.raises(UserError, match=r"--wikitext: got missing\.txt; does not exist"):
        preparation.prepare(chosen.model_copy(update={"wikitext": "missing.txt"}))
    assert survival.in_fork(lambda: interrupted(changed)) == 130
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".json") == [
        "bystander.tmp",
        *NAMES[:2],
    ]
    open_dataset("--data", tmp_path / "out" / "mixed", verify=True)
    preparation.prepare(chosen)
    in_folder.unlink()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NAMES
    assert snapshot(tmp_path / "out") == before


def interrupted(chosen):
    def stop(*arguments):
        raise KeyboardInterrupt

    survival.at_every(preparation, "_encode", stop)
    preparation.prepare(chosen)


def test_files_of_a_living_preparation_stay_whatever_its_number(tmp_path):
    """Two processes write to one folder, and one is stopped. A reused process number must not mislead the next one."""
    chosen = settings(tmp_path)
    preparation.prepare(chosen)

    def stopped():
        survival.at(dataset, "save_npy", "after", 3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        preparation.prepare(chosen.model_copy(update={"max_length": 9}))

    pid = survival.fork(stopped)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    mine = {path.name for path in (tmp_path / "out").iterdir() if str(pid) in path.name}
    assert {f".mixed.{pid}.tmp", f".mixed.pkl.{pid}.tmp"} < mine
    dead = [
        tmp_path / "out" / name for name in (f".prepare-{os.getpid()}-x", f".mixed.{os.getppid()}.tmp", ".prepare-a1")
    ]
    for folder in dead:
        folder.mkdir()
    try:
        preparation.prepare(chosen.model_copy(update={"max_length": 11}))
        assert {path.name for path in (tmp_path / "out").iterdir()} == {*NAMES, *mine}
    finally:
        os.kill(pid, signal.SIGCONT)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NAMES
    assert open_dataset("--data", tmp_path / "out" / "mixed", verify=True).row_length == 9


def test_a_pickle_is_checked_against_its_checksum(tmp_path):
    report = preparation.prepare(settings(tmp_path))
    tokenizer, beside = str(tmp_path / "tokenizer"), checksum_path(report.pickle)
    facts = json.loads(beside.read_text())
    assert (facts["file"], facts["bytes"]) == ("mixed.pkl", report.pickle.stat().st_size)
    assert facts["sha256"] == sha256_of(report.pickle)
    whole = {path: path.read_bytes() for path in (report.pickle, beside)}
    opened = open_dataset("--data", report.pickle, tokenizer)
    for path, content in whole.items():
        for place in range(0, len(content), max(len(content) // 40, 1)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(UserError, match=r"is damaged|must be JSON|must be UTF-8"):
                open_dataset("--data", report.pickle, tokenizer)
        path.write_bytes(content)
    beside.unlink()  # a pickle from elsewhere has none
    assert open_dataset("--data", report.pickle, tokenizer).content_sha256 == opened.content_sha256
