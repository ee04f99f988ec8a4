"""The metrics file: one schema, whole lines only, nothing twice after a resume."""

from __future__ import annotations

import json

import pytest

from indraquantum.errors import UserError
from indraquantum.metrics import FIELDS, MetricsLog, read_metrics


def test_every_line_has_every_field(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write({"step": 1, "loss": 2.5})
    log.close()
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert list(line) == list(FIELDS)
    assert (line["step"], line["loss"], line["kd"]) == (1, 2.5, None)


def test_unknown_names_are_refused(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(KeyError, match="losss"):
        log.write({"losss": 1.0})
    log.close()


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": \xff\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl; is damaged: its line 2 is no JSON"):
        read_metrics(path)


def test_resume_drops_the_lines_after_its_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path)
    for step in range(5):
        first.write({"step": step})
    first.close()
    second = MetricsLog(path, resumed_step=2)
    second.write({"step": 3})
    second.close()
    assert [m["step"] for m in read_metrics(path)] == [0, 1, 2, 3]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 9}\n')
    MetricsLog(path).close()
    assert read_metrics(path) == []
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_the_documentation_lists_every_field(root):
    page = (root / "docs" / "FORMATS.md").read_text(encoding="utf-8")
    for name, meaning in FIELDS.items():
        assert f"| `{name}` | {meaning} |" in page
