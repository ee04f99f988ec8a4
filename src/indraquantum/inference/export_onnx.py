"""Writes the model for onnxruntime, in float32 or int8, as a folder that optimum and transformers.js can load.

The folder is laid out as transformers.js wants it: `onnx/model.onnx` (float32), `onnx/model_quantized.onnx` (int8), a
config.json, and the tokenizer's files. config.json calls the model a Llama: a graph brings its own computation, and
what a runtime reads there are the sizes of the cache. onnx_graph.py says what is in the graph.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from indraquantum.config import ExportSettings
from indraquantum.data.fast_tokenizer import chat_template, save_chat_tokenizer
from indraquantum.errors import UserError, optional_package
from indraquantum.inference.export_llama import Agreement, agreement_of, llama_config
from indraquantum.inference.export_transformers import give_generation_config
from indraquantum.inference.load import Loaded
from indraquantum.inference.model_card import Exported
from indraquantum.inference.onnx_graph import names, onnx_graph, quiet
from indraquantum.model.inference_model import InferenceModel

if TYPE_CHECKING:
    from onnx import ModelProto

FILES = {"f32": "model.onnx", "int8": "model_quantized.onnx"}  # the names of transformers.js, in the folder `onnx`
EXAMPLE = """```js
import { AutoModelForCausalLM, AutoTokenizer } from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("FOLDER");
const model = await AutoModelForCausalLM.from_pretrained("FOLDER", { dtype: "DTYPE" });
const chat = [{ role: "user", content: "Name three colours." }];
const inputs = tokenizer.apply_chat_template(chat, { add_generation_prompt: true, return_dict: true });
const written = await model.generate({ ...inputs, max_new_tokens: 50 });
console.log(tokenizer.batch_decode(written, { skip_special_tokens: true })[0]);
```"""
NOTES = (
    "The graph has two outputs more than a Llama's: `magnitude` and `phase`, the model's own confidence and "
    "uncertainty at each position.",
    "config.json calls the model a Llama, because runtimes read only the sizes of the cache there.",
)


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Exported:
    """Write the model at `loaded` into `folder`.

    Raises:
        UserError: a package is missing, --outtype is a format of GGUF, or the model is too large for a file of ONNX.
    """
    outtype = settings.outtype or "f32"
    if outtype not in FILES:
        raise UserError("--outtype", outtype, f"must be f32 or int8 for --as {settings.as_}")
    need_packages(settings.as_)
    (folder / "onnx").mkdir()
    file = folder / "onnx" / FILES[outtype]
    write_graph(loaded.inference_model, file, quantised=outtype == "int8")
    found = agreement(loaded.inference_model, file)
    write_config(loaded, folder)
    write_tokenizer(loaded, folder)
    return Exported(
        use=f"onnxruntime runs onnx/{file.name}; transformers.js and optimum load the folder.",
        example=EXAMPLE.replace("DTYPE", "q8" if outtype == "int8" else "fp32"),
        notes=(*NOTES, str(found)),
        library="transformers.js",
    )


def need_packages(form: str) -> None:
    """Check that the packages of the extra `onnx` are there.

    Raises:
        UserError: one is missing.
    """
    with optional_package("--as", form, "onnxscript", "indraquantum[onnx]"):
        import onnxscript  # noqa: F401
    with optional_package("--as", form, "onnxruntime", "indraquantum[onnx]"):
        import onnxruntime.quantization  # noqa: F401


def write_graph(model: InferenceModel, file: Path, quantised: bool) -> None:
    """Write `model` as a graph into `file`, in float32 or `quantised`."""
    import onnx

    graph = onnx_graph(model, lifted=quantised)
    if quantised:
        quantise(graph, file)
    else:
        onnx.save(graph, file)


def quantise(graph: ModelProto, file: Path) -> None:
    """Write `graph` with weights of 8 bits into `file`. Activations are rounded to 8 bits while it runs.

    The weights are unsigned, because products with signed ones overflow on x86 processors without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(graph, file, weight_type=QuantType.QUInt8)


def write_config(loaded: Loaded, folder: Path) -> None:
    """Write config.json and generation_config.json."""

    class Described:
        config: Any = llama_config(loaded, architectures=["LlamaForCausalLM"])
        generation_config: Any = None

    give_generation_config(Described, loaded)
    Described.config.save_pretrained(folder)
    Described.generation_config.save_pretrained(folder)


def write_tokenizer(loaded: Loaded, folder: Path) -> None:
    """Write the tokenizer's files, with the chat template where transformers.js looks for it."""
    save_chat_tokenizer(loaded.tokenizer, folder, loaded.inference_model.config.max_position_embeddings)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    template = chat_template(loaded.tokenizer)
    config.write_text(json.dumps(values | {"chat_template": template}, indent=2) + "\n", encoding="utf-8")


def session(file: Path, threads: int = 1) -> Any:
    """Return an onnxruntime session of the graph in `file`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def agreement(model: InferenceModel, file: Path) -> Agreement:
    """Compare the graph in `file` with the trained model on random tokens."""
    running = session(file)

    def logits_of(ids_BT: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(running.run(["logits"], feed(model, ids_BT))[0])

    return agreement_of(model, logits_of)


def feed(model: InferenceModel, ids_BT: torch.Tensor) -> dict[str, Any]:
    """Return the graph's inputs for whole texts (B, T) without padding, and an empty cache."""
    shape = model.config
    heads = shape.key_value_heads
    rows, length = ids_BT.shape
    cache = torch.zeros(rows, heads, 0, shape.head_dim)
    inputs, _ = names(model)
    positions = torch.arange(length).expand(rows, -1)
    values = [ids_BT, torch.ones_like(ids_BT), positions, *[cache] * (len(inputs) - 3)]
    return {name: value.contiguous().numpy() for name, value in zip(inputs, values, strict=True)}
