"""Which exports the shape of a model allows. It is known before training, so the dry run prints it."""

from __future__ import annotations

import math

from indraquantum.model.shape import ModelShape

BLOCK = 32  # numbers that GGUF's q8_0 stores together; every row must be a multiple
K_BLOCK = 256  # the same of the K formats, which llama.cpp's own llama-quantize makes


def folded_width(width: int, heads: int, has_bias: bool) -> int:
    """Return the width W of the folded Llama for a model of `width`: a bias needs one channel more, in whole blocks."""
    if not has_bias:
        return width
    step = math.lcm(BLOCK, heads)
    return width // step * step + step


def exports_of(shape: ModelShape) -> str:
    """Return in one line which values of `indra export --as` a model of this shape allows."""
    if shape.head != "interference":
        return f"transformers, onnx, page; not llama and gguf, whose logits are linear, because of --head {shape.head}"
    width, layers = shape.hidden_size, shape.num_hidden_layers
    llama = "llama"
    if shape.bias == "learned":
        wide = folded_width(width, shape.num_attention_heads, has_bias=True)
        llama += f" ({layers + 1} layers of width {wide} to hold the bias; {layers} of {width} with --bias none)"
    formats = ["f32", "f16"]
    missing: list[str] = []
    for name, block in (("q8_0", BLOCK), ("K formats", K_BLOCK)):
        fits = width % block == 0
        (formats if fits else missing).append(name if fits else f"{name} only in widths that {block} divides")
    of_gguf = "; ".join([", ".join(formats), *missing])
    return f"transformers, onnx, page, {llama}, gguf ({of_gguf})"
