"""A report on this machine and this installation, for bug reports: the command `indra doctor`."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from indraquantum import __version__
from indraquantum.config import DoctorSettings
from indraquantum.files import cache_folder, check_new_file, write_json
from indraquantum.processor import processor_name

USEFUL = ("datasets", "peft", "sentencepiece")  # no extra brings them, but users have them
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ONEDNN_MAX_CPU_ISA", "INDRA_PRODUCTS",
             "INDRA_BFLOAT16", "INDRAQUANTUM_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "PYTORCH_ALLOC_CONF",
             "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ENABLE_MPS_FALLBACK")  # fmt: skip
PREFIXES = ("NCCL_", "GLOO_")  # of other variables to show


def examine() -> dict[str, dict[str, Any]]:
    """Return what there is, by section and name; what can't be found out says why in its place."""
    return {
        "versions": {"indraquantum": __version__, "python": platform.python_version(), "system": platform.platform()}
        | _versions(_required(extras=False)),
        "optional packages": _versions([*_required(extras=True), *USEFUL]),
        "machine": {
            "processor": _attempt(processor_name),
            "cores of this process": _attempt(_cores),
            "memory": _attempt(_memory),
        },
        "torch": {
            "threads": _attempt(lambda: _torch().get_num_threads()),
            "instruction set": _attempt(lambda: _torch().backends.cpu.get_cpu_capability()),
            "devices": _attempt(_devices),
            "device of auto": _attempt(_device_of_auto),
            "16-bit units": _attempt(_16_bit_units),
            "CUDA of this build": _attempt(lambda: _torch().version.cuda or "none"),
            "bfloat16 of the GPU": _attempt(_bfloat16),
            "products of the CPU": _attempt(_products),
        },
        "caches": {
            "indraquantum": _attempt(lambda: _short(str(cache_folder()))),
            "hugging face": _attempt(_hub_cache),
        },
        "environment": {name: _short(os.environ[name]) or "(empty)" for name in _variables()},
    }


def report_text(found: dict[str, dict[str, Any]]) -> str:
    """Return the sections as plain lines."""
    lines = []
    for section, entries in found.items():
        lines += [section, *(f"  {name:22} {value}" for name, value in entries.items())]
    return "\n".join(lines)


def doctor(settings: DoctorSettings) -> dict[str, dict[str, Any]]:
    """Print the report, and write it as JSON if a file is asked for.

    Raises:
        UserError: the file can't be written.
    """
    if settings.json_file is not None:
        check_new_file("--json-file", settings.json_file)
    found = examine()
    print(report_text(found))
    if settings.json_file is not None:
        write_json(settings.json_file, found)
    return found


def _attempt(ask: Callable[[], object]) -> object:
    """Return the answer of `ask`. The report is wanted most where something is broken, so that no failure ends it."""
    try:
        return ask()
    except PackageNotFoundError:
        return "not installed"
    except Exception as error:
        return f"unknown ({type(error).__name__}: {' '.join(str(error).split())[:100]})"


def _torch() -> Any:
    import torch

    return torch


def _required(*, extras: bool) -> list[str]:
    """Return the packages that this one needs always, or that its extras bring, but for those of its own tests."""
    try:
        lines = [line.partition(";") for line in requires("indraquantum") or ()]
    except PackageNotFoundError:  # the sources alone
        lines = [("torch", "", ""), ("transformers", "", "")]
    chosen = [name for name, _, when in lines if ("extra ==" in when) == extras and "dev" not in when]
    return sorted({re.match(r"[\w.-]+", name)[0] for name in chosen})


def _versions(names: Iterable[str]) -> dict[str, object]:
    return {name: _attempt(lambda name=name: version(name)) for name in names}


def _cores() -> str:
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{here} of {os.cpu_count()}"


def _memory() -> str:
    from indraquantum.teacher.batch_size import free_memory

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{free_memory() / 2**30:.1f} GiB free of {total / 2**30:.1f} GiB"


def _variables() -> list[str]:
    others = sorted(name for name in os.environ if name.startswith(PREFIXES))
    return [name for name in VARIABLES if name in os.environ] + others


def _bfloat16() -> str:
    torch = _torch()
    if not torch.cuda.is_available():
        return "no GPU"
    return "native" if torch.cuda.is_bf16_supported(including_emulation=False) else "emulated, or none"


def _devices() -> str:
    torch = _torch()
    names = []
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        names.append(f"{torch.cuda.get_device_name(number)} (compute capability {major}.{minor})")
    return ", ".join(["cpu", *(["mps"] if torch.backends.mps.is_available() else []), *names])


def _device_of_auto() -> str:
    from indraquantum.config import DeviceSettings
    from indraquantum.device import choose_device

    return choose_device(DeviceSettings()).type


def _16_bit_units() -> str:
    """Say whether the CPU has units for bfloat16, or what INDRA_BFLOAT16 says about them."""
    from indraquantum.kernels.onednn import VARIABLE, has_16_bit_units

    told = f" ({VARIABLE} says so)" if os.environ.get(VARIABLE) else ""
    return f"the CPU has {'some' if has_16_bit_units() else 'none'}{told}"


def _products() -> str:
    from indraquantum.kernels.measured import kept_way
    from indraquantum.kernels.ways import VARIABLE, asked_for

    if (asked := asked_for()) is not None:
        return f"{asked} ({VARIABLE} asks for it)"
    return str(kept_way() or "not measured yet; the first command that computes does it")


def _hub_cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return _short(HF_HUB_CACHE)


def _short(value: str) -> str:
    """`value` with ~ in place of the home folder, whose name is nobody's business in a bug report."""
    try:
        return str("~" / Path(value).relative_to(Path.home())) if os.path.isabs(value) else value
    except (ValueError, RuntimeError):
        return value
