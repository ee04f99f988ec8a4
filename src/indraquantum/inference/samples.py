"""Writes samples at fixed prompts with a fixed seed, and measures how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from indraquantum.config import TestSettings
from indraquantum.data.prompt import format_alpaca
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.inference.generate import Writer, generate_text

PROMPTS = (
    "The history of the city begins",
    "In the year 1998 , the company",
    "The future of AI is",
    format_alpaca("Name three colours.", ""),
    format_alpaca("Explain why the sky is blue.", ""),
    format_alpaca("Translate the sentence into French.", "The cat sleeps."),
)
SETTINGS = TestSettings(max_new_tokens=64, seed=0)  # temperature 0.8, top-p 0.95, top-k 50


@dataclass(frozen=True)
class Samples:
    """Texts, and figures over all of them. Words are separated by blanks."""

    texts: tuple[str, ...]  # one for each prompt, without it
    words: float  # of a text, mean
    distinct_1: float  # different words over words (arXiv 1510.03055)
    distinct_2: float  # different pairs of words over pairs
    repetition_4: float  # share of the runs of four words that occur earlier in the same text


def write_samples(model: Writer, tokenizer: TextTokenizer) -> Samples:
    """Continue each of PROMPTS with `model`, in evaluation mode."""
    return sample_figures([generate_text(model, tokenizer, SETTINGS, prompt).text for prompt in PROMPTS])


def sample_figures(texts: Sequence[str]) -> Samples:
    """Count words and repetitions in `texts`; a figure with nothing to count is NaN."""
    grams = {n: [gram for text in texts for gram in _grams(text, n)] for n in (1, 2)}
    repeated = [
        gram in earlier[:i] for text in texts for earlier in [_grams(text, 4)] for i, gram in enumerate(earlier)
    ]
    return Samples(
        texts=tuple(texts),
        words=len(grams[1]) / len(texts),
        distinct_1=_share(len(set(grams[1])), len(grams[1])),
        distinct_2=_share(len(set(grams[2])), len(grams[2])),
        repetition_4=_share(sum(repeated), len(repeated)),
    )


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
