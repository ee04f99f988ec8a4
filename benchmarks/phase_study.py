"""What the angles of trained models do: how large they are, and what the model loses when they are simplified.

    python benchmarks/phase_study.py --data data/mixed_32k CHECKPOINT ...

Prints, for each checkpoint and each of its ends (the inputs, the head), how large the angles P are over the tokens that
the training text has. Then the held-out loss of the model as it was trained, and with another map from (M, P) to states
in both ends, without training it again:

- `gate`: (M, M P), the state of small angles to first order; it differs from the angle by M P^2 / 2 and M P^3 / 6;
- `second order`: (M (1 - P^2 / 2), M P);
- `mean angle`: each dimension has one angle for all tokens, their mean, so the projector is linear;
- `no angle`: P = 0.

Losses are in nats per token, for all held-out text and by how often the label occurs in the training text.

Legend: V vocabulary, c complex width; `_..c` stands for any leading axes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from indraquantum.data.dataset import open_dataset
from indraquantum.data.prepared import PreparedDataset
from indraquantum.evaluation.figures import frequency_bands, predict
from indraquantum.inference.load import load_model
from indraquantum.model.modeling import IndraQuantumPhase2
from indraquantum.model.projector import QuantumProjector

States = Callable[[Tensor, Tensor], Tensor]
CPU = torch.device("cpu")


def gate(magnitude: Tensor, phase: Tensor) -> Tensor:
    """The states (..., 2c) of magnitudes and angles (..., c) to first order in the angle."""
    return torch.cat([magnitude, magnitude * phase], dim=-1)


def second_order(magnitude: Tensor, phase: Tensor) -> Tensor:
    """The states (..., 2c) of magnitudes and angles (..., c) to second order in the angle."""
    return torch.cat([magnitude * (1 - phase.square() / 2), magnitude * phase], dim=-1)


def no_angle(magnitude: Tensor, phase: Tensor) -> Tensor:
    """The states (..., 2c) of magnitudes (..., c) with angle 0."""
    return torch.cat([magnitude, torch.zeros_like(phase)], dim=-1)


def ends_of(model: IndraQuantumPhase2) -> dict[str, QuantumProjector]:
    """The model's projectors by the end that they serve."""
    if model.input_projector is None:
        return {"both ends": model.projector}
    return {"inputs": model.input_projector, "head": model.projector}


def mean_angle_of(projector: QuantumProjector, phase_Vc: Tensor, counts_V: Tensor) -> States:
    """States in which every token has the same angles: the mean direction, weighted by how often tokens occur."""
    weights_V1 = (counts_V / counts_V.sum())[:, None]
    mean_c = torch.atan2((weights_V1 * phase_Vc.sin()).sum(0), (weights_V1 * phase_Vc.cos()).sum(0))
    return lambda magnitude, phase: QuantumProjector.states(projector, magnitude, mean_c.expand_as(phase))


def describe(name: str, phase_Vc: Tensor, counts_V: Tensor) -> str:
    """A line on the size of the angles, in radians, over the tokens that occur."""
    sizes = phase_Vc[counts_V > 0].abs()
    parts = " ".join(f"{100 * (sizes > edge).double().mean():5.1f} %" for edge in (0.3, 1.0))
    root = sizes.square().mean().sqrt()
    lost = 1 - phase_Vc[counts_V > 0].cos().mean()
    return f"  {name:10s} root mean square {root:.3f}, above 0.3 and 1.0 rad: {parts}, mean 1 - cos P {lost:.3f}"


def study(path: Path, dataset: PreparedDataset) -> None:
    """Print the figures of the checkpoint at `path`."""
    model, tokenizer = load_model(path, CPU)
    counts = dataset.train.label_counts(tokenizer.vocabulary_size)
    counts_V = torch.from_numpy(counts)
    ends = ends_of(model)
    print(f"{path}\nAngles in radians over the tokens of the training text:")
    with torch.inference_mode():
        phases = {name: end.polar(model.get_input_embeddings().weight)[1] for name, end in ends.items()}
    for name, phase_Vc in phases.items():
        print(describe(name, phase_Vc, counts_V))
    print("Held-out loss, nats per token:")
    for variant in ("as trained", "second order", "gate", "mean angle", "no angle"):
        for name, end in ends.items():
            if variant != "as trained":
                means = mean_angle_of(end, phases[name], counts_V)
                end.states = {"gate": gate, "second order": second_order, "no angle": no_angle}.get(variant, means)
        found = predict(model, dataset.validation, CPU)
        bands = [f"{name}: {band.cross_entropy:.3f}" for name, band in frequency_bands(found, counts).items()]
        print(f"  {variant:12s} {found.loss_N.mean():.4f}   ({', '.join(bands)})", flush=True)


def main() -> None:
    """Study the checkpoints of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--data", type=Path, required=True, help="the prepared dataset that they were trained on")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dataset = open_dataset("--data", arguments.data)
    for path in arguments.checkpoints:
        study(path, dataset)


if __name__ == "__main__":
    main()
