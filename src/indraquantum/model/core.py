"""The parts of the model around its layers: embedding, projectors, head and readouts.

Both classes of the model use it: IndraQuantumPhase2, whose layers are transformers' Llama, and InferenceModel, which
does not need transformers.

Legend: B batch, T positions, d width of the table, D real width (2c, where c is the complex width), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indraquantum.model.head import HEADS
from indraquantum.model.masks import document_mask
from indraquantum.model.projector import PROJECTORS
from indraquantum.model.readout import READOUTS
from indraquantum.model.shape import ModelShape


class QuantumCore:
    """Embedding, projectors, head and readouts of a module that also has the layers between them."""

    config: ModelShape

    def _add_parts(self, config: ModelShape, embedding: nn.Embedding, make_layers: Callable[[], nn.Module]) -> None:
        """Add `embedding`, then make the other parts in the order in which they draw their weights."""
        self.embedding = embedding
        self.projector = PROJECTORS[config.projector](config)
        self.input_projector = PROJECTORS[config.projector](config) if config.ends == "separate" else None
        self.backbone = make_layers()
        self.head = HEADS[config.head](config)
        self.readout = READOUTS[config.readout](config)

    def _run_layers(self, states_BTD: Tensor, mask: Tensor | None, position_ids_BT: Tensor | None) -> Tensor:
        """Return the states psi (B, T, D) of the inputs' states (B, T, D); without a mask it is the causal one."""
        raise NotImplementedError

    @property
    def bias_V(self) -> Tensor | None:
        """The head's bias (V,); None if it has none."""
        return self.head.bias_V

    @property
    def scale(self) -> Tensor:
        """The head's scale, a differentiable scalar."""
        return self.head.scale_1[0]

    def input_states(self, embeddings: Tensor) -> Tensor:
        """Return the states (..., D) of the inputs' embeddings (..., d), which may have their own projector."""
        projector = self.projector if self.input_projector is None else self.input_projector
        return self._lift(projector, embeddings)

    def _lift(self, projector: nn.Module, embeddings: Tensor, turned: bool = False) -> Tensor:
        """Return the states (..., D) of `embeddings` (..., d).

        With a residual, the embeddings are added to the real pairs of the states: the first min(d, D) numbers of both.
        If `turned`, these numbers are multiplied by i first; without a projector they are the states.
        """
        # A phase of several radians loses its digits in 16 bits.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(_format_of(projector, embeddings))
            states = projector(embeddings)
            if self.config.projector == "none":
                return _times_i(states) if turned else states
            if not self.config.residual:
                return states
            added = embeddings[..., : states.shape[-1]]
            added = _times_i(added) if turned else added
            return states + F.pad(added, (0, states.shape[-1] - added.shape[-1]))

    def input_table(self) -> Tensor:
        """Return the inputs' states (V, D) of all tokens."""
        return self.input_states(self.embedding.weight)

    def lift_table(self, ids_R: Tensor | None = None) -> Tensor:
        """Return the states (V, D) of all tokens in the head, or (R, D) of the tokens `ids_R`."""
        weight = self.embedding.weight
        return self._head_states(weight if ids_R is None else F.embedding(ids_R, weight))

    def _head_states(self, embeddings: Tensor) -> Tensor:
        """Return the states (..., D) of `embeddings` (..., d) in the head."""
        return self._lift(self.projector, embeddings, turned=self.config.residual_head == "turned")

    def _document_mask(self, segment_ids_BT: Tensor) -> Tensor:
        return document_mask(segment_ids_BT)

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        segment_ids_BT: Tensor | None = None,
        table_VD: Tensor | None = None,
    ) -> Tensor:
        """Run the layers over whole rows.

        Args:
            input_ids_BT: (B, T) token ids.
            position_ids_BT: (B, T) positions within each document; by default 0, 1, ... along the row.
            segment_ids_BT: (B, T) number of the document within the row, -1 on padding. A position attends only to
                earlier ones of its own document. By default there is no padding, and a document begins where positions
                restart.
            table_VD: (V, D) the lifted table, if the caller has it. The inputs are then gathered from it, unless they
                have their own projector or the head turns the embeddings.

        Returns:
            (B, T, D) the states psi.
        """
        if table_VD is None or self.input_projector is not None or self.config.residual_head == "turned":
            states_BTD = self.input_states(self.embedding(input_ids_BT))
        else:
            states_BTD = F.embedding(input_ids_BT, table_VD)
        mask = None if segment_ids_BT is None else self._document_mask(segment_ids_BT)
        return self._run_layers(states_BTD, mask, position_ids_BT)

    def logits(self, states: Tensor, table_VD: Tensor) -> Tensor:
        """Return the logits (..., V) of `states` (..., D) against the lifted table."""
        return self.head(states, table_VD)

    def amplitude(self, states: Tensor) -> Tensor:
        """Return the complex readout c (...) of `states` (..., D): |c| is the magnitude, its angle the phase."""
        with torch.autocast(states.device.type, enabled=False):  # there are no complex numbers of 16 bits
            return self.readout(states)


def _times_i(numbers: Tensor) -> Tensor:
    """Return `numbers` (..., n), the real parts of n / 2 complex numbers and then the imaginary ones, times i.

    If n is odd, the last number stays.
    """
    half = numbers.shape[-1] // 2
    return torch.cat([-numbers[..., half : 2 * half], numbers[..., :half], numbers[..., 2 * half :]], dim=-1)


def _format_of(projector: nn.Module, embeddings: Tensor) -> torch.dtype:
    """Return the format of the projector's weights, or that of `embeddings` if it has none or they are quantised."""
    formats = (weight.dtype for weight in projector.parameters() if weight.is_floating_point() and weight.itemsize > 1)
    return next(formats, embeddings.dtype)
