"""Measures a whole training step beside two ways to do the same without this project; `indra bench` prints the figures.

- `ours`: packed rows, the table lifted once, and the fused objective, as in `indra train`.
- `straightforward`: the same model on padded rows, with plain F.cross_entropy and KL over full logits.
- `llama`: transformers' own Llama of the same width and depth on packed rows, with CE and top-k KL from a cache.

All three take turns in one process, with the same optimiser and threads, on documents of the same lengths. Memory is
the peak of a separate process.

Legend: B rows, T positions, N labelled positions, D real width, V vocabulary, K kept teacher tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from indraquantum.config import BenchSettings
from indraquantum.data.packing import packed_split
from indraquantum.data.split import Split
from indraquantum.files import check_new_file, write_text
from indraquantum.kernels.measured import quickest_way
from indraquantum.kernels.onednn import has_16_bit_units
from indraquantum.kernels.ways import put_in_force
from indraquantum.loss_v2 import TeacherSignals
from indraquantum.memory import peak_bytes
from indraquantum.model.configuration import IndraQuantumConfig
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.training.engine import Engine
from indraquantum.training.parallel import Precision, SingleProcess
from indraquantum.training.step import StepInput
from indraquantum.trials.bench import (
    CUBE,
    MEBIBYTE,
    Figure,
    Shape,
    bytes_measured_by,
    figures_json,
    figures_table,
    interleaved_seconds,
    objective_memory,
    objective_speed,
)
from indraquantum.trials.costs import StepSize, step_flops

LEARNING_RATE = 1e-3


def bench(settings: BenchSettings) -> None:
    """Measure the objective and the training step, and print the figures: the command `indra bench`.

    Raises:
        UserError: the JSON file can't be written.
    """
    if settings.json_file:
        check_new_file("--json-file", settings.json_file)
    torch.set_num_threads(settings.threads)
    put_in_force(quickest_way())
    if settings.quick:
        shape, step, rows = Shape(128, 32, 1000, 4), StepShape(8, 1, 16, 300, 128, 1024, 4), (128,)
    else:
        shape, step, rows = Shape(), StepShape(), (512, 4096, 65_536)
    figures = objective_speed(shape, settings.repeats) + objective_memory(rows, shape)
    figures += step_speed(step, settings.repeats)
    figures += [] if settings.quick else step_memory(step)  # a process for each, which takes a while to start
    if settings.quick:  # the goals are for the full sizes
        figures = [replace(figure, goal=None) for figure in figures]
    print(figures_table(figures))
    if settings.json_file:
        write_text(settings.json_file, figures_json(figures) + "\n")


@dataclass(frozen=True)
class StepShape:
    """Sizes of the step; the defaults are the former ones of `indra train` on real text."""

    d_model: int = 128
    layers: int = 4
    mlp_width: int = 688
    vocabulary: int = 32_000
    row_length: int = 128
    step_tokens: int = 4096
    kept: int = 16

    @property
    def width(self) -> int:
        """Real width D."""
        return 2 * self.d_model

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.step_tokens // self.row_length


class RandomSignals:
    """Signals of K random tokens for each position, instead of a store on disk."""

    def __init__(self, shape: StepShape, positions: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, shape.vocabulary, (positions, shape.kept), generator=generator)
        self.entropy = torch.rand(positions, generator=generator) * 5
        self.confidence = torch.rand(positions, generator=generator)

    def batch(self, split: str, index_N: np.ndarray) -> TeacherSignals:
        """Return signals as SignalStore.batch does."""
        place_N = torch.from_numpy(index_N)
        ids_NK = self.ids[place_N]
        return TeacherSignals(
            ids_NK, torch.full(ids_NK.shape, 1 / ids_NK.shape[1]), self.entropy[place_N], self.confidence[place_N]
        )


def synthetic_split(shape: StepShape, documents: int = 400) -> Split:
    """Return random tokens in documents as long as those of WikiText and Alpaca.

    The lengths follow a log-normal law. Padded to 128, they give 28 % padding and cut off 30 % of the tokens; the real
    text gives 28 % and 29 %.
    """
    draw = np.random.Generator(np.random.Philox(key=[0, 0]))
    quantiles = np.array([NormalDist(4.6, 0.75).inv_cdf((i + 0.5) / documents) for i in range(documents)])
    lengths = draw.permutation(np.clip(np.exp(quantiles), 12, 1000).astype(np.int64))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = draw.integers(3, shape.vocabulary, offsets[-1]).astype(np.uint16)
    return packed_split(tokens, offsets, shape.row_length, padding_id=2)


@dataclass(frozen=True)
class Candidate:
    """One way to take a step."""

    step: Callable[[], object]
    tokens: int  # real tokens that a step sees
    labelled: int  # of them, those with a label


def ours(shape: StepShape, precision: torch.dtype = torch.float32) -> Candidate:
    """The step of `indra train`."""
    split = synthetic_split(shape)
    model = student(shape)
    batch = split.batch(np.arange(shape.rows))
    parallel = SingleProcess(model, precision=Precision(precision))
    engine, step = Engine(parallel, adamw(model)), taught_step(shape, split)
    return Candidate(partial(engine.step, step), int((batch.index >= 0).sum()), int(batch.labelled.sum()))


def taught_step(shape: StepShape, split: Split) -> StepInput:
    """The first rows of `split` with random signals, by v4's weights."""
    return StepInput(
        split=split,
        rows=np.arange(shape.rows),
        micro_batch_rows=shape.rows,
        learning_rate=LEARNING_RATE,
        signals=RandomSignals(shape, split.num_tokens),
        kd_weight=0.05,
        phase_weight=0.1,
        magnitude_weight=0.1,
    )


