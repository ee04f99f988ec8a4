"""How the layers compute attention when they multiply in 16 bits on a CPU.

There, torch's fused attention is slow in bfloat16 for short rows, above all its backward. transformers' eager attention
is two batched products and a softmax in float32. A whole step takes 0.87 s with it instead of 1.03 s with fused
attention in float32 (rows of 128 positions, 4 heads of width 64, one thread of an AMD EPYC; docs/LOG.md, 2026-11-29).
Fused attention in bfloat16 is the slowest. From 512 positions on it is the fastest, and it needs the least memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SHORT = 256  # positions of a row; shorter ones are faster with eager attention
# layers: torch's, in the format of the layers. float32: torch's in float32, for runs that began with it.
Attention = Literal["layers", "eager", "float32"]
_IN_FLOAT32 = "sdpa_in_float32"
_NAMES: dict[Attention, str] = {"layers": "sdpa", "eager": "eager", "float32": _IN_FLOAT32}


def _attend_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return output.to(query.dtype), None


AttentionInterface.register(_IN_FLOAT32, _attend_in_float32)
AttentionMaskInterface.register(_IN_FLOAT32, sdpa_mask)


def attend_as(backbone: PreTrainedModel, attention: Attention) -> None:
    """Let the layers of `backbone` compute attention as `attention` says."""
    backbone.config._attn_implementation = _NAMES[attention]
