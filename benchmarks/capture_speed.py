"""Capture beside the teacher's bare forward pass, and number formats beside each other.

    python benchmarks/capture_speed.py --threads 2
    python benchmarks/capture_speed.py --teacher SmolLM2.gguf --data data/mixed --precision float32 mixed --rows 16

The teacher has TinyLlama's exact shape and random weights unless `--teacher` and `--data` give a real one and its rows.
One process; bare and captured passes over the same rows and masks take turns, in an order that alternates. For each
precision it prints tokens per second of both, the median ratio by the wall clock and by the process's CPU time (which
other work on the machine distorts less), where capture's own time goes, and the hours that 9.5 million positions would
take. Later precisions are compared with the first: the ratio of their speeds, and how far the distributions agree.
`--layers 2` is a quick look. The random head's weights are scaled so that the logits spread as much as a good
teacher's: about 12 distinct ids of 50 draws a position.
"""

from __future__ import annotations

import argparse
import contextlib
import pkgutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from indraquantum.config import CaptureSettings
from indraquantum.data.dataset import open_dataset
from indraquantum.data.split import Split
from indraquantum.memory import peak_bytes
from indraquantum.teacher.loading import load_teacher
from indraquantum.teacher.manifest import Manifest, statistics_of
from indraquantum.teacher.precision import compare
from indraquantum.teacher.shard_worker import Job, Plan, ShardWorker
from indraquantum.teacher.teacher_files import find_teacher
from indraquantum.teacher.teacher_model import ModelAsker, Teacher, keep_weights_rounded

DEFAULT_POSITIONS = 9_500_000  # of the default data
ROW, VOCABULARY = 128, 32_000
LOGITS_STD = 5.9
CAPTURE_PARTS = {  # function or method: what it is called in the report
    "indraquantum.teacher.sampling.position_signals": "reduce and draw",
    "indraquantum.teacher.sampling.row_uniforms": "uniforms",
    "indraquantum.teacher.journal.Journal.append": "journal",
    "indraquantum.teacher.shard_worker.write_shard": "pack, hash, write the shard",
}


class Clock(NamedTuple):
    """Seconds of the wall and of this process's CPU, all threads together."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        """Both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self) -> Clock:
        """Both clocks' advance."""
        now = self.now()
        return Clock(now.wall - self.wall, now.cpu - self.cpu)


@contextlib.contextmanager
def timed_parts(spent: dict[str, float]) -> Iterator[None]:
    """Add up the CPU seconds of capture's own parts."""
    with contextlib.ExitStack() as stack:
        for path, name in CAPTURE_PARTS.items():
            spent[name] = 0.0
            stack.enter_context(mock.patch(path, _timed(pkgutil.resolve_name(path), name, spent)))
        yield


def _timed(function: Callable, name: str, spent: dict[str, float]) -> Callable:
    def timed(*arguments: Any, **options: Any) -> Any:
        began = Clock.now()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += began.since().cpu

    return timed


