"""How many rows the teacher reads at once: as many as make it faster and as fit into free memory.

Matrix products of different shapes round differently, so the last bits of a shard depend on this number. It is chosen
once and kept in the manifest, and a resumed capture uses it again, however much memory is free then.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from indraquantum.config import CaptureSettings
from indraquantum.errors import UserError
from indraquantum.teacher.loading import compute_dtype, is_quantised, teacher_config
from indraquantum.teacher.refusals import refused_in_one_line
from indraquantum.teacher.teacher_files import TeacherFiles

if TYPE_CHECKING:
    import torch

CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 16_384  # larger batches are no faster, and a killed capture loses one batch
SERVER_TOKENS = 2048
FREE_SHARE = 0.5  # of the memory that is free beside the weights; other programs need some, and the estimate is rough
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class TeacherSize(NamedTuple):
    """How much memory a teacher takes."""

    weights: int  # bytes
    token: int  # bytes for each token of a batch, at the peak of the forward pass and the reduction after it


def choose_batch_rows(settings: CaptureSettings, files: TeacherFiles | None, row_length: int) -> int:
    """Return the rows of a batch: those of `--batch-tokens`, or as many as fit; at least one.

    Args:
        settings: the command's options.
        files: the teacher; None for a server.
        row_length: tokens of a row.

    Raises:
        UserError: memory decides, but this machine does not have the device.
    """
    tokens = settings.batch_tokens
    if tokens == "auto":
        tokens = SERVER_TOKENS if files is None else _tokens_that_fit(settings, files)
    return max(1, tokens // row_length)


def _tokens_that_fit(settings: CaptureSettings, files: TeacherFiles) -> int:
    import torch

    device = measured_device(settings)
    size = teacher_size(files, compute_dtype(device, settings.precision).itemsize)
    free, copies = free_memory(), settings.workers if settings.engine == "local" else 1
    if device.type == "cuda":
        free, copies = torch.cuda.mem_get_info(device)[0], -(-copies // torch.cuda.device_count())
    most = CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS
    return min(most, max(0, int(FREE_SHARE * (free / copies - size.weights) / size.token)))


def require_memory(settings: CaptureSettings, files: TeacherFiles, precision: str) -> None:
    """Refuse a teacher whose weights the main memory does not hold, before they are read.

    The system would kill the process while it loads them. `--batch-tokens` tries it nevertheless, because both figures
    are estimates. A GPU and the machines of Ray are not looked at.

    Args:
        settings: the command's options.
        files: the teacher; its weights need not be there yet.
        precision: the number format in which it is to compute.

    Raises:
        UserError: the weights don't fit.
    """
    if settings.batch_tokens != "auto" or settings.engine != "local":
        return
    if (device := measured_device(settings)).type != "cpu":
        return
    dtype = compute_dtype(device, precision)
    needed, free = teacher_size(files, dtype.itemsize).weights * settings.workers, free_memory()
    if needed <= free:
        return
    copies = f" of {settings.workers} workers" if settings.workers > 1 else ""
    allowed = (
        f"needs {needed / 1e9:.1f} GB of memory for the weights{copies} in {str(dtype).removeprefix('torch.')}, and "
        f"{free / 1e9:.1f} GB are free; train a small teacher with `indra teacher`, give a smaller model, such as a "
        "small GGUF file, or the address of a server, or try it with `indra capture --batch-tokens 256`"
    )
    raise UserError("--teacher", settings.teacher, allowed)


def measured_device(settings: CaptureSettings) -> torch.device:
    """Return the device of this machine that auto looks at to choose for all workers.

    Raises:
        UserError: this machine does not have the workers' device.
    """
    from indraquantum.device import choose_device

    try:
        return choose_device(settings)
    except UserError:
        if settings.engine != "ray":
            raise
        allowed = (
            "must be a device of this machine, because auto looks at it; for a cluster's device, give --precision and "
            "--batch-tokens"
        )
        raise UserError("--device", settings.device, allowed) from None


def teacher_size(files: TeacherFiles, item_bytes: int) -> TeacherSize:
    """Estimate from the configuration how much memory the teacher takes with numbers of `item_bytes` bytes.

    Quantised weights take as much memory as their files.

    Raises:
        UserError: the configuration is not that of a causal LM, or a quantised teacher has no weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = teacher_config(files)
    with refused_in_one_line(files), torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).num_parameters()
        about = config.get_text_config()
        width = about.hidden_size
        inner = getattr(about, "intermediate_size", None) or 4 * width
        inner = max(inner) if isinstance(inner, list | tuple) else inner  # one for each layer, as in Gemma 3n
        # The logits; the gated MLP's two products and what becomes of them; states, queries, keys, values, copies.
        per_token = about.vocab_size + 4 * inner + 10 * width
    weight_bytes = weights * item_bytes
    if is_quantised(files):
        weight_bytes = sum(path.stat().st_size for path in files.weight_files())
    return TeacherSize(weight_bytes, per_token * item_bytes)


def free_memory() -> int:
    """Return the bytes of main memory that are available without swapping, within the limits of a container."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # not Linux: take half of all memory
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no limits of this kind
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used) + _cached_files()))


def _cached_files() -> int:
    """Return the bytes of a container's memory that hold copies of files, which the system drops when it needs room."""
    try:
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
