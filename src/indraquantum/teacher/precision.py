"""Chooses the number format of a capture's teacher. It is chosen once, and a resumed capture keeps it.

A CPU with 16-bit units multiplies in bfloat16 several times as fast as in float32, but it rounds. So `--precision auto`
asks the teacher about a few held-out rows in float32 and in mixed precision (products and attention in bfloat16, all
else in float32). It takes mixed precision only if that is clearly faster here and the distributions agree. Short
captures always take float32.

Legend: B rows, T positions, N real positions, C positions of one chunk, V vocabulary.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from indraquantum.config import CaptureSettings
from indraquantum.progress import tell
from indraquantum.teacher.batch_size import measured_device, teacher_size
from indraquantum.teacher.loading import load_teacher, precision_name, teacher_config
from indraquantum.teacher.manifest import Agreement
from indraquantum.teacher.teacher_files import TeacherFiles

if TYPE_CHECKING:
    import torch

    from indraquantum.data.prepared import PreparedDataset
    from indraquantum.data.split import Batch
    from indraquantum.teacher.teacher_model import Teacher

MOST_KL, MOST_ENTROPY = 0.003, 0.01  # nats a token by which mixed precision may differ from float32 on average
LEAST_SPEEDUP = 1.2
SHORT = 10**13  # operations of a capture, which take a minute or two of one core in float32
SAMPLE = 1 << 25  # logits of the sample, which takes 192 MiB in both formats
_CHUNK = 1 << 22  # logits that are compared at once
_UNDERFLOW = -104.0  # less likely tokens add nothing that float32 could show


class Choice(NamedTuple):
    """The number format of a capture, and the measurement that chose it, if there was one."""

    precision: str
    agreement: Agreement | None


def choose_precision(
    settings: CaptureSettings, files: TeacherFiles, dataset: PreparedDataset, positions: int
) -> Choice:
    """Return the number format that `--precision` means for this capture.

    Args:
        settings: the command's options.
        files: the teacher.
        dataset: the dataset that it is to teach.
        positions: how many positions the capture asks about.

    Raises:
        UserError: the teacher can't teach this dataset, or auto must look at a device that this machine does not have.
    """
    if settings.precision != "auto":
        return Choice(settings.precision, None)
    device = measured_device(settings)
    if device.type != "cpu" or not _is_worth_a_try(files, positions):
        return Choice(precision_name(device, "auto"), None)
    batch = _sample_rows(dataset)
    exact, rounded = (_ask(files, dataset, device, name, batch) for name in ("float32", "mixed"))
    agreement = compare(exact.logits_NV, rounded.logits_NV, exact.seconds / rounded.seconds)
    chosen = "mixed" if is_good(agreement) else "float32"
    tell(
        f"capture: the teacher computes in precision {chosen}; on {agreement.positions} held-out positions mixed was "
        f"{agreement.speedup:.1f} times as fast as float32, its KL divergence was {agreement.kl_nats:.5f} nats a token,"
        f" and its mean entropy differed by {agreement.entropy_difference_nats:+.5f}"
    )
    return Choice(chosen, agreement)


def unmeasured_precision(settings: CaptureSettings) -> str:
    """Return the number format that `--precision` means without a measurement.

    Raises:
        UserError: auto must look at a device that this machine does not have.
    """
    given = settings.precision
    return precision_name(measured_device(settings), given) if given == "auto" else given


def is_good(agreement: Agreement) -> bool:
    """Return whether mixed precision is clearly faster than float32 and agrees with it."""
    near = agreement.kl_nats < MOST_KL and abs(agreement.entropy_difference_nats) < MOST_ENTROPY
    return near and agreement.speedup > LEAST_SPEEDUP


def compare(exact_NV: torch.Tensor, rounded_NV: torch.Tensor, speedup: float) -> Agreement:
    """Compare two formats' distributions.

    Args:
        exact_NV: the logits of float32.
        rounded_NV: those of the other format.
        speedup: the seconds of float32 divided by those of the other format.
    """
    import torch

    kl, differences = [], []
    step = max(1, _CHUNK // exact_NV.shape[1])
    for exact_CV, rounded_CV in zip(exact_NV.split(step), rounded_NV.split(step), strict=True):
        pair = (logits_CV.double().log_softmax(-1) for logits_CV in (exact_CV, rounded_CV))
        exact_CV, rounded_CV = (log_p_CV.clamp_(min=_UNDERFLOW) for log_p_CV in pair)  # excluded tokens are at -inf
        kl.append(torch.nn.functional.kl_div(rounded_CV, exact_CV, reduction="none", log_target=True).sum(-1))
        entropies = [torch.special.entr(log_p_CV.exp()).sum(-1) for log_p_CV in (rounded_CV, exact_CV)]
        differences.append(entropies[0] - entropies[1])
    kl_N = torch.cat(kl)
    return Agreement(
        positions=len(kl_N),
        kl_nats=float(kl_N.mean()),
        largest_kl_nats=float(kl_N.max()),
        entropy_difference_nats=float(torch.cat(differences).mean()),
        speedup=speedup,
    )


def _is_worth_a_try(files: TeacherFiles, positions: int) -> bool:
    """Return whether the CPU may be faster in mixed precision, and the capture is long enough to gain from it."""
    from indraquantum.kernels.onednn import has_16_bit_units

    if getattr(teacher_config(files), "quantization_config", None) is not None:  # its library chooses the formats
        return False
    return 2 * teacher_size(files, 1).weights * positions >= SHORT and has_16_bit_units()


def _sample_rows(dataset: PreparedDataset) -> Batch:
    """Return as many held-out rows as the sample has room for, at least one; training rows if none are held out."""
    split = dataset.validation if dataset.validation.num_rows else dataset.train
    room = max(1, SAMPLE // (dataset.row_length * dataset.tokenizer.vocabulary_size))
    return split.batch(np.arange(min(room, split.num_rows)))


class _Answers(NamedTuple):
    logits_NV: torch.Tensor
    seconds: float  # of the CPU, for a pass over the sample


def _ask(files: TeacherFiles, dataset: PreparedDataset, device: torch.device, name: str, batch: Batch) -> _Answers:
    """Load the teacher in one format and ask it. Its memory is released at the end."""
    teacher: Teacher = load_teacher(files, dataset, device, name)
    teacher.logits(batch)  # libraries set themselves up at first use
    began = time.process_time()
    logits_BTV = teacher.logits(batch)
    seconds = time.process_time() - began
    return _Answers(logits_BTV[batch.segments >= 0][:, : teacher.vocabulary_size], seconds)
