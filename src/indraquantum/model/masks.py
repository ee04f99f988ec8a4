"""Attention masks for rows with several documents.

Legend: B batch, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_mask(segments_BT: Tensor) -> Tensor:
    """Return a mask that keeps packed documents apart: it is causal within each segment.

    Args:
        segments_BT: (B, T) integers; equal numbers >= 0 are the same document, negative ones are padding.

    Returns:
        (B, 1, T, T) bool. True at (b, 0, i, j) means that position i may attend to j: j <= i, and both are of the same
        document. Padding attends to itself only, because a row without any True would give NaN.
    """
    length = segments_BT.shape[1]
    index_T = torch.arange(length, device=segments_BT.device)
    causal_TT = index_T[:, None] >= index_T
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    real_BT1 = (segments_BT >= 0)[:, :, None]
    self_TT = index_T[:, None] == index_T
    return (same_BTT & causal_TT & real_BT1 | self_TT)[:, None]


def document_mask_for(attention: str, segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `document_mask` in the form that an attention of transformers takes.

    Args:
        attention: the name of its implementation. "eager" adds its mask to the scores, so a bool one would silently let
            everything through.
        segments_BT: see `document_mask`.
        dtype: of the scores.
    """
    mask_B1TT = document_mask(segments_BT)
    return additive(mask_B1TT, dtype) if attention == "eager" else mask_B1TT


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as numbers to add to attention scores: 0 for True, the least finite number for False."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
