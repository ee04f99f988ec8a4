"""Capture beside the teacher's bare forward pass, for a randomly initialised teacher of TinyLlama's exact shape.

    python benchmarks/capture_speed.py --threads 2

Prints tokens per second of both over the same rows, their ratio, the drawing's share, the peak of memory, and the
hours that the user's 9.5 million positions would take. `--layers 2` is a quick look.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from indraquantum.config import CaptureSettings
from indraquantum.data.dataset import Split
from indraquantum.teacher.manifest import Manifest, statistics_of
from indraquantum.teacher.shard_worker import Job, Plan, ShardWorker
from indraquantum.teacher.teacher_model import ModelAsker, Teacher

USER_POSITIONS = 9_500_000
ROW, VOCABULARY = 128, 32_000


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
    return Teacher(model, device, str(dtype).removeprefix("torch."))


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
    parser.add_argument("--rounds", type=int, default=3)
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
    manifest = Manifest(
        **sha, vocabulary_size=VOCABULARY, temperature=1.0, draws=50, seed=0, rows_per_shard=options.rows,
        teacher="random", teacher_revision=None, shards=(), complete=False, statistics=statistics_of(()),
    )  # fmt: skip
    step = max(1, options.batch_tokens // ROW)
    batches = [split.batch(np.arange(i, min(i + step, options.rows))) for i in range(0, options.rows, step)]

    def bare() -> float:
        began = time.perf_counter()
        for batch in batches:
            logits = teacher.logits(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            del logits
        return time.perf_counter() - began

    def captured() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = CaptureSettings(batch_tokens=options.batch_tokens)
            plan = Plan(settings, Path(folder), manifest, split.num_tokens, "")
            asker = ModelAsker(teacher, dataset, plan)
            worker = ShardWorker(plan, dataset, lambda: asker, lambda positions: None)
            began = time.perf_counter()
            result = worker.shard(Job("train", 0, 0, options.rows))
            seconds = time.perf_counter() - began
            captured.bytes_per_token = result.entry.bytes / result.entry.positions
            captured.ids = result.entry.sums.ids / result.entry.positions
        return seconds

    bare()
    rounds = [(bare(), captured()) for _ in range(options.rounds)]
    tokens = split.num_tokens
    bare_rate, rate = (tokens / statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(second / first for first, second in rounds)
    print(f"{options.layers} layers, {options.dtype}, {device}, {options.threads} threads, {tokens} tokens a pass")
    print(f"bare forward pass  {bare_rate:10.1f} tokens/s")
    print(f"capture            {rate:10.1f} tokens/s, ratio {ratio:.3f} (goal 1.05)")
    print(f"distinct ids       {captured.ids:10.1f} a position, {captured.bytes_per_token:.1f} bytes")
    print(f"peak memory        {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:10.2f} GiB")
    if device.type == "cuda":
        print(f"peak on the device {torch.cuda.max_memory_allocated() / 2**30:10.2f} GiB")
    print(f"{USER_POSITIONS / 1e6} M positions {USER_POSITIONS / rate / 3600:8.2f} hours")


if __name__ == "__main__":
    main()
