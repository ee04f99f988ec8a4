"""The metrics file: one schema, whole lines only, nothing twice after a resume."""

from __future__ import annotations

import binascii
import errno
import json
import os

import pytest

from indraquantum.errors import UserError
from indraquantum.metrics import FIELDS, MetricsLog, last_metrics, read_metrics


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


def written(path, lines: int = 8) -> bytes:
    log = MetricsLog(path)
    for step in range(lines):
        held_out = {"all": 5.5 - step} if step % 4 == 0 else None
        log.write({"step": step, "tokens": 96 * step, "stage": "v4", "loss": 7.0 / (step + 1), "held_out": held_out})
    log.close()
    return path.read_bytes()


def test_a_line_ends_with_the_crc_of_the_bytes_before_it(tmp_path):
    for line in written(tmp_path / "metrics.jsonl").splitlines():
        metrics = json.loads(line)
        assert list(metrics) == [*FIELDS, "crc"]
        assert metrics["crc"] == f"{binascii.crc32(line[: line.rindex(b', ')]):08x}"


def test_a_flipped_bit_of_a_line_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole, expected = written(path, 3), read_metrics(path)
    end = 8 * (whole.index(b"\n") + 1)
    for bit in (*range(0, end, 13), *range(end - 8 * 23, end + 8)):  # the end with its checksum is looked at in full
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"is damaged: its line [12] .*; remove that line"):
            read_metrics(path)
    for bit in range(8):
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1 << bit]))
        with pytest.raises(UserError, match="its line 3 does not match its checksum"):
            read_metrics(path)
    path.write_bytes(whole[:-1])  # no more than torn
    assert read_metrics(path) == expected[:-1]


@pytest.mark.parametrize(
    ("line", "how"),
    [
        (b'{"step": 1, "loss": 1.x5}', "is no JSON"),
        (b'{"step": 1, "loss": NaN}', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"step": 1, "loss": ' + b"1" * 5000 + b"}", "is no JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"step": 1, "loss": 1.5, "cbc": "00000000"}', "has an unknown key, 'cbc'"),
        (b" " * (1 << 20), "is longer than any line of a run"),
    ],
)
def test_what_is_no_line_of_a_run_is_told(tmp_path, line, how):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "loss": 2.5}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"its line 2 {how}; remove"):
        read_metrics(path)


def test_lines_of_an_earlier_program_are_read_and_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old = b"".join(json.dumps(dict.fromkeys(FIELDS) | {"step": step}).encode() + b"\n" for step in range(4))
    path.write_bytes(old)
    log = MetricsLog(path, resumed_step=2)
    log.write({"step": 3})
    log.close()
    assert path.read_bytes().startswith(old[: old.index(b'{"step": 3')])
    assert [list(line) for line in read_metrics(path)] == [list(FIELDS)] * 4


def test_the_last_metrics_are_those_of_the_last_complete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written(path, 100)
    whole = read_metrics(path)
    with path.open("ab") as file:
        file.write(b'{"step": 100')  # a crash cut it off
    assert last_metrics(path) == whole[99]
    assert whole[99]["step"] == 99
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_what_a_crash_left_behind_the_checkpoint_does_not_matter(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = written(path)
    path.write_bytes(whole + b"\0" * 512 + b"\n")
    MetricsLog(path, resumed_step=7).close()
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"step": 3', b'"step": 9'))
    with pytest.raises(UserError, match="its line 4 does not match its checksum"):
        MetricsLog(path, resumed_step=7)
    assert path.read_bytes() != whole  # nothing is dropped without a word


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


def test_a_disk_that_fails_in_the_end_is_one_line_without_a_size(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")

    def fails(_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(UserError, match=r"could not be written: Input/output error \([\d,]+ bytes free\)$"):
            log.sync()
    log.close()


def test_the_documentation_lists_every_field(root):
    page = (root / "docs" / "FORMATS.md").read_text(encoding="utf-8")
    for name, meaning in FIELDS.items():
        assert f"| `{name}` | {meaning} |" in page
