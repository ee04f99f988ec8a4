"""Errors of the system in libraries written in Rust, from the libraries themselves."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from indraquantum.data.system_errors import system_errors_shown
from indraquantum.errors import UserError

WRITERS = {
    "safetensors": lambda path: save_file({"a": np.zeros(3)}, path),
    "tokenizers": lambda path: Tokenizer(models.BPE()).save(str(path)),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_the_system_refuses_is_an_os_error_with_the_path(tmp_path, writer):
    with pytest.raises(OSError, match="No such file") as caught, system_errors_shown(tmp_path / "folder"):
        writer(tmp_path / "nowhere" / "file")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "folder")


@pytest.mark.parametrize("error", [UserError("--as", "llama", "must be x"), OSError(errno.EIO, os.strerror(errno.EIO))])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, system_errors_shown(Path("folder")):
        raise error
    assert caught.value is error
