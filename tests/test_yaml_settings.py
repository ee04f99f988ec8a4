"""YAML files of settings: what is too large, in the file or by its aliases, is refused before it is built."""

from __future__ import annotations

import pytest

from indraquantum import yaml_settings
from indraquantum.cli import app, run_guarded
from indraquantum.errors import UserError
from indraquantum.strategy import load_strategy
from indraquantum.yaml_settings import read_yaml


def read(tmp_path, text: str):
    path = tmp_path / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return read_yaml("--strategy", path, "stages")


def nested(levels: int) -> str:
    """Each level holds the one below twice: 2 ** levels words when the aliases are copies."""
    lines = ["a0: &a0 word"]
    return "\n".join(lines + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, levels)])


@pytest.mark.parametrize("levels", [4, 5, 6, 7])
def test_aliases_count_as_copies(tmp_path, monkeypatch, levels):
    """By hand: a word weighs 5, a list 1 more than its parts, a key 3, the top 1."""
    weights = [5]
    for _ in range(1, levels):
        weights.append(1 + 2 * weights[-1])
    total = 1 + 3 * levels + sum(weights)
    monkeypatch.setattr(yaml_settings, "MOST_CHARACTERS", total)
    assert read(tmp_path, nested(levels))["a1"] == ["word", "word"]
    monkeypatch.setattr(yaml_settings, "MOST_CHARACTERS", total - 1)
    with pytest.raises(
        UserError, match=f"must be at most {total - 1} characters long, where each alias counts as a copy"
    ):
        read(tmp_path, nested(levels))


def test_merged_mappings_count_as_copies(tmp_path, monkeypatch):
    text = "a: &a {k: 1}\nb: &b {<<: [*a, *a, *a]}\nc: {<<: [*b, *b, *b]}"
    monkeypatch.setattr(yaml_settings, "MOST_CHARACTERS", 60)
    with pytest.raises(UserError, match="each alias counts"):
        read(tmp_path, text)
    monkeypatch.setattr(yaml_settings, "MOST_CHARACTERS", 200)
    assert read(tmp_path, text)["c"] == {"k": 1}


def test_a_file_of_any_length_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(yaml_settings, "MOST_CHARACTERS", 100)
    monkeypatch.setattr(yaml_settings, "_Loader", None)
    with pytest.raises(UserError, match="must be at most 100 characters long"):
        read(tmp_path, "a: " + "b" * 400)


def test_an_anchor_that_holds_itself_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"must be YAML .an anchor contains itself"):
        read(tmp_path, "a: &a [*a]")


@pytest.mark.parametrize("command", [["ablate"], ["train", "--options"]])
def test_every_command_that_reads_yaml_is_bounded(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(yaml_settings, "MOST_CHARACTERS", 1000)
    path = tmp_path / "my.yaml"
    path.write_text(nested(9), encoding="utf-8")
    with pytest.raises(UserError, match="each alias counts"):
        load_strategy(str(path))
    assert run_guarded(lambda: app.meta([*command, str(path)], exit_on_error=False, print_error=False)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "must be at most 1,000 characters long, where each alias counts as a copy" in said
