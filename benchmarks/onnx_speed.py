"""An exported graph beside the model in PyTorch: size, tokens a second, and held-out cross-entropy.

    python benchmarks/onnx_speed.py CHECKPOINT --data data/mixed_train

Graphs in float32 and int8 are made in a temporary folder: without a lifted table, with that of the outputs, and with
those of both ends. `indra export` writes the first in float32 and the second in int8. Each way writes tokens one by one
after a text of 64, in turns over several rounds; the best round by CPU time counts. The cross-entropy is that of
validation rows, each of which is read as one text.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F

from indraquantum.data.dataset import open_dataset
from indraquantum.inference import onnx_graph
from indraquantum.inference.export_onnx import feed, quantise, session
from indraquantum.inference.load import load
from indraquantum.model.inference_model import InferenceModel

CONTEXT, SECONDS = 64, 1.0


class Way(NamedTuple):
    """One way to run the model."""

    size: int  # bytes of its weights or file
    logits: Callable[[torch.Tensor], torch.Tensor]  # of whole texts (B, T)
    step: Callable[[], object]  # writes a token after CONTEXT others


class BothTables(onnx_graph.Graph):
    """The inputs' states are read from a lifted table too."""

    def __init__(self, model: InferenceModel, lifted: bool) -> None:
        super().__init__(model, lifted)
        self.register_buffer("inputs_VD", model.input_table().detach().clone())

    def input_states(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the states of token ids."""
        return F.embedding(ids, self.inputs_VD)


def in_torch(model: InferenceModel, ids_BT: torch.Tensor) -> Way:
    table_VD = model.lift_table()
    _, decoder = model.next_logits(ids_BT[:1, :CONTEXT])

    def step() -> None:
        decoder.lengths[:] = [CONTEXT]  # the text does not grow
        model.next_logits(ids_BT[:1, :1], decoder)

    return Way(
        size=sum(value.numel() * value.element_size() for value in model.state_dict().values()),
        logits=lambda ids: model.logits(model.hidden_states(ids), table_VD),
        step=step,
    )


def in_onnxruntime(model: InferenceModel, file: Path, ids_BT: torch.Tensor) -> Way:
    running = session(file)
    first = running.run(None, feed(model, ids_BT[:1, :CONTEXT]))
    inputs, outputs = onnx_graph.names(model)
    found = dict(zip(outputs, first, strict=True))
    step = {
        "input_ids": ids_BT[:1, :1].numpy(),
        "attention_mask": np.ones((1, CONTEXT + 1), np.int64),
        "position_ids": np.full((1, 1), CONTEXT),
    }
    step |= {name: found[name.replace("past_key_values", "present")] for name in inputs[3:]}
    return Way(
        size=file.stat().st_size,
        logits=lambda ids: torch.from_numpy(running.run(["logits"], feed(model, ids))[0]),
        step=lambda: running.run(None, step),
    )


def speed(way: Way) -> float:
    started, count = time.process_time(), 0
    while time.process_time() - started < SECONDS:
        way.step()
        count += 1
    return count / (time.process_time() - started)


def cross_entropy(way: Way, ids_BT: torch.Tensor) -> float:
    losses = [
        F.cross_entropy(way.logits(ids_BT[row : row + 8, :-1]).flatten(0, 1), ids_BT[row : row + 8, 1:].flatten())
        for row in range(0, len(ids_BT) - 7, 8)
    ]
    return torch.stack(losses).mean().item()


def save(model: InferenceModel, folder: Path, name: str, lifted: bool) -> dict[str, Path]:
    graph = onnx_graph.onnx_graph(model, lifted)
    files = {f"{name}, f32": folder / f"{name}-f32.onnx", f"{name}, int8": folder / f"{name}-int8.onnx"}
    onnx.save(graph, files[f"{name}, f32"])
    quantise(graph, files[f"{name}, int8"])
    return files


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load(options.checkpoint, torch.device("cpu")).inference_model
    split = open_dataset("--data", options.data).validation
    ids_BT = torch.from_numpy(split.batch(np.arange(min(options.rows, split.num_rows))).input_ids).long()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = save(model, folder, "no table", lifted=False) | save(model, folder, "lifted table", lifted=True)
        onnx_graph.Graph = BothTables
        files |= save(model, folder, "both tables", lifted=True)
        ways = {form: in_onnxruntime(model, file, ids_BT) for form, file in files.items()}
        ways = {"PyTorch": in_torch(model, ids_BT)} | ways
        best = dict.fromkeys(ways, 0.0)
        for _ in range(options.rounds):
            best |= {form: max(best[form], speed(way)) for form, way in ways.items()}
        for form, way in ways.items():
            loss = cross_entropy(way, ids_BT)
            print(f"{form:18} {way.size / 1e6:7.1f} MB {best[form]:7.0f} tokens/s {loss:.5f} nats a token", flush=True)


if __name__ == "__main__":
    main()