def straightforward(shape: StepShape) -> Candidate:
    """The same model on padded rows, one document a row and cut, with full logits."""
    split = synthetic_split(shape)
    model, signals = student(shape), RandomSignals(shape, shape.step_tokens)
    optimizer = adamw(model)
    ids_BT = torch.full((shape.rows, shape.row_length), split.padding_id)
    mask_BT = torch.zeros_like(ids_BT)
    by_length = np.argsort(np.diff(split.document_offsets))
    stride = len(by_length) // shape.rows
    for row, number in enumerate(by_length[stride // 2 :: stride][: shape.rows]):
        start, stop = split.document_offsets[number : number + 2]
        document = split.tokens[start : min(stop, start + shape.row_length)]
        ids_BT[row, : len(document)] = torch.from_numpy(document.astype(np.int64))
        mask_BT[row, : len(document)] = 1
    labels_BT = torch.full_like(ids_BT, -100)
    labels_BT[:, :-1] = torch.where(mask_BT[:, 1:] == 1, ids_BT[:, 1:], -100)
    teacher = signals.batch("train", np.arange(shape.step_tokens))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = model(ids_BT, attention_mask=mask_BT)
        amplitude_N = torch.polar(output.magnitude, output.phase).flatten()
        _full_logits_loss(output.logits, labels_BT, teacher, amplitude_N).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Candidate(step, int(mask_BT.sum()), int((labels_BT >= 0).sum()))


def llama(shape: StepShape) -> Candidate:
    """Llama of transformers, with CE and top-k KL on packed rows, without a mask between documents."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.mlp_width,
            num_hidden_layers=shape.layers, num_attention_heads=4, tie_word_embeddings=True,
        )
    ).train()  # fmt: skip
    optimizer = adamw(model)
    batch = synthetic_split(shape).batch(np.arange(shape.rows))
    ids_BT, labels_BT = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
    teacher = RandomSignals(shape, shape.step_tokens).batch("train", np.arange(shape.step_tokens))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        _full_logits_loss(logits_BTV, labels_BT, teacher, None).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Candidate(step, int((batch.index >= 0).sum()), int(batch.labelled.sum()))


CANDIDATES: dict[str, Callable[[StepShape], Candidate]] = {
    "ours": ours,
    "straightforward": straightforward,
    "llama": llama,
}


def student(shape: StepShape) -> IndraQuantumPhase2:
    """Return the model at these sizes, ready to train."""
    torch.manual_seed(0)
    config = IndraQuantumConfig(
        vocab_size=shape.vocabulary, d_model=shape.d_model, num_hidden_layers=shape.layers,
        intermediate_size=shape.mlp_width,
    )  # fmt: skip
    return IndraQuantumPhase2(config).train()


def matrix_flops(model: IndraQuantumPhase2, candidate: Candidate) -> int:
    """Return a step's FLOPs in the matrices of the layers and the head, without lifting, attention and padding."""
    flops = step_flops(model, StepSize(rows=candidate.tokens, row_length=1, labelled=candidate.labelled))
    return flops["layers"] + flops["objective"]


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser that all candidates use."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def _full_logits_loss(
    logits_BTV: Tensor, labels_BT: Tensor, teacher: TeacherSignals, amplitude_N: Tensor | None
) -> Tensor:
    """Return CE, KL to the kept tokens and, with an amplitude, the two alignment terms, written plainly."""
    logits_NV, labels_N = logits_BTV.flatten(0, 1), labels_BT.flatten()
    labelled_N = labels_N >= 0
    loss = F.cross_entropy(logits_NV, labels_N)
    student_NK = F.log_softmax(logits_NV, dim=-1).gather(1, teacher.ids_NK)
    kd_N = F.kl_div(student_NK, teacher.probs_NK, reduction="none").sum(-1)
    loss = loss + 0.05 * kd_N[labelled_N].mean()
    if amplitude_N is not None:
        target_N = torch.pi * teacher.entropy_N / np.log(logits_NV.shape[1])
        loss = loss + 0.1 * (1 - (amplitude_N.angle() - target_N).cos())[labelled_N].mean()
        loss = loss + 0.1 * (amplitude_N.abs() - teacher.confidence_N)[labelled_N].square().mean()
    return loss


def step_speed(shape: StepShape = StepShape(), repeats: int = 5) -> list[Figure]:
    """Time the three candidates beside a large matrix product."""
    square = torch.randn(CUBE, CUBE)
    product = torch.empty_like(square)
    candidates = {name: make(shape) for name, make in CANDIDATES.items()}
    if has_16_bit_units():
        candidates["bfloat16"] = ours(shape, torch.bfloat16)
    work = {"matmul": lambda: torch.mm(square, square, out=product)}
    seconds = interleaved_seconds(work | {name: c.step for name, c in candidates.items()}, repeats)
    limit = 2 * CUBE**3 / seconds["matmul"]
    rate = {name: c.tokens / seconds[name] for name, c in candidates.items()}
    model = student(shape)
    share = {name: matrix_flops(model, c) / seconds[name] / limit for name, c in candidates.items()}
    detail = f"medians of {repeats} rounds, {torch.get_num_threads()} threads, {shape}"
    filled = candidates["straightforward"].tokens / shape.step_tokens
    rounded = []
    if "bfloat16" in rate:
        ratio, detail_16 = rate["bfloat16"] / rate["ours"], f"--precision bfloat16: {rate['bfloat16']:.0f} tokens/s"
        rounded = [Figure("step_bfloat16_over_float32", ratio, "x", None, False, detail_16)]
    return [
        *rounded,
        Figure("step_mfu", share["ours"], "", 0.60, False, f"{rate['ours']:.0f} tokens/s; {detail}"),
        Figure(
            "step_over_straightforward", rate["ours"] / rate["straightforward"], "x", 4.0, False,
            f"{rate['straightforward']:.0f} real tokens/s, {filled:.0%} of its positions filled, "
            f"MFU {share['straightforward']:.2f}",
        ),
        Figure(
            "step_over_llama", rate["ours"] / rate["llama"], "x", 2.2, False,
            f"{rate['llama']:.0f} tokens/s, MFU {share['llama']:.2f}",
        ),
    ]  # fmt: skip


def step_memory(shape: StepShape = StepShape()) -> list[Figure]:
    """Return the peak memory of a step of ours and of the Llama's, each in its own process."""
    names, sizes = ("ours", "llama", "straightforward"), astuple(shape)
    peak = {name: bytes_measured_by("indraquantum.trials.bench_step", name, *sizes) for name in names}
    detail = ", ".join(f"{name} {'unknown' if x is None else f'{x / MEBIBYTE:.0f} MiB'}" for name, x in peak.items())
    ratio = peak["ours"] / peak["llama"] if peak["ours"] and peak["llama"] else None
    return [Figure("step_memory_against_llama", ratio, "x", 0.5, True, f"peak of a process: {detail}")]


def _peak_bytes(name: str, shape: StepShape) -> int | None:
    """Return the peak resident memory of this process after two steps."""
    step = CANDIDATES[name](shape).step
    step()
    step()
    return peak_bytes()


if __name__ == "__main__":
    print(json.dumps(_peak_bytes(sys.argv[1], StepShape(*map(int, sys.argv[2:])))))
