"""Small tasks for small models, through EleutherAI's lm-evaluation-harness, on text that no model was trained on.

    pip install 'indraquantum[lm-eval]'
    python benchmarks/small_tasks.py --wikitext wiki.valid.tokens --model plain A.pt B.pt --model signed C.pt D.pt

The text is the validation part of WikiText, in its own tokenisation, which is undone. The tasks are made from it:

- `verb`: a sentence with one of is, are, was, were, has, have, and the same sentence with the other number. The model
  is right if it gives the true sentence the higher probability. Guessing gives 0.5.
- `next`: which of four sentences follows the beginning of a paragraph? The others follow other beginnings. The model
  is right if it gives the true one the highest probability per character. Guessing gives 0.25.
- `last`: the last word of a sentence, predicted from the paragraph up to it. The model is right if each of its tokens
  is the likeliest one.

For each model, the table has the share of right answers, averaged over its checkpoints, and the difference from the
first model, question by question, with 95 % intervals over the questions. They hold for these checkpoints and
say nothing about other seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from indraquantum.ablation.intervals import interval
from indraquantum.data.detokenize import detokenize
from indraquantum.data.sources import read_wikitext

OTHER_NUMBER = {"is": "are", "are": "is", "was": "were", "were": "was", "has": "have", "have": "has"}
CONTEXT_WORDS, SENTENCE_WORDS = (15, 60), (5, 30)  # at least, at most; nearly all fit into 128 tokens
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: text
{answers}
metric_list: [{{metric: {metric}}}]
"""
CHOICES = "doc_to_choice: choices\ndoc_to_target: answer"
TASKS = {  # kind and answers of the harness, and the metric that counts
    "verb": ("multiple_choice", CHOICES, "acc"),
    "next": ("multiple_choice", CHOICES, "acc_norm"),
    "last": ("loglikelihood", "doc_to_target: last", "acc"),
}
Question = dict[str, Any]


def paragraphs(path: Path) -> Iterator[list[str]]:
    """Yield the sentences of each paragraph of a WikiText file."""
    for line in read_wikitext("--wikitext", str(path)):
        text = detokenize(line).strip()
        if text and not text.startswith("="):
            yield re.split(r"(?<=[.!?]) (?=[A-Z])", text)


def within(text: str, limits: tuple[int, int]) -> bool:
    """Whether `text` has at least and at most so many words."""
    return limits[0] <= len(text.split()) <= limits[1]


def usable(sentence: str) -> bool:
    """Whether the models may be asked for `sentence`: WikiText has <unk> in place of rare words."""
    return "<unk>" not in sentence and within(sentence, SENTENCE_WORDS)


def verb_questions(texts: list[list[str]]) -> Iterator[Question]:
    """Yield a question for each sentence with exactly one of the verbs."""
    for sentence in (sentence for sentences in texts for sentence in sentences):
        verbs = re.findall(rf"\b({'|'.join(OTHER_NUMBER)})\b", sentence)
        if len(verbs) == 1 and usable(sentence):
            wrong = re.sub(rf"\b{verbs[0]}\b", OTHER_NUMBER[verbs[0]], sentence)
            yield {"text": "", "choices": [sentence, wrong], "answer": 0}


def beginnings(texts: list[list[str]]) -> Iterator[tuple[str, str]]:
    """Yield the beginning of each paragraph, and the sentence after it."""
    for sentences in texts:
        for count in range(1, len(sentences)):
            before, after = " ".join(sentences[:count]), sentences[count]
            if within(before, CONTEXT_WORDS) and usable(after):
                yield before, after
                break


def next_questions(texts: list[list[str]]) -> Iterator[Question]:
    """Yield a question for each beginning. The other sentences come from paragraphs far away in the file."""
    pairs = list(beginnings(texts))
    for place, (before, _) in enumerate(pairs):
        others = [pairs[(place + far * len(pairs) // 4) % len(pairs)][1] for far in range(4)]
        turn = place % 4  # the true one stands at each place equally often
        choices = others[-turn:] + others[:-turn] if turn else others
        yield {"text": before, "choices": choices, "answer": turn}


def last_questions(texts: list[list[str]]) -> Iterator[Question]:
    """Yield a question for each beginning: the last word of the sentence after it."""
    for before, after in beginnings(texts):
        start, _, last = after.rstrip(".!?").rpartition(" ")
        if last.isalpha():
            yield {"text": f"{before} {start}", "last": f" {last}"}


def answers(checkpoint: Path, tasks: Path) -> dict[str, list[float]]:
    """Return for each task whether the checkpoint is right, question by question."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from indraquantum.inference.lm_eval import IndraQuantumLM

    found = lm_eval.simple_evaluate(
        IndraQuantumLM(str(checkpoint), batch_size=16),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["samples"]
    by_question = {name: sorted(found[name], key=lambda sample: sample["doc_id"]) for name in TASKS}
    return {name: [float(sample[TASKS[name][2]]) for sample in samples] for name, samples in by_question.items()}


def shown(values: list[float], sign: str = "") -> str:
    """Return the mean with its 95 % interval."""
    found = interval(values)
    return f"{found.mean:{sign}.4f} ± {found.half_width:.4f}"


def write_tasks(folder: Path, wikitext: Path) -> None:
    """Write questions and tasks for the harness, and print how many questions there are."""
    texts = list(paragraphs(wikitext))
    made = {"verb": verb_questions(texts), "next": next_questions(texts), "last": last_questions(texts)}
    for name, questions in made.items():
        lines = [json.dumps(question) for question in questions]
        file = folder / f"{name}.jsonl"
        file.write_text("\n".join(lines))
        kind, target, metric = TASKS[name]
        task = TASK.format(name=name, file=file, kind=kind, answers=target, metric=metric)
        (folder / f"{name}.yaml").write_text(task)
        print(f"{name}: {len(lines):,} questions")


def main() -> None:
    """Ask all models of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True, help="the validation part of WikiText")
    parser.add_argument(
        "--model", nargs="+", action="append", required=True, metavar=("NAME", "CHECKPOINT"),
        help="a name and its checkpoints, one for each seed",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    first: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # `datasets` reads these when it is imported.
        os.environ |= {"HF_DATASETS_CACHE": folder, "HF_DATASETS_OFFLINE": "1"}
        write_tasks(Path(folder), arguments.wikitext)
        print(f"{'model':16s} {'task':5s} right              minus {arguments.model[0][0]}")
        for name, *checkpoints in arguments.model:
            by_seed = [answers(Path(checkpoint), Path(folder)) for checkpoint in checkpoints]
            for task in TASKS:
                right = [statistics.fmean(hits) for hits in zip(*(seed[task] for seed in by_seed), strict=True)]
                against = first.setdefault(task, right)
                differences = [own - other for own, other in zip(right, against, strict=True)]
                beside = "" if against is right else shown(differences, "+")
                print(f"{name:16s} {task:5s} {shown(right)}    {beside}", flush=True)


if __name__ == "__main__":
    main()
