"""The teacher: any Hugging Face causal LM with the dataset's tokenizer, which reads packed rows.

A row may hold several documents, which masks and restarting positions keep apart. Not every architecture honours them.
So rows that can show it are compared with each document alone (checks.py), and a teacher whose logits differ reads one
document at a time.

Legend: B rows, T positions, V vocabulary (the teacher's may be padded).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from indraquantum.errors import UserError
from indraquantum.memory import memory_needed

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from indraquantum.data.prepared import PreparedDataset
    from indraquantum.data.split import Batch
    from indraquantum.teacher.sampling import PositionSignals
    from indraquantum.teacher.shard_worker import Plan


class Teacher:
    """A loaded teacher.

    Attributes:
        precision: the number format in which it computes; mixed is float32 with products and attention in bfloat16.
        vocabulary_size: number of the dataset's tokens; the teacher's own may be padded to more.
        packed: whether a row may hold several documents; False for a teacher that would mix them.
        layered: whether some layers see only a part of the earlier positions (windows, chunks), so that packed rows
            need a mask for each kind of layer.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, precision: str, vocabulary_size: int) -> None:
        """Use `load_teacher`, which checks."""
        self.model, self.device, self.precision = model, device, precision
        self.vocabulary_size = vocabulary_size
        self.packed, self.layered = True, _is_layered(model.config.get_text_config())

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return the logits of the next token at each position; those at padding have no meaning.

        Returns:
            (B, T, V') on the teacher's device, in its precision.
        """
        from indraquantum.kernels.onednn import onednn_products

        with onednn_products(self.device):
            return self.packed_logits(batch) if self.packed else self._lone_logits(batch)

    def packed_logits(self, batch: Batch) -> torch.Tensor:
        """Return logits for rows of several documents, whether or not the teacher keeps them apart."""
        import torch

        positions_BT = torch.from_numpy(batch.positions).to(self.device)
        with torch.inference_mode(), self._mixing():
            return self.model(
                input_ids=torch.from_numpy(batch.input_ids).to(self.device),
                attention_mask=self._layer_masks(positions_BT) if self.layered else self._mask(batch),
                position_ids=positions_BT,
                use_cache=False,
            ).logits

    def _mask(self, batch: Batch) -> torch.Tensor:
        """Return one mask for all layers, (B, 1, T, T)."""
        import torch

        from indraquantum.model.masks import document_mask_for

        segments_BT = torch.from_numpy(batch.segments).to(self.device)
        return document_mask_for(self.model.config._attn_implementation, segments_BT, self.model.dtype)

    def _layer_masks(self, positions_BT: torch.Tensor) -> dict[str, torch.Tensor | None] | torch.Tensor | None:
        """Return a mask for each kind of layer, which transformers makes from the restarting positions."""
        import torch
        from transformers.masking_utils import create_masks_for_generate

        shape_of_embeddings = torch.empty(*positions_BT.shape, 1, dtype=self.model.dtype, device=self.device)
        return create_masks_for_generate(self.model.config, shape_of_embeddings, None, None, positions_BT)

    def _lone_logits(self, batch: Batch) -> torch.Tensor:
        """Return logits of each document alone, without mask, padding or positions: slow, but right for any model."""
        logits_BTV = None
        for row, columns in pieces_of(batch):
            alone_TV = self._alone(batch.input_ids[row, columns])
            if logits_BTV is None:
                logits_BTV = alone_TV.new_zeros(*batch.segments.shape, alone_TV.shape[-1])
            logits_BTV[row, columns] = alone_TV
        return logits_BTV

    def alone(self, ids_T: np.ndarray) -> torch.Tensor:
        """Return the logits of the dataset's tokens for one document alone, (T, V), which are right by definition."""
        return self._alone(ids_T)[:, : self.vocabulary_size]

    def _alone(self, ids_T: np.ndarray) -> torch.Tensor:
        import torch

        with torch.inference_mode(), self._mixing():
            return self.model(input_ids=torch.from_numpy(ids_T)[None].to(self.device), use_cache=False).logits[0]

    def _mixing(self) -> torch.autocast:
        """Return a context in which products and attention round to bfloat16 if the precision is mixed."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "mixed")


def keep_weights_rounded(model: torch.nn.Module) -> None:
    """Keep the weights of linear layers in bfloat16, which autocast would round again in each pass.

    A head that shares its weights with the embedding gets a rounded copy; the embedding stays as it is.
    """
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)


def _is_layered(config: PretrainedConfig) -> bool:
    """Return whether some layer sees only a part of the earlier positions."""
    if layer_types := getattr(config, "layer_types", None):
        return any(kind != "full_attention" for kind in layer_types)
    return any(getattr(config, name, None) is not None for name in ("sliding_window", "attention_chunk_size"))


class ModelAsker:
    """A loaded teacher that gives signals.

    Attributes:
        precision: the number format in which it computes.
        packed: whether a row may hold several documents.
    """

    def __init__(self, teacher: Teacher, dataset: PreparedDataset, plan: Plan) -> None:
        """Ask `teacher` over the rows of `dataset` as `plan` says."""
        self._teacher, self._dataset, self._settings, self._identity = teacher, dataset, plan.settings, plan.manifest
        self.precision, self.packed = teacher.precision, teacher.packed

    def close(self) -> None:
        """Do nothing: the memory is released with the object."""

    def signals(self, split: str, rows: np.ndarray) -> PositionSignals:
        """Return the signals of all real positions of these rows, in their order.

        Raises:
            UserError: the logits are not finite, or memory ran out.
        """
        from indraquantum.teacher.sampling import position_signals, row_uniforms

        batch, identity = getattr(self._dataset, split).batch(rows), self._identity
        real_B = (batch.segments >= 0).sum(1)
        batch = type(batch)(*(array[:, : real_B.max()] for array in batch))
        uniforms_Nn = None
        if identity.kind == "sampled":
            pairs = zip(rows.tolist(), real_B.tolist(), strict=True)
            uniforms = [row_uniforms(identity.seed, split, row, real, identity.draws) for row, real in pairs]
            uniforms_Nn = np.concatenate(uniforms)
        places_N = np.flatnonzero(batch.segments.reshape(-1) >= 0)
        fewer = f"must be below {batch.input_ids.size}, because {len(rows)} rows don't fit into memory"
        try:
            with memory_needed("--batch-tokens", self._settings.batch_tokens, fewer):
                return position_signals(
                    self._teacher.logits(batch),
                    places_N,
                    batch.labels.reshape(-1)[places_N],
                    uniforms_Nn,
                    identity.vocabulary_size,
                    identity.temperature,
                    identity.top_k,
                )
        except FloatingPointError:
            allowed = f"must give finite logits, but gives nan or inf in {split} rows {rows[0]} to {rows[-1]}"
            raise UserError("--teacher", self._settings.teacher, allowed) from None


def pieces_of(batch: Batch) -> Iterator[tuple[int, slice]]:
    """Yield the row and the columns of each document, or part of a document, of a batch."""
    for row, segments_T in enumerate(batch.segments):
        for segment in range(segments_T.max() + 1):
            columns = np.flatnonzero(segments_T == segment)
            yield row, slice(columns[0], columns[-1] + 1)
