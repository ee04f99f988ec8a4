"""Turns errors of transformers, and of packages that it needs, about a teacher into one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from indraquantum.data.gguf_file import INSTALL
from indraquantum.errors import UserError
from indraquantum.files import read_json
from indraquantum.memory import memory_needed
from indraquantum.teacher.teacher_files import TeacherFiles

_QUANTISATION = {  # quant_method: what reads such weights
    "aqlm": "accelerate 'aqlm[gpu,cpu]'",
    "auto-round": "auto-round",
    "awq": "accelerate gptqmodel",
    "bitnet": "accelerate",
    "bitsandbytes": "accelerate bitsandbytes",
    "compressed-tensors": "accelerate compressed-tensors",
    "eetq": "accelerate kernels",
    "fbgemm_fp8": "accelerate fbgemm-gpu",
    "fp8": "accelerate kernels",
    "gptq": "accelerate optimum gptqmodel",
    "hqq": "accelerate hqq",
    "mxfp4": "accelerate kernels",
    "quanto": "accelerate optimum-quanto",
    "torchao": "accelerate torchao",
}


@contextlib.contextmanager
def refused_in_one_line(files: TeacherFiles) -> Iterator[None]:
    """Turn any error of transformers, or of a package that it needs, into one line about the teacher."""
    try:
        with memory_needed(files.field, files.name, "must fit into the memory of the device, but is too large"):
            yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).replace("`", "").split())[:200] or type(error).__name__
        allowed = f"must be a causal LM that transformers can load ({reason})"
        if isinstance(error, ImportError):
            allowed = f"needs a package that is not installed here{_quantisation(files)} ({reason})"
        raise UserError(files.field, files.name, allowed) from None


def _quantisation(files: TeacherFiles) -> str:
    """Return how a teacher's weights are stored, if not as plain numbers, and what to install to read them."""
    if files.gguf:
        return f": pip install '{INSTALL}'"
    about = read_json(files.field, files.folder / "config.json").get("quantization_config") or {}
    method = about.get("quant_method") or ("bitsandbytes" if about.keys() & {"load_in_8bit", "load_in_4bit"} else None)
    if method is None:
        return ""
    packages = _QUANTISATION.get(method)
    return f": its weights are quantised by {method}" + (f"; pip install {packages}" if packages else "")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings while loading; errors are still reported in one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bar for GGUF files can't be switched off
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
