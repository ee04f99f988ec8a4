"""Draws the pictures of docs/loss.md from four real runs of the same model, which differ in the weights of the loss.

    make demo
    python docs/tools/loss_pictures.py demo runs/loss-pictures      about 14 minutes of one core

The data, the teacher's signals and the size of the model are the demo's. A term that a run leaves out has a weight of
1e-30. That is too small to change anything, but the term's value is still logged, and the picture can show it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from indraquantum.data.dataset import open_dataset
from indraquantum.evaluation.binned import readout_bins
from indraquantum.evaluation.figures import predict
from indraquantum.inference.load import load_model
from indraquantum.metrics import read_metrics
from indraquantum.smoothing import smoothed
from indraquantum.teacher.signals import verify_signals

PICTURES = Path(__file__).resolve().parent.parent / "pictures"
OFF = 1e-30  # 1e-9 is not small enough: Adam divides gradients by their size, so such a weight still moves the readout
# Weights of distillation, phase and magnitude.
RUNS = {
    "cross-entropy alone": (OFF, OFF, OFF),
    "+ alignment 0.5": (OFF, 0.5, 0.5),
    "+ distillation 0.9": (0.9, OFF, OFF),
    "+ distillation 0.9, alignment 0.5": (0.9, 0.5, 0.5),
}
_, _, WITHOUT, WITH = RUNS  # these two differ only in the alignment
STUDENT = (
    "--d-model 64 --layers 4 --mlp-width 344 --batch-tokens 2048 --learning-rate 4e-3 --threads 1 --epochs 3 "
    "--bias-start zeros --table-start normal --table-rate 50 --projector-rate 0.4 --residual=false --precision float32"
)
TERMS = {
    "ce": ("Cross-entropy", "nats per token"),
    "kd_estimate": ("Distillation (unbiased estimate)", "nats per token"),
    "phase": ("Phase term", "circular distance"),
    "magnitude": ("Magnitude term", "squared error"),
}


def train(demo: Path, work: Path, name: str, weights: tuple[float, float, float]) -> Path:
    """Train the run `name`, or finish it; return its folder of checkpoints."""
    folder = work / re.sub(r"[^a-z0-9.]+", "-", name).strip("-")
    kd, phase, magnitude = map(str, weights)
    subprocess.run(
        [sys.executable, "-m", "indraquantum", "train", "--data", demo / "data" / "mixed_train",
         "--output", folder, "--logs", work / "logs", *STUDENT.split(), "--kd-weight-start", kd,
         "--kd-weight-end", kd, "--phase-weight", phase, "--magnitude-weight", magnitude],
        check=True,
    )  # fmt: skip
    return folder


def draw_terms(runs: dict[str, list[dict]]) -> None:
    """Draw each term of every run over the steps, smoothed."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (term, (title, unit)) in zip(figure.subplots(2, 2).flat, TERMS.items(), strict=True):
        for name, metrics in runs.items():
            curve(axes, metrics, term, name, "--" if "alignment" in name else "-")  # dashed: some curves coincide
        finish(axes, title, unit, legend=(0.38, 0.2) if term in ("phase", "magnitude") else "best")
    figure.savefig(PICTURES / "loss_terms.png", dpi=100)


def draw_distillation(metrics: list[dict]) -> None:
    """Draw the divergence from the sampled tokens as given, and the estimate of the true one."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    curve(axes, metrics, "kd", "kd: from the sampled tokens as given")
    curve(axes, metrics, "kd_estimate", "kd_estimate: unbiased for the teacher's whole distribution")
    axes.set_ylim(bottom=0)
    finish(axes, "Distillation, measured in two ways", "nats per token")
    figure.savefig(PICTURES / "loss_distillation.png", dpi=100)


def draw_readouts(demo: Path, folders: dict[str, Path]) -> None:
    """Draw what magnitude and phase say at held-out positions over what the teacher says there."""
    dataset = open_dataset("--data", demo / "data" / "mixed_train")
    signals = verify_signals("--signals", demo / "data" / "teacher_signals", dataset)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = dict(zip(("magnitude", "phase"), figure.subplots(1, 2), strict=True))
    for name, label in ((WITHOUT, "without alignment"), (WITH, "with alignment")):
        checkpoint = sorted(folders[name].glob("checkpoint_v4_epoch_*.pt"))[-1]
        model, _ = load_model(checkpoint, torch.device("cpu"), "auto")
        found = predict(model, dataset.validation, torch.device("cpu"))
        for part, bins in readout_bins(found, signals, model.config.vocab_size).items():
            panels[part].errorbar(bins["x"], bins["y"], yerr=bins["y_std"], fmt="o-", capsize=3, label=label)
    panels["magnitude"].plot([0, 1], [0, 1], "k:", label="target")
    panels["phase"].axline((0, 0), slope=torch.pi / float(torch.log(torch.tensor(model.config.vocab_size))),
                           color="k", linestyle=":", label="target")  # fmt: skip
    finish(panels["magnitude"], "Magnitude", "magnitude of the state", "the teacher's confidence")
    finish(panels["phase"], "Phase", "phase of the state, radians", "the teacher's entropy, nats")
    figure.savefig(PICTURES / "loss_readouts.png", dpi=100)


def curve(axes: Axes, metrics: list[dict], term: str, label: str, style: str = "-") -> None:
    """Draw one smoothed curve, from step 20 on."""
    points = [(line["step"], line[term]) for line in metrics if line["step"] >= 20 and line[term] is not None]
    steps, values = zip(*points, strict=True)
    axes.plot(steps, smoothed(values, 0.95), style, label=label)


def finish(
    axes: Axes, title: str, y: str, x: str = "optimiser step", legend: str | tuple[float, float] = "best"
) -> None:
    """Add the title, the names of the axes, a grid and the legend."""
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc=legend)


def main(demo: Path, work: Path) -> None:
    """Train the runs that are missing, print their last held-out figures, and draw the pictures."""
    PICTURES.mkdir(exist_ok=True)
    folders = {name: train(demo, work, name, weights) for name, weights in RUNS.items()}
    runs = {name: read_metrics(work / "logs" / folder.name / "metrics.jsonl") for name, folder in folders.items()}
    for name, metrics in runs.items():
        last = [line for line in metrics if line["held_out"]][-1]
        print(f"{name}: held-out cross-entropy {last['held_out']['all']:.3f} at step {last['step']}")
    draw_terms(runs)
    draw_distillation(runs[WITHOUT])
    draw_readouts(demo, folders)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
