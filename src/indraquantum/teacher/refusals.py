"""What transformers, and the packages that it asks for, say of a teacher that can't be read, in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from indraquantum.errors import UserError
from indraquantum.files import read_json

if TYPE_CHECKING:
    from indraquantum.teacher.teacher_model import TeacherFiles

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
    """Whatever transformers, or a package that it asks for, says of a teacher that it can't read or run."""
    import torch

    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError:
        raise UserError(files.field, files.name, "must fit the device's memory, which is too small for it") from None
    except Exception as error:
        reason = " ".join(str(error).replace("`", "").split())[:200] or type(error).__name__
        allowed = f"must be a causal LM that transformers can load ({reason})"
        if isinstance(error, ImportError):
            allowed = f"needs a package that is not installed here{_quantisation(files)} ({reason})"
        raise UserError(files.field, files.name, allowed) from None


def _quantisation(files: TeacherFiles) -> str:
    """How a quantised teacher's weights are stored, and the command that installs what reads them."""
    about = read_json(files.field, files.folder / "config.json").get("quantization_config") or {}
    method = about.get("quant_method") or ("bitsandbytes" if about.keys() & {"load_in_8bit", "load_in_4bit"} else None)
    if method is None:
        return ""
    packages = _QUANTISATION.get(method)
    return f": its weights are quantised by {method}" + (f"; pip install {packages}" if packages else "")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and warnings of transformers while loading: what matters is checked here and said in one line."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
