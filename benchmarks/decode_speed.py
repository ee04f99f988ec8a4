"""How fast a model writes: ours, and transformers' Llama of the same width and depth, one token of each text a step.

    python benchmarks/decode_speed.py --threads 1 --batch 1 8
    python benchmarks/decode_speed.py --gguf model-f32.gguf   # llama.cpp too (pip install xllamacpp)

Random weights of the default shape, V = 32,000. The models take turns in one process, round by round. A step is the
choice of a token, greedy or with the default sampling, and the logits after it. `indra chat` and `indra serve` keep a
table of the inputs' states too. Llama's step is its own forward with its cache, and the same choice. Medians of the
steps of all rounds: by the wall clock, and by the process's CPU time, which other programs on the machine disturb less
(with one thread, both are the same on an idle machine).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from indraquantum.config import TestSettings
from indraquantum.inference.generate import choose
from indraquantum.model import IndraQuantumConfig, IndraQuantumPhase2
from indraquantum.model.decoder import Decoder, PackedModel
from indraquantum.model.inference_model import InferenceModel
from indraquantum.model.shape import ModelShape

VOCABULARY, PROMPT = 32_000, 32
Step = Callable[[], object]


def our_steps(model: InferenceModel, batch: int, settings: TestSettings, gather: bool) -> Iterator[Step]:
    """Yield steps of ours, each after the one before."""
    packed = PackedModel(model, gather)
    decoder = Decoder(packed, batch)
    states = decoder.begin(torch.randint(3, VOCABULARY, (batch, PROMPT)).tolist())[:, -1]

    def step() -> None:
        nonlocal states
        states = decoder.step(choose(packed.logits(states), settings)[:, 0])

    while True:
        yield step


def llama_steps(model: LlamaForCausalLM, batch: int, settings: TestSettings) -> Iterator[Step]:
    """Yield steps of transformers' Llama."""
    output = model(torch.randint(3, VOCABULARY, (batch, PROMPT)), use_cache=True, logits_to_keep=1)

    def step() -> None:
        nonlocal output
        read = choose(output.logits[:, -1], settings)
        output = model(read, past_key_values=output.past_key_values, use_cache=True)

    while True:
        yield step


@torch.no_grad()
def measured(
    makers: dict[str, Callable[[], Iterator[Step]]], rounds: int, tokens: int
) -> dict[str, tuple[float, float]]:
    """Return the median of a step of each, in ms: by the wall clock and by CPU time."""
    walls: dict[str, list[float]] = {name: [] for name in makers}
    works: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            steps = make()
            for number in range(tokens + 2):
                step, wall, work = next(steps), time.perf_counter(), time.process_time()
                step()
                if number >= 2:
                    works[name].append(time.process_time() - work)
                    walls[name].append(time.perf_counter() - wall)
            steps.close()  # type: ignore[attr-defined]
    return {name: (1e3 * statistics.median(walls[name]), 1e3 * statistics.median(works[name])) for name in makers}


def llama_cpp(file: Path, threads: int, tokens: int) -> float:
    """Return the tokens/s that llama.cpp reports for a file of `indra export --as gguf`, one text, greedy."""
    import json
    import urllib.request

    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.cpuparams.n_threads = threads
    server = xllamacpp.Server(parameters)
    body = {"prompt": list(range(3, 3 + PROMPT)), "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode())
    answers = [json.loads(urllib.request.urlopen(request).read()) for _ in range(5)]
    return statistics.median(answer["timings"]["predicted_per_second"] for answer in answers)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--gguf", type=Path, help="a file of `indra export --as gguf`, of the default shape")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = IndraQuantumConfig(vocab_size=VOCABULARY)
    full = IndraQuantumPhase2(config).eval()
    ours = InferenceModel(ModelShape.from_values(config.to_dict()), full.state_dict())
    layers = full.config.backbone()
    llama = LlamaForCausalLM(LlamaConfig(**{**layers.to_dict(), "vocab_size": VOCABULARY})).eval()
    for batch in options.batch:
        for name, settings in {"greedy": TestSettings(temperature=0), "default sampling": TestSettings()}.items():
            figures = measured(
                {
                    "ours, as indra test": lambda b=batch, s=settings: our_steps(ours, b, s, False),
                    "ours, as indra chat and serve": lambda b=batch, s=settings: our_steps(ours, b, s, True),
                    "Llama of transformers": lambda b=batch, s=settings: llama_steps(llama, b, s),
                },
                options.rounds,
                options.tokens,
            )
            for who, (wall, work) in figures.items():
                rate = 1e3 * batch / wall
                print(f"batch {batch}, {name}, {who}: {wall:.2f} ms a step ({work:.2f} of CPU), {rate:.0f} tokens/s")
    if options.gguf:
        rate = llama_cpp(options.gguf, options.threads, options.tokens)
        print(f"llama.cpp, {options.gguf.name}, one text, greedy: {1e3 / rate:.2f} ms a step, {rate:.0f} tokens/s")


if __name__ == "__main__":
    main()
