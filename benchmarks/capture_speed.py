"""Capture beside the teacher's bare forward pass, for a randomly initialised teacher of TinyLlama's exact shape.

    python benchmarks/capture_speed.py --threads 2

One process; bare and captured passes over the same rows and masks take turns, in an order that alternates. Prints
tokens per second of both, the median ratio by the wall clock and by the process's CPU time (which other work on the
machine distorts less), where capture's own time goes, the peak of memory, and the hours that the user's 9.5 million
positions would take. `--layers 2` is a quick look. The head's weights are scaled so that the logits spread as much as
a good teacher's: about 12 distinct ids of 50 draws a position.
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
from indraquantum.data.split import Split
from indraquantum.memory import peak_bytes
from indraquantum.teacher.manifest import Manifest, statistics_of
from indraquantum.teacher.shard_worker import Job, Plan, ShardWorker
from indraquantum.teacher.teacher_model import ModelAsker, Teacher

USER_POSITIONS = 9_500_000
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


def tinyllama(layers: int, dtype: torch.dtype, device: torch.device) -> Teacher:
    """TinyLlama-1.1B's shape with random weights."""
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
    return Teacher(model, device, str(dtype).removeprefix("torch."), VOCABULARY)


def packed_rows(rows: int) -> Split:
    """Full rows of three documents each."""
    lengths = np.tile([40, 59, 29], rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, offsets[-1]).astype(np.uint16)
    pieces = np.array([(begin, end - begin) for begin, end in pairwise(offsets.tolist())])
    return Split(tokens, offsets, np.zeros(len(lengths), np.uint8), pieces, np.arange(0, 3 * rows + 1, 3), ROW, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4, help="rows of 128 in each measured pass")
    parser.add_argument("--batch-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    teacher = tinyllama(options.layers, getattr(torch, options.dtype), device)
    split = packed_rows(options.rows)
    dataset = SimpleNamespace(train=split, row_length=ROW)
    sha = dict.fromkeys(("teacher_sha256", "tokenizer_sha256", "dataset_sha256"), "0" * 64)
    step = max(1, options.batch_tokens // ROW)
    manifest = Manifest(
        **sha, vocabulary_size=VOCABULARY, temperature=1.0, draws=50, seed=0, rows_per_shard=options.rows,
        teacher="random", teacher_revision=None, batch_rows=step, shards=(), complete=False,
        statistics=statistics_of(()),
    )  # fmt: skip
    batches = [split.batch(np.arange(i, min(i + step, options.rows))) for i in range(0, options.rows, step)]

    def bare() -> Clock:
        began = Clock.now()
        for batch in batches:
            logits = teacher.logits(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            del logits
        return began.since()

    def captured() -> Clock:
        with tempfile.TemporaryDirectory() as folder:
            settings = CaptureSettings()
            plan = Plan(settings, Path(folder), manifest, split.num_tokens, split.num_tokens, "")
            asker = ModelAsker(teacher, dataset, plan)
            worker = ShardWorker(plan, dataset, lambda: asker, lambda positions: None)
            began = Clock.now()
            entry = worker.shard(Job("train", 0, 0, options.rows)).entry
            clock = began.since()
        shard.update(bytes=entry.bytes / entry.positions, ids=entry.sums.ids / entry.positions)
        return clock

    spent: dict[str, float] = {}
    shard: dict[str, float] = {}
    bare(), captured()  # imports, page tables, caches
    rounds = []
    for number in range(options.rounds):  # the second of two may profit from the first
        order = (bare, captured) if number % 2 == 0 else (captured, bare)
        clocks = {pass_: pass_() for pass_ in order}
        rounds.append((clocks[bare], clocks[captured]))
        print(f"  bare {rounds[-1][0].wall:.2f} s, captured {rounds[-1][1].wall:.2f} s", flush=True)
    with timed_parts(spent):
        captured()
    tokens = split.num_tokens
    bare_rate, rate = (
        tokens / statistics.median(clock.wall for clock in column) for column in zip(*rounds, strict=True)
    )
    wall, cpu = (statistics.median(second[i] / first[i] for first, second in rounds) for i in (0, 1))
    bare_cpu = statistics.median(first.cpu for first, _ in rounds)
    print(f"{options.layers} layers, {options.dtype}, {device}, {options.threads} threads, {tokens} tokens a pass,"
          f" {options.batch_tokens} a batch")  # fmt: skip
    print(f"bare forward pass  {bare_rate:10.1f} tokens/s")
    print(f"capture            {rate:10.1f} tokens/s, ratio {wall:.3f}, by CPU time {cpu:.3f} (goal 1.05)")
    for name, seconds in spent.items():
        print(f"  {name:28} {seconds / tokens * 1e6:8.1f} us a token, {seconds / bare_cpu:6.2%} of the bare pass (CPU)")
    print(f"distinct ids       {shard['ids']:10.1f} a position, {shard['bytes']:.1f} bytes")
    print(f"peak memory        {(peak_bytes() or float('nan')) / 2**30:10.2f} GiB")
    if device.type == "cuda":
        print(f"peak on the device {torch.cuda.max_memory_allocated() / 2**30:10.2f} GiB")
    print(f"{USER_POSITIONS / 1e6} M positions {USER_POSITIONS / rate / 3600:8.2f} hours")


if __name__ == "__main__":
    main()