def tinyllama(layers: int, precision: str, device: torch.device) -> Teacher:
    """TinyLlama-1.1B's shape with random weights."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rope = type(model.model.rotary_emb)(config).to(device)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.model.rotary_emb = rope
    for parameter in model.parameters():
        parameter.uniform_(-0.05, 0.05) if parameter.dim() > 1 else parameter.fill_(1.0)
    model.lm_head.weight.normal_(0, LOGITS_STD / config.hidden_size**0.5)  # the last norm leaves states of unit RMS
    if precision == "mixed":
        keep_weights_rounded(model)
    return Teacher(model, device, precision, VOCABULARY)


def packed_rows(rows: int) -> Split:
    """Full rows of three documents each."""
    lengths = np.tile([40, 59, 29], rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, offsets[-1]).astype(np.uint16)
    pieces = np.array([(begin, end - begin) for begin, end in pairwise(offsets.tolist())])
    return Split(tokens, offsets, np.zeros(len(lengths), np.uint8), pieces, np.arange(0, 3 * rows + 1, 3), ROW, 1)


def some_rows(split: Split, rows: int) -> Split:
    """The first rows of a split, as a split of its own."""
    last = split.row_pieces[rows]
    return Split(
        split.tokens, split.document_offsets, split.document_sources, split.pieces[:last], split.row_pieces[: rows + 1],
        split.row_length, split.padding_id,
    )  # fmt: skip


class Passes:
    """One teacher in one precision: its bare and its captured passes over the rows."""

    def __init__(self, teacher: Teacher, split: Split, batch_tokens: int) -> None:
        self.teacher, self.split = teacher, split
        rows, step = split.num_rows, max(1, batch_tokens // split.row_length)
        sha = dict.fromkeys(("teacher_sha256", "tokenizer_sha256", "dataset_sha256"), "0" * 64)
        self.manifest = Manifest(
            **sha, vocabulary_size=teacher.vocabulary_size, temperature=1.0, draws=50, seed=0, rows_per_shard=rows,
            teacher="benchmark", teacher_revision=None, batch_rows=step, shards=(), complete=False,
            statistics=statistics_of(()),
        )  # fmt: skip
        self.batches = [split.batch(np.arange(i, min(i + step, rows))) for i in range(0, rows, step)]
        self.shard: dict[str, float] = {}
        self.rounds: list[tuple[Clock, Clock]] = []

    def bare(self) -> Clock:
        """A forward pass over all batches."""
        began = Clock.now()
        for batch in self.batches:
            logits = self.teacher.logits(batch)
            if self.teacher.device.type == "cuda":
                torch.cuda.synchronize()
            del logits
        return began.since()

    def captured(self) -> Clock:
        """A capture of all rows."""
        dataset = SimpleNamespace(train=self.split, row_length=self.split.row_length)
        with tempfile.TemporaryDirectory() as folder:
            plan = Plan(CaptureSettings(), Path(folder), self.manifest, self.tokens, self.tokens, "")
            asker = ModelAsker(self.teacher, dataset, plan)
            worker = ShardWorker(plan, dataset, lambda: asker, lambda positions: None)
            began = Clock.now()
            entry = worker.shard(Job("train", 0, 0, self.split.num_rows)).entry
            clock = began.since()
        self.shard.update(bytes=entry.bytes / entry.positions, ids=entry.sums.ids / entry.positions)
        return clock

    @property
    def tokens(self) -> int:
        """Real positions of a pass."""
        return sum(int((batch.segments >= 0).sum()) for batch in self.batches)

    def round(self, number: int) -> None:
        """Time one pass of each; the second of two may profit from the first."""
        order = (self.bare, self.captured) if number % 2 == 0 else (self.captured, self.bare)
        clocks = {pass_.__name__: pass_() for pass_ in order}
        self.rounds.append((clocks["bare"], clocks["captured"]))

    def sample(self) -> torch.Tensor:
        """Logits of the first rows, (N, V)."""
        batch = self.split.batch(np.arange(min(8, self.split.num_rows)))
        return self.teacher.logits(batch)[batch.segments >= 0][:, : self.teacher.vocabulary_size].cpu()

    def print(self) -> None:
        """Print the figures."""
        spent: dict[str, float] = {}
        with timed_parts(spent):
            self.captured()
        bare_rate, rate = (
            self.tokens / statistics.median(clock.wall for clock in column) for column in zip(*self.rounds, strict=True)
        )
        wall, cpu = (statistics.median(second[i] / first[i] for first, second in self.rounds) for i in (0, 1))
        bare_cpu = statistics.median(first.cpu for first, _ in self.rounds)
        print(f"{self.teacher.precision}")
        print(f"bare forward pass  {bare_rate:10.1f} tokens/s")
        print(f"capture            {rate:10.1f} tokens/s, ratio {wall:.3f}, by CPU time {cpu:.3f} (goal 1.05)")
        for name, seconds in spent.items():
            per_token, share = seconds / self.tokens * 1e6, seconds / bare_cpu
            print(f"  {name:28} {per_token:8.1f} us a token, {share:6.2%} of the bare pass (CPU)")
        print(f"distinct ids       {self.shard['ids']:10.1f} a position, {self.shard['bytes']:.1f} bytes")
        print(f"{DEFAULT_POSITIONS / 1e6} M positions {DEFAULT_POSITIONS / rate / 3600:8.2f} hours")


def print_comparison(first: Passes, other: Passes) -> None:
    """Print how much faster another precision captures than the first one, and how far it agrees."""
    wall, cpu = (
        statistics.median(a[1][i] / b[1][i] for a, b in zip(first.rounds, other.rounds, strict=True)) for i in (0, 1)
    )
    names = f"{other.teacher.precision} against {first.teacher.precision}"
    found = compare(first.sample(), other.sample(), cpu)
    print(f"{names}: capture {wall:.2f} times as fast, by CPU time {cpu:.2f}")
    print(f"  on {found.positions} positions KL {found.kl_nats:.6f} nats a token, at most {found.largest_kl_nats:.4f}; "
          f"mean entropy {found.entropy_difference_nats:+.5f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="rows in each measured pass")
    parser.add_argument("--batch-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--precision", nargs="+", choices=["float32", "mixed", "bfloat16"], default=["float32"])
    parser.add_argument("--teacher", help="a real teacher, with --data")
    parser.add_argument("--data", type=Path, help="a prepared dataset, with --teacher")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if (options.teacher is None) != (options.data is None):
        parser.error("--teacher and --data go together")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.teacher:
        files, dataset = find_teacher("--teacher", options.teacher), open_dataset("--data", options.data)
        teachers = [load_teacher(files, dataset, device, name) for name in options.precision]
        split = some_rows(dataset.train, min(options.rows, dataset.train.num_rows))
    else:
        teachers = [tinyllama(options.layers, name, device) for name in options.precision]
        split = packed_rows(options.rows)
    all_passes = [Passes(teacher, split, options.batch_tokens) for teacher in teachers]
    for passes in all_passes:
        passes.bare(), passes.captured()  # imports, page tables, caches
    for number in range(options.rounds):
        for passes in all_passes:
            passes.round(number)
            bare, captured = (clock.wall for clock in passes.rounds[-1])
            print(f"  {passes.teacher.precision}: bare {bare:.2f} s, captured {captured:.2f} s", flush=True)
    print(f"{options.teacher or f'{options.layers} layers'}, {device}, {options.threads} threads,"
          f" {all_passes[0].tokens} tokens a pass, {options.batch_tokens} a batch")  # fmt: skip
    for passes in all_passes:
        passes.print()
    for passes in all_passes[1:]:
        print_comparison(all_passes[0], passes)
    print(f"peak memory        {(peak_bytes() or float('nan')) / 2**30:10.2f} GiB")
    if device.type == "cuda":
        print(f"peak on the device {torch.cuda.max_memory_allocated() / 2**30:10.2f} GiB")


if __name__ == "__main__":
    main()
