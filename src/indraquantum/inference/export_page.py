"""Writes a static page that runs the model in a browser: nothing that you type there leaves it.

The page shows each token's magnitude, phase, probability and alternatives. The folder holds the page (see web/), the
ONNX graph, the tokenizer, the runtime (see browser_runtime.py) and model.json, which says what the page must know. Any
server of files will do; browsers refuse to load a model from a file:// address.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from indraquantum import web
from indraquantum.config import ExportSettings, TestSettings
from indraquantum.errors import UserError
from indraquantum.files import write_json
from indraquantum.inference.browser_runtime import packed_runtime, unpack_runtime
from indraquantum.inference.export_onnx import FILES as OUTTYPES
from indraquantum.inference.export_onnx import agreement, need_packages, write_graph
from indraquantum.inference.load import Loaded
from indraquantum.inference.model_card import Exported

# The parts of a tokenizer.json that @huggingface/tokenizers knows.
KNOWN = {
    "model": {"BPE", "Unigram", "WordPiece"},
    "normalizer": {
        "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Precompiled", "Prepend", "Replace", "Sequence",
        "Strip", "StripAccents",
    },
    "pre_tokenizer": {
        "BertPreTokenizer", "ByteLevel", "Digits", "FixedLength", "Metaspace", "Punctuation", "Replace", "Sequence",
        "Split", "Whitespace", "WhitespaceSplit",
    },
    "decoder": {
        "BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Sequence", "Strip",
        "WordPiece",
    },
}  # fmt: skip
ASSETS = {
    "page.html": "index.html", "page.css": "page.css", "page.js": "page.js", "page_worker.js": "page_worker.js",
    "state.css": "state.css", "state.js": "state.js", "icon.svg": "icon.svg",
}  # fmt: skip
UNKNOWN_BEHAVIOURS = {"MergedWithPrevious", "MergedWithNext", "Contiguous"}
EXAMPLE = """```sh
python -m http.server --bind 127.0.0.1 --directory FOLDER    # then open http://127.0.0.1:8000
```

To show it to others, put the folder on any server of static files, such as GitHub Pages."""


def write(loaded: Loaded, folder: Path, settings: ExportSettings) -> Exported:
    """Write the model at `loaded` as a page into `folder`.

    Raises:
        UserError: a package, npm or the runtime is missing, the tokenizer does not run in a browser, or --outtype is a
            format of GGUF.
    """
    outtype = settings.outtype or "int8"
    if outtype not in OUTTYPES:
        raise UserError("--outtype", outtype, "must be int8 or f32 for --as page")
    need_packages("page")
    tokenizer = browser_tokenizer(loaded)
    packed = packed_runtime(settings.runtime)
    graph = folder / "model.onnx"
    write_graph(loaded.inference_model, graph, quantised=outtype == "int8")
    found = agreement(loaded.inference_model, graph)
    for source, name in ASSETS.items():
        (folder / name).write_bytes(web.asset(source))
    (folder / "runtime").mkdir()
    unpack_runtime(packed, folder / "runtime")
    (folder / "runtime" / "ort.LICENSE").write_bytes(web.asset("vendor/onnxruntime.LICENSE"))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    write_json(folder / "model.json", about(loaded, graph.stat().st_size))
    return Exported(
        use="`python -m http.server --bind 127.0.0.1 --directory FOLDER` shows it at http://127.0.0.1:8000.",
        example=EXAMPLE,
        notes=("The page makes no request to any other server.", str(found)),
        library="onnx",
    )


def about(loaded: Loaded, size: int) -> dict[str, Any]:
    """Return what the page must know about the model, whose graph takes `size` bytes."""
    shape, tokenizer, sampling = loaded.inference_model.config, loaded.tokenizer, TestSettings()
    return {
        "name": f"{loaded.path.resolve().parent.name}: an IndraQuantum model",
        "bytes": size,
        "layers": shape.num_hidden_layers,
        "heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "context": shape.max_position_embeddings,
        "vocabulary": shape.vocab_size,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "control": list(tokenizer.control_ids),
        "names": {str(token): tokenizer.backend.id_to_token(token) for token in tokenizer.control_ids},
        "aligned": None if loaded.aligned is None else sorted(loaded.aligned),
        "sampling": {name: getattr(sampling, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")},
    }


def browser_tokenizer(loaded: Loaded) -> dict[str, Any]:
    """Return the content of a tokenizer.json for the page.

    Special tokens and the post-processor are left out: text never becomes a control token, and the page adds BOS.

    Raises:
        UserError: the browser's tokenizer does not know a part of it.
    """
    whole = json.loads(loaded.tokenizer.to_json())
    for part, known in KNOWN.items():
        for step in _steps(whole.get(part)):
            kind, behaviour = step["type"], step.get("behavior")
            if kind not in known or behaviour in UNKNOWN_BEHAVIOURS:
                what = kind if kind not in known else f"{kind} with {behaviour}"
                name = part.replace("_", " ")
                raise UserError(
                    "--as", "page", f"must be another form: browsers don't know the tokenizer's {name} {what}"
                )
    kept = [token for token in whole["added_tokens"] if not token["special"]]
    return whole | {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None}


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a part of a tokenizer.json and, if it is a sequence, its steps."""
    if part is None:
        return
    yield part
    for name in ("normalizers", "pretokenizers", "decoders"):
        for step in part.get(name, ()):
            yield from _steps(step)
