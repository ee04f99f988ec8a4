"""What reading the teacher's signals costs a training step, at 12 and 24 distinct ids a position.

    python benchmarks/signals_speed.py --threads 2

Signals of 1.2 million positions in 145 shards, as many as the user's 9.5 million positions come in, so that the 32
random rows of a step lie in about as many files. Reading and the step of the user's scale (d_model 128, 4 layers,
V 32,000, 4,096 tokens) take turns in one process; files are in the system's cache, as they are from the second epoch
on. Medians by the wall clock and by the process's CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from indraquantum.teacher.manifest import Manifest, statistics_of, write_manifest
from indraquantum.teacher.sampling import PositionSignals
from indraquantum.teacher.shard import write_shard
from indraquantum.teacher.signals import SignalStore, open_signals
from indraquantum.trials.bench_step import StepShape, ours

SHARDS, SHARD_ROWS, DRAWS, VOCABULARY = 145, 64, 50, 32_000
SHA = "0" * 64


def random_signals(positions: int, mean_ids: int, generator: np.random.Generator) -> PositionSignals:
    """As many distinct ids a position as Poisson's law gives around the mean."""
    counts = np.clip(1 + generator.poisson(mean_ids - 1, positions), 1, DRAWS)
    entries = int(counts.sum())
    figures = 1 - generator.random((4, positions), np.float32) / 2
    return PositionSignals(
        generator.integers(0, VOCABULARY, entries), generator.integers(1, 9, entries), counts, *figures
    )


def store_of(folder: Path, shape: StepShape, mean_ids: int) -> SignalStore:
    """Write full rows of random signals and open them as training does."""
    generator, shard_positions = np.random.default_rng(mean_ids), SHARD_ROWS * shape.row_length
    offsets = np.arange(SHARDS * SHARD_ROWS + 1) * shape.row_length
    none = SimpleNamespace(num_rows=0, row_token_offsets=np.zeros(1, np.int64))
    train = SimpleNamespace(num_rows=SHARDS * SHARD_ROWS, row_token_offsets=offsets)
    tokenizer = SimpleNamespace(sha256=SHA, vocabulary_size=VOCABULARY)
    dataset = SimpleNamespace(train=train, validation=none, content_sha256=SHA, tokenizer=tokenizer)
    manifest = Manifest(
        teacher_sha256=SHA, tokenizer_sha256=SHA, dataset_sha256=SHA, vocabulary_size=VOCABULARY, temperature=1.0,
        draws=DRAWS, seed=0, rows_per_shard=SHARD_ROWS, teacher="random", teacher_revision=None, shards=(),
        complete=False, statistics=statistics_of(()),
    )  # fmt: skip
    folder.mkdir()
    shards = tuple(
        write_shard(
            folder, f"train-{number:06d}.safetensors", "train", (number * SHARD_ROWS, (number + 1) * SHARD_ROWS),
            random_signals(shard_positions, mean_ids, generator), manifest, "float32",
        )
        for number in range(SHARDS)
    )  # fmt: skip
    write_manifest(folder, manifest.model_copy(update={"shards": shards, "statistics": statistics_of(shards)}))
    return open_signals("--signals", folder, dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, generator = StepShape(), np.random.default_rng(0)
    step = ours(shape).step
    walls: dict[str, list[float]] = {}
    cpus: dict[str, list[float]] = {}

    with tempfile.TemporaryDirectory() as folder:
        stores = {f"{ids} ids": store_of(Path(folder) / str(ids), shape, ids) for ids in (12, 24)}
        for store in stores.values():  # every shard is open, as after the first steps
            store.batch("train", np.arange(SHARDS) * SHARD_ROWS * shape.row_length)
        for number in range(options.rounds + 1):
            rows = generator.choice(SHARDS * SHARD_ROWS, shape.rows, replace=False)
            index_N = (rows[:, None] * shape.row_length + np.arange(shape.row_length)).reshape(-1)
            reads = {name: lambda store=store, index_N=index_N: store.batch("train", index_N)
                     for name, store in stores.items()}  # fmt: skip
            for name, action in ({"step": step} | reads).items():
                wall, cpu = time.perf_counter(), time.process_time()
                action()
                if number:  # the first round warms up
                    walls.setdefault(name, []).append(time.perf_counter() - wall)
                    cpus.setdefault(name, []).append(time.process_time() - cpu)

    wall, cpu = ({name: statistics.median(values) for name, values in table.items()} for table in (walls, cpus))
    print(f"{options.threads} threads, {options.rounds} rounds, {shape.step_tokens:,} positions a step")
    for name in wall:
        shares = f"{wall[name] / wall['step']:8.3%} and {cpu[name] / cpu['step']:8.3%} of the step's"
        print(f"{name:8} {wall[name] * 1e3:9.2f} ms, {cpu[name] * 1e3:9.2f} ms of CPU: {shares} (goal 1 %)")


if __name__ == "__main__":
    main()
