"""Preparation beside the tokenizer alone on the same text, and its peak memory at two sizes.

    python benchmarks/bench_prepare.py ../shared/data/wikitext/wiki.train.tokens ../shared/tokenizer --copies 4 16

The text is repeated to make it larger. Each run is a process of its own, whose peak resident memory the system counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from indraquantum.memory import peak_bytes

LINES = 1024  # given to encode_batch at once, as the preparation does


def tokenizer_alone(text: Path, tokenizer: str, folder: Path) -> int:
    """Encode every line that is a paragraph by `encode_batch` and nothing else; return the tokens."""
    from indraquantum.data.sources import read_wikitext
    from indraquantum.data.tokenizer import load_tokenizer

    backend, tokens, chunk = load_tokenizer("--tokenizer", tokenizer).backend, 0, []
    for line in read_wikitext("--wikitext", str(text)):
        chunk.append(line)
        if len(chunk) == LINES:
            tokens += sum(len(encoding) for encoding in backend.encode_batch(chunk, add_special_tokens=False))
            chunk = []
    return tokens + sum(len(encoding) for encoding in backend.encode_batch(chunk, add_special_tokens=False))


def whole_preparation(text: Path, tokenizer: str, folder: Path) -> int:
    """Run `indra prepare` on all of it; return the tokens without those that begin and end a document."""
    from indraquantum.config import PrepareSettings
    from indraquantum.data.prepare import prepare

    report = prepare(
        PrepareSettings(
            wikitext=str(text),
            wikitext_weight=1,
            alpaca_samples=0,
            tokenizer=tokenizer,
            document_start="eos",
            output=folder / "m.pkl",
        )
    )
    return sum(source.tokens - 2 * source.documents for source in report.sources)


RUNS = {"encode_batch": tokenizer_alone, "prepare": whole_preparation}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--copies", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--only", choices=RUNS, help="one run in this process, for the script itself")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only:
            started = time.perf_counter()
            tokens = RUNS[arguments.only](arguments.text, arguments.tokenizer, Path(folder))
            seconds = time.perf_counter() - started
            print(json.dumps({"tokens": tokens, "seconds": seconds, "peak": peak_bytes()}))
            return
        repeated = Path(folder) / "text.tokens"
        for copies in arguments.copies:
            with open(repeated, "wb") as file:
                for _ in range(copies):
                    file.write(arguments.text.read_bytes())
            print(f"{copies} copies, {repeated.stat().st_size / 1e6:,.1f} MB")
            for name in RUNS:
                command = [sys.executable, __file__, repeated, arguments.tokenizer, "--only", name]
                figures = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
                rate = figures["tokens"] / figures["seconds"]
                peak = "unknown" if figures["peak"] is None else f"{figures['peak'] / 2**20:,.0f} MiB"
                print(f"  {name:12} {rate:12,.0f} tokens/s {figures['seconds']:8.1f} s {peak:>12}")


if __name__ == "__main__":
    main()
