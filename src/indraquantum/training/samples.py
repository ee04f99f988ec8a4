"""Writes samples of text while a run trains, so that you can see what the model has learned: `--sample-every`.

They go to samples.jsonl beside the metrics, a JSON object on each line: `step`, `prompt` and `text`. The seed is fixed,
and torch's random state is restored, so the run's bits are the same with and without samples. A resumed run keeps the
lines up to its step, and a new one replaces the file, also without --sample-every.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from indraquantum.config import TestSettings
from indraquantum.data.prepared import PreparedDataset
from indraquantum.data.prompt import format_alpaca, prompt_ids
from indraquantum.data.tokenizer import TextTokenizer
from indraquantum.errors import UserError
from indraquantum.files import not_written, write_text
from indraquantum.processes import ALONE, Processes
from indraquantum.training.run import Run

NAME = "samples.jsonl"
ANSWER = format_alpaca("", "").rpartition("\n\n")[2]  # what an instruction's answer follows
SETTINGS = TestSettings(prompt="", max_new_tokens=64)  # as `indra test` samples
MOST_PROMPT_TOKENS = 256
PART_OF_TEXT = 24  # tokens of a text that are the prompt


class Samples:
    """Appends the samples of a run.

    Args:
        folder: the folder of the run's metrics.
        every: optimiser steps between two samples.
        prompts: the texts to continue.
    """

    def __init__(self, folder: Path, every: int, prompts: tuple[str, ...]) -> None:
        self._path, self._every, self._prompts = folder / NAME, every, prompts

    def __call__(self, run: Run) -> None:
        """Write the samples of the last finished step of `run`, if some are due.

        Raises:
            UserError: they can't be written.
        """
        if not run.step or (run.step % self._every and not run.finished):
            return
        found = [{"step": run.step, "prompt": prompt, "text": sample(run, prompt)} for prompt in self._prompts]
        content = "".join(f"{json.dumps(one)}\n" for one in found)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(content)
        except OSError as error:
            raise not_written("--logs", self._path, len(content), error) from None


def samples_of(run: Run, folder: Path, resumed_step: int | None) -> Samples | None:
    """Return what writes the samples that the settings of `run` ask for; None if they ask for none.

    Args:
        run: the run.
        folder: the folder of its metrics.
        resumed_step: the last step whose samples are kept; None keeps none.

    Raises:
        UserError: the file can't be written.
    """
    settings: Any = run.settings  # a teacher's have no samples
    every, path = getattr(settings, "sample_every", 0), folder / NAME
    if every or path.exists():
        _keep_up_to(path, resumed_step)
    if not every:
        return None
    prompts = settings.sample_prompt or held_out_prompts(run.dataset)
    return Samples(folder, every, prompts)


def held_out_prompts(dataset: PreparedDataset) -> tuple[str, ...]:
    """Return the beginning of the first held-out document of each source; of an instruction, all but the answer."""
    split, prompts = dataset.validation, []
    for source in range(len(dataset.source_names)):
        for document in np.flatnonzero(split.document_sources == source)[:1]:
            ids = split.tokens[split.document_offsets[document] : split.document_offsets[document + 1]]
            text = dataset.tokenizer.decode(ids.tolist())
            question, answer, _ = text.partition(ANSWER)
            part = dataset.tokenizer.decode(ids[: min(PART_OF_TEXT, max(1, len(ids) // 2))].tolist())
            while not text.startswith(part):  # it ends within a character
                part = part[:-1]
            prompts.append(question + answer if answer else part)
    return tuple(prompts)


@torch.no_grad()
def sample(run: Run, prompt: str) -> str:
    """Return what the model of `run` writes after `prompt`. If the run keeps averaged weights, it uses these."""
    tokenizer, model = run.dataset.tokenizer, run.model
    ids = torch.tensor([tokenizer.encode_prompt(prompt)[-MOST_PROMPT_TOKENS:]], device=run.device)
    training, devices = model.training, [] if run.device.type == "cpu" else [run.device]
    random_state = torch.random.fork_rng(devices, device_type=run.device.type)
    with run.average.in_place_of(model), random_state, _uncompiled(run.settings):
        torch.manual_seed(SETTINGS.seed)
        model.eval()
        try:
            written = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=SETTINGS.max_new_tokens,
                temperature=SETTINGS.temperature, top_k=SETTINGS.top_k, top_p=SETTINGS.top_p,
                eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id,
            )  # fmt: skip
        finally:
            model.train(training)
    return tokenizer.decode(written[0].tolist())[len(tokenizer.decode(ids[0].tolist())) :]


def _uncompiled(settings: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside, compiled layers run as they are: each new length would compile them again."""
    return torch.compiler.set_stance("force_eager") if settings.compile else contextlib.nullcontext()


def check_samples(settings: Any, tokenizer: TextTokenizer, processes: Processes = ALONE) -> None:
    """Check the settings of samples before a run in `processes` begins.

    Raises:
        UserError: no process holds the whole model, or it can't continue a prompt.
    """
    for prompt in settings.sample_prompt or ():
        prompt_ids("--sample-prompt", prompt, tokenizer)
    if settings.sample_every and settings.parallel == "fsdp2" and not processes.alone:
        allowed = "must be 0 with --parallel fsdp2, because no process holds the whole model"
        raise UserError("--sample-every", settings.sample_every, allowed)


def _keep_up_to(path: Path, step: int | None) -> None:
    """Write the samples at `path` again without those after `step`, which no longer belong to the run."""
    content = "" if step is None else "".join(_lines_up_to(path, step))
    try:
        write_text(path, content)
    except OSError as error:
        raise not_written("--logs", path, len(content), error) from None


def _lines_up_to(path: Path, step: int) -> list[str]:
    """Return the whole lines of samples up to `step`."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    kept = []
    for line in lines:
        try:
            found = json.loads(line)
            fits = type(found["step"]) is int and found["step"] <= step
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a crash of the machine damaged it
        if fits:
            kept.append(json.dumps(found) + "\n")
    return kept
