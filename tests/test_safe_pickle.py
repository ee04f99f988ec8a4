"""Pickles: what is plain is read, what would run is refused before it runs."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from indraquantum.data.safe_pickle import load_plain_pickle
from indraquantum.errors import UserError

PLAIN = [{"input_ids": [1, 2, 70_000], "attention_mask": [1, 1, 0]}, {"s": "ä", "f": 2.5, "n": None, "t": (True, {3})}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_content_is_read(tmp_path, protocol):
    content = PLAIN if protocol >= 4 else PLAIN[:1]  # before protocol 4 a set is written as a call of `set`
    path = tmp_path / "p.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert load_plain_pickle("--data", path) == content


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class State:
    """Pickles as a plain instance with state."""

    def __init__(self):
        self.value = 1


def short_text(text: bytes) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text  # SHORT_BINUNICODE


def payloads(canary):
    """Hostile pickles by name; each would create the file `canary` if it were run."""
    command = f"touch {canary}".encode()
    line = f"__import__('os').mkdir({str(canary)!r})"
    yield "system by REDUCE", pickle.dumps(Call(os.system, command.decode()))
    yield "mkdir by REDUCE, protocol 0", pickle.dumps(Call(os.mkdir, str(canary)), protocol=0)
    yield "eval by REDUCE, protocol 2", pickle.dumps(Call(eval, line), protocol=2)
    yield "deep inside plain content", pickle.dumps([{"input_ids": [1, Call(exec, line)]}])
    yield "as a dict's key", pickle.dumps({("k", Call(eval, line)): 1})
    yield "GLOBAL", b"cos\nsystem\n(V" + command + b"\ntR."
    yield "INST", b"(V" + command + b"\nios\nsystem\n."
    yield "OBJ", b"(cos\nsystem\nV" + command + b"\no."
    yield "STACK_GLOBAL", b"\x80\x04" + short_text(b"os") + short_text(b"system") + b"\x93" + b"(V" + command + b"\ntR."
    yield "NEWOBJ", b"\x80\x02csubprocess\nPopen\n(V" + command + b"\nt\x81."
    yield "NEWOBJ_EX", b"\x80\x04csubprocess\nPopen\n(V" + command + b"\nt}\x92."
    yield "dotted name", b"\x80\x04" + short_text(b"builtins") + short_text(b"eval.__call__") + b"\x93."
    yield "BUILD", pickle.dumps(State())
    yield "a class alone", pickle.dumps(State)
    yield "EXT1", b"\x80\x02\x82\x01."
    yield "EXT4", b"\x80\x02\x84" + struct.pack("<i", 77) + b"."
    yield "PERSID", b"Pos.system\n."
    yield "BINPERSID", b"\x80\x02Vos.system\nQ."
    yield "copyreg's constructor", b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR."
    yield "an array", pickle.dumps(__import__("numpy").arange(3))
    yield "a complex number", pickle.dumps(1j)
    yield "NEXT_BUFFER", b"\x80\x05\x97."
    # Every way to call crossed with functions that touch the system, most of which no list of bad names would hold.
    text = b"V" + str(canary).encode() + b"\n"
    for module, name in (
        ("os", "mkdir"),
        ("os", "makedirs"),
        ("posix", "mkdir"),
        ("os", "mknod"),
        ("pathlib", "Path"),
        ("builtins", "open"),
        ("io", "FileIO"),
        ("shutil", "rmtree"),
        ("tempfile", "mkdtemp"),
        ("importlib", "import_module"),
        ("numpy", "save"),
        ("torch", "load"),
        ("pickle", "loads"),
        ("sqlite3", "connect"),
        ("shelve", "open"),
    ):
        names = f"{module}\n{name}\n".encode()
        lookup = b"\x80\x04" + short_text(module.encode()) + short_text(name.encode()) + b"\x93"
        yield f"{module}.{name} by GLOBAL", b"c" + names + b"(" + text + b"tR."
        yield f"{module}.{name} by INST", b"(" + text + b"i" + names + b"."
        yield f"{module}.{name} by OBJ", b"(c" + names + text + b"o."
        yield f"{module}.{name} by STACK_GLOBAL", lookup + b"(" + text + b"tR."
    yield (
        "a name from the memo",
        b"\x80\x04" + short_text(b"os") + b"\x940" + b"h\x00" + short_text(b"mkdir") + b"\x93(" + text + b"tR.",
    )
    yield "by __setstate__", b"\x80\x02ccollections\nOrderedDict\n)R}Vx\nI1\nsb."
    yield "by append", b"\x80\x02ccollections\ndeque\n)R(I1\nI2\ne."
    yield "by a dict's items", b"\x80\x02cos\nenviron\nVA\nVB\ns."
    yield "after plain content", pickle.dumps([1, 2])[:-1] + b"0cos\nmkdir\n(" + text + b"tR."


NAMES = [name for name, _ in payloads("unused")]
assert len(set(NAMES)) == len(NAMES) >= 60


@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_never_run(tmp_path, name):
    canary = tmp_path / "canary"
    path = tmp_path / "p.pkl"
    path.write_bytes(dict(payloads(canary))[name])
    with pytest.raises(UserError, match="plain containers and numbers") as caught:
        load_plain_pickle("--data", path)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_the_canary_sings_elsewhere(tmp_path):
    """The payloads are real: Python's own loader runs them."""
    for name in ("system by REDUCE", "GLOBAL", "INST", "OBJ", "STACK_GLOBAL", "deep inside plain content",
                 "os.mkdir by GLOBAL", "posix.mkdir by INST", "os.makedirs by OBJ", "os.mknod by STACK_GLOBAL",
                 "a name from the memo", "after plain content"):  # fmt: skip
        canary = tmp_path / f"canary of {NAMES.index(name)}".replace(" ", "_")
        pickle.loads(dict(payloads(canary))[name])
        assert canary.exists(), name


def test_broken_files(tmp_path):
    path = tmp_path / "p.pkl"
    whole = pickle.dumps(PLAIN)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="plain containers and numbers"):
            load_plain_pickle("--data", path)
    broken = [b"not a pickle", b"\x80\xff", b".", b"}}s.", b"0.", b"R.", b"}(b.", b"}}Vk\nI1\nsb."]
    for content in [*broken, b"I" + b"9" * 5000 + b"\n."]:
        path.write_bytes(content)
        with pytest.raises(UserError, match="plain containers and numbers"):
            load_plain_pickle("--data", path)
    with pytest.raises(UserError, match="can be read"):
        load_plain_pickle("--data", tmp_path / "missing.pkl")


def test_flipped_bytes_are_read_as_plain_or_refused(tmp_path):
    path = tmp_path / "p.pkl"
    whole = pickle.dumps(PLAIN[0], protocol=4)
    for at in range(len(whole)):
        for value in (0, 0x28, 0x52, 0x62, 0x81, 0x93, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            with contextlib.suppress(UserError):
                load_plain_pickle("--data", path)


@given(st.binary(max_size=200), st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_any_bytes_are_plain_or_refused(tmp_path_factory, content, protocol):
    path = tmp_path_factory.getbasetemp() / "fuzzed.pkl"
    for data in (content, b"\x80" + bytes([protocol]) + content, pickle.dumps(PLAIN[:1])[:-1] + content):
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            load_plain_pickle("--data", path)
