"""Attention in float32 inside layers that multiply in 16 bits.

On CPUs, the backward of torch's attention is slower in bfloat16 than in float32 for short rows: 20.8 ms instead of
8.3 ms for 16 rows of 128 positions, 4 heads of width 64, one thread, torch 2.13, a Xeon with AMX (docs/LOG.md,
2026-11-29). From 512 positions on, bfloat16 is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SHORT = 256  # positions of a row; shorter ones are faster in float32
NAME = "sdpa_in_float32"  # as a value of transformers' attn_implementation


def _attend_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(query.dtype), None


AttentionInterface.register(NAME, _attend_in_float32)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_in_float32(backbone: PreTrainedModel, *, yes: bool) -> None:
    """Let the layers of `backbone` compute torch's attention in float32, or in their own format again."""
    if backbone.config._attn_implementation in ("sdpa", NAME):
        backbone.config._attn_implementation = NAME if yes else "sdpa"
