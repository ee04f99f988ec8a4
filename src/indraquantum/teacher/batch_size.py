"""How many rows the teacher reads at once: as many as help its speed and as the free memory holds.

Products of other shapes round otherwise, so the last bits of a shard depend on this number: it is chosen once, stands
in the manifest, and a capture that goes on keeps it, whatever memory is free by then.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from indraquantum.config import CaptureSettings
from indraquantum.teacher.teacher_model import TeacherFiles, compute_dtype, refused_in_one_line, teacher_config

CPU_TOKENS, ACCELERATOR_TOKENS = 2048, 16_384  # larger batches bring no speed, and a kill loses one
SERVER_TOKENS = 2048
FREE_SHARE = 0.5  # of what is free beside the weights: other programs want some, and the estimate is rough
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class TeacherSize(NamedTuple):
    """What a teacher takes."""

    weights: int  # bytes
    token: int  # bytes for each token of a batch, at the peak of the forward pass and the reduction behind it


def choose_batch_rows(settings: CaptureSettings, files: TeacherFiles | None, row_length: int) -> int:
    """Rows of a batch: those of `--batch-tokens`, or what fits; at least one.

    Args:
        settings: the command's options.
        files: the teacher; None for a server.
        row_length: tokens of a row.
    """
    tokens = settings.batch_tokens
    if tokens == "auto":
        tokens = SERVER_TOKENS if files is None else _tokens_that_fit(settings, files)
    return max(1, tokens // row_length)


def _tokens_that_fit(settings: CaptureSettings, files: TeacherFiles) -> int:
    import torch

    from indraquantum.device import choose_device

    device = choose_device(settings)
    size = teacher_size(files, compute_dtype(device, settings.precision).itemsize)
    free, copies = free_memory(), settings.workers if settings.engine == "local" else 1
    if device.type == "cuda":
        free, copies = torch.cuda.mem_get_info(device)[0], -(-copies // torch.cuda.device_count())
    most = CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS
    return min(most, max(0, int(FREE_SHARE * (free / copies - size.weights) / size.token)))


def teacher_size(files: TeacherFiles, item_bytes: int) -> TeacherSize:
    """Estimate from the configuration what the teacher takes when it computes in numbers of `item_bytes`.

    Raises:
        UserError: no configuration of a causal LM.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = teacher_config(files)
    with refused_in_one_line(files), torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).num_parameters()
        about = config.get_text_config()
        width = about.hidden_size
        inner = getattr(about, "intermediate_size", None) or 4 * width
        # The logits; the gated MLP's two products and what becomes of them; states, queries, keys, values, copies.
        per_token = about.vocab_size + 4 * inner + 10 * width
    return TeacherSize(weights * item_bytes, per_token * item_bytes)


def free_memory() -> int:
    """Bytes of main memory that can be had without swapping, within the limits of a container."""
    try:
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError):  # not Linux: half of what there is
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
    except OSError:  # no limits of this kind
        return free
