"""The objective and its gradients in one pass over chunks of rows; no tensor of N x V ever exists.

A chunk's logits live in one buffer of V x n: first as logits, then as exp(logit), then, corrected at the few tokens
that a row names, as the gradient. A plan may keep the exponentials in 16 bits. Cross-entropy and distillation at
temperature 1 share the softmax:
`a * CE + b * KD = (a + b) * logsumexp(z) - sum_v w_v z_v + const`. Another temperature and the bucket tail
take more passes over the buffer. Backward only scales what forward left.

Legend: N rows (token positions), n rows of a chunk, D real width, V vocabulary, v tokens of a tile, J = K + 1 tokens
that a row names (the label, then the teacher's K).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from indraquantum.kernels import softmax
from indraquantum.kernels.arguments import LinearInputs, ObjectiveOptions, ObjectiveResult
from indraquantum.kernels.lanes import Lanes, Tiles
from indraquantum.kernels.onednn import onednn_products
from indraquantum.kernels.targets import RowTargets, counted_rows, row_targets

_SAFE_LOGIT = 40.0  # exp(+-40), summed over any vocabulary and divided by it, stays far inside float32's range
_VECTOR = 16  # float32 numbers in the widest registers


class Products:
    """Matrix products in the operands' own precision. A device's kernel may use another kind."""

    def operand(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the table in the format of the products; `dtype` is the plan's."""
        return tensor.to(dtype)

    def setting(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, torch multiplies on `device` as this kind of products needs."""
        return onednn_products(device)

    def left_factor(self, tensor: Tensor) -> Tensor:
        """Return `tensor` in the format in which `added` takes its left factor, for a tensor that is used twice."""
        return tensor

    def into(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """`out = left @ right`."""
        torch.mm(left, right, out=out)

    def added(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """`out += left @ right`."""
        out.addmm_(left, right)

    def added_vector(self, out: Tensor, left: Tensor, right: Tensor) -> None:
        """`out += left @ right` for vectors `out` and `right`."""
        out.addmv_(left, right)


@dataclass(frozen=True)
class Plan:
    """How the work is divided, and in which precision it is done."""

    rows: int  # n: rows of a chunk; the buffer is V x n
    tile: int  # v: tokens of one step, so few that its output is still in the cache for the next step
    lanes: int  # threads that share the vocabulary
    dtype: torch.dtype  # of the buffer, of every sum and of the collected gradients
    products: Products
    kept: torch.dtype | None = None  # of the exponentials, where they can be kept in another format than `dtype`


class Wanted(NamedTuple):
    """Which inputs need a gradient."""

    states: bool
    table: bool
    bias: bool
    scale: bool


class Gradients(NamedTuple):
    """Gradients of the total in the plan's dtype; None if not wanted."""

    states_ND: Tensor | None
    table_VD: Tensor | None
    bias_V: Tensor | None
    scale: Tensor | None


class Outcome(NamedTuple):
    """The result of one pass; nothing in it is attached to a graph."""

    result: ObjectiveResult
    gradients: Gradients


class _Step(NamedTuple):
    """A chunk's values. The gradient of its logits is the buffer times the factor."""

    terms: softmax.ChunkTerms
    factor_n: Tensor | None  # None means 1


class ChunkedObjective:
    """One call's work: the inputs in the plan's precision and the gradients being collected."""

    def __init__(self, inputs: LinearInputs, options: ObjectiveOptions, plan: Plan, wanted: Wanted) -> None:
        """Prepare; `run` does the work, once."""
        self.inputs, self.options, self.plan, self.wanted = inputs, options, plan, wanted
        self.states_ND = inputs.states_ND.detach()
        self.table_VD = plan.products.operand(inputs.table_VD.detach(), plan.dtype)
        self.bias_V = None if inputs.bias_V is None else inputs.bias_V.detach().to(plan.dtype)
        self.scale = None if inputs.scale is None else inputs.scale.detach().to(plan.dtype)
        self.vocabulary_size, width = self.table_VD.shape
        self.lanes = Lanes(self.vocabulary_size, plan.tile, plan.lanes)
        self.has_signals = inputs.signal_ids_NK is not None
        self.is_plain = not (self.has_signals and options.temperature != 1)
        self.is_even = self.has_signals and options.tail == "uniform"
        self.table_sum_D = self.table_VD.sum(dim=0, dtype=plan.dtype) if self.is_even else None
        make = self.table_VD.new_zeros
        self.gradients = Gradients(
            make(self.states_ND.shape, dtype=plan.dtype) if wanted.states else None,
            make(self.table_VD.shape, dtype=plan.dtype) if wanted.table else None,
            make(self.vocabulary_size, dtype=plan.dtype) if wanted.bias else None,
            make((), dtype=plan.dtype) if wanted.scale else None,
        )
        self.even_states_D = make(width, dtype=plan.dtype)
        self.even_sum = make((), dtype=plan.dtype)

    def run(self) -> Outcome:
        """Go over all rows that count and return values and gradients."""
        rows_R = counted_rows(self.inputs)
        num_rows = self.states_ND.shape[0] if rows_R is None else len(rows_R)
        is_bounded = self._is_bounded()
        step = self._even_step(num_rows)
        size, dtype = self.vocabulary_size * min(step, num_rows), self._buffer_dtype(is_bounded)
        buffer = self.table_VD.new_empty(size, dtype=dtype)
        self.factor_VD = self.table_VD if dtype == self.plan.dtype else self.table_VD.to(dtype)
        sums = self.table_VD.new_zeros(3, dtype=self.plan.dtype)
        with self.lanes:
            for start in range(0, num_rows, step):
                stop = min(start + step, num_rows)
                rows = slice(start, stop) if rows_R is None else rows_R[start:stop]
                buffer_Vn = buffer[: self.vocabulary_size * (stop - start)].view(self.vocabulary_size, -1)
                sums += self._chunk(rows, buffer_Vn, is_bounded).stacked()
        if self.is_even and self.gradients.table_VD is not None:
            self.gradients.table_VD.sub_(self.even_states_D)
        if self.is_even and self.gradients.bias_V is not None:
            self.gradients.bias_V.sub_(self.even_sum)
        return Outcome(self._result(sums), self.gradients)

    def _even_step(self, num_rows: int) -> int:
        """Return the rows of a chunk, so that the last chunk is not a small remainder, for which products are slow."""
        num_chunks = max(1, -(-num_rows // self.plan.rows))
        step = -(-num_rows // num_chunks)
        return max(1, min(self.plan.rows, -(-step // _VECTOR) * _VECTOR))

    def _is_bounded(self) -> bool:
        """Return whether all logits are within +-_SAFE_LOGIT (Cauchy-Schwarz), so that exp needs no maximum first."""
        if self.states_ND.numel() == 0:
            return True
        dtype = self.plan.dtype
        bound = torch.linalg.vector_norm(self.states_ND, dim=1, dtype=dtype).max()
        bound = bound * torch.linalg.vector_norm(self.table_VD, dim=1, dtype=dtype).max()
        if self.scale is not None:
            bound = bound * self.scale.abs()
        if self.bias_V is not None:
            bound = bound + self.bias_V.abs().max()
        return bool(bound <= _SAFE_LOGIT)

    def _buffer_dtype(self, is_bounded: bool) -> torch.dtype:
        """Return the format of the buffer. It is the plan's where logits, and not only exponentials, stand in it."""
        can_be_kept = is_bounded and self.is_plain and not (self.has_signals and self.options.tail == "bucket")
        return self.plan.kept if self.plan.kept is not None and can_be_kept else self.plan.dtype

    def _result(self, sums: Tensor) -> ObjectiveResult:
        ce, kd, kd_cross_entropy = sums.unbind()
        total = ce + self.options.kd_weight * kd
        if self.inputs.signal_ids_NK is None:
            return ObjectiveResult(total, ce, None, None)
        return ObjectiveResult(total, ce, kd, kd_cross_entropy)

    def _fill(self, out_vn: Tensor, tile: slice, scaled_nD: Tensor) -> Tensor:
        """Write one tile's logits into `out_vn` and return it."""
        self.plan.products.into(out_vn, self.table_VD[tile], scaled_nD.T)
        return out_vn if self.bias_V is None else out_vn.add_(self.bias_V[tile, None])

    def _chunk(self, rows: slice | Tensor, buffer_Vn: Tensor, is_bounded: bool) -> softmax.ChunkTerms:
        """Compute the values of some rows, and add their gradients to the collected ones."""
        states_nD = self.states_ND[rows].to(self.plan.dtype)
        scaled_nD = states_nD if self.scale is None else states_nD * self.scale
        targets = row_targets(self.inputs, self.options, rows, self.plan.dtype)
        means_n = scaled_nD.new_zeros(scaled_nD.shape[0])
        if self.is_even:
            means_n = scaled_nD @ self.table_sum_D / self.vocabulary_size
            means_n += 0.0 if self.bias_V is None else self.bias_V.mean()
        step = self._plain if self.is_plain and not self._has_bucket(targets) else self._general
        terms, factor_n = step(targets, scaled_nD, buffer_Vn, means_n, is_bounded)
        if any(self.wanted):
            even_n = None
            if self.is_even:
                even_n = softmax.even_weights(targets.signals, self.options)
            self._collect(rows, states_nD, scaled_nD, buffer_Vn, factor_n, even_n)
        return terms

    def _has_bucket(self, targets: RowTargets) -> bool:
        """Return whether the tail needs its own normaliser. Signals that sum to 1, as draws do, have no tail."""
        return self.options.tail == "bucket" and targets.has_missing_mass

    def _plain(
        self, targets: RowTargets, scaled_nD: Tensor, buffer_Vn: Tensor, means_n: Tensor, is_bounded: bool
    ) -> _Step:
        """Compute with one softmax for everything. The buffer becomes the gradient divided by the returned factor.

        The factor is applied on the n x D side of the gradient's products, which saves a pass over the buffer.
        """
        positions_nJ, line = softmax.named_positions(targets), buffer_Vn.view(-1)
        if is_bounded:
            shift_n = torch.zeros_like(targets.share_n)

            def exponentials(tiles: Tiles) -> Tensor:
                if buffer_Vn.dtype == scaled_nD.dtype:
                    return sum(self._fill(buffer_Vn[tile], tile, scaled_nD).exp_().sum(dim=0) for tile in tiles)
                total_n = torch.zeros_like(targets.share_n)
                scratch_vn = scaled_nD.new_empty(max(tile.stop - tile.start for tile in tiles), len(scaled_nD))
                for tile in tiles:
                    values_vn = self._fill(scratch_vn[: tile.stop - tile.start], tile, scaled_nD).exp_()
                    total_n += values_vn.sum(dim=0)
                    buffer_Vn[tile].copy_(values_vn)
                return total_n

            total_n = sum(self.lanes.map(exponentials))
            named_nJ = line[positions_nJ].to(total_n.dtype).log_()
        else:

            def largest(tiles: Tiles) -> Tensor:
                tops = [self._fill(buffer_Vn[tile], tile, scaled_nD).amax(dim=0) for tile in tiles]
                return torch.stack(tops).amax(dim=0)

            shift_n = torch.stack(self.lanes.map(largest)).amax(dim=0)
            named_nJ = line[positions_nJ].sub_(shift_n[:, None])

            def shifted_exponentials(tiles: Tiles) -> Tensor:
                return sum(buffer_Vn[tile].sub_(shift_n).exp_().sum(dim=0) for tile in tiles)

            total_n = sum(self.lanes.map(shifted_exponentials))
        log_total_n = total_n.log()
        terms = softmax.chunk_terms(
            targets, self.options, named_nJ, softmax.Normalisers(log_total_n, log_total_n, None),
            means_n - shift_n, self.vocabulary_size,
        )  # fmt: skip
        factor_n = softmax.softmax_weights(targets, self.options) / total_n
        if any(self.wanted):
            weights_nJ = softmax.named_weights(targets, self.options) / factor_n[:, None]
            # not put_, which has no fixed order on accelerators if a label is also a teacher's token
            line.index_put_((positions_nJ,), weights_nJ.neg_().to(line.dtype), accumulate=True)
        return _Step(terms, factor_n)

    def _general(
        self, targets: RowTargets, scaled_nD: Tensor, buffer_Vn: Tensor, means_n: Tensor, _is_bounded: bool
    ) -> _Step:
        """Compute with any options. The buffer becomes the gradient itself."""
        self.lanes.map(lambda tiles: [self._fill(buffer_Vn[tile], tile, scaled_nD) for tile in tiles])
        positions_nJ, temperature = softmax.named_positions(targets), self.options.temperature
        named_nJ = buffer_Vn.view(-1)[positions_nJ]
        log_total_n = log_warm_n = softmax.log_sum_exp(buffer_Vn, self.lanes, 1.0)
        log_tail_n = None
        if (signals := targets.signals) is not None:
            if temperature != 1:
                log_warm_n = softmax.log_sum_exp(buffer_Vn, self.lanes, temperature)
            if self._has_bucket(targets):
                log_tail_n = softmax.log_tail_sum(buffer_Vn, self.lanes, temperature, signals, positions_nJ)
        normalisers = softmax.Normalisers(log_total_n, log_warm_n, log_tail_n)
        terms = softmax.chunk_terms(targets, self.options, named_nJ, normalisers, means_n, self.vocabulary_size)
        if any(self.wanted):
            softmax.logits_to_gradient(buffer_Vn, self.lanes, targets, self.options, normalisers, positions_nJ)
        return _Step(terms, None)

    def _collect(
        self, rows: slice | Tensor, states_nD: Tensor, scaled_nD: Tensor,
        buffer_Vn: Tensor, factor_n: Tensor | None, even_n: Tensor | None,
    ) -> None:  # fmt: skip
        """Carry a chunk's logit gradient, `buffer * factor - even`, to the inputs."""
        products, gradients = self.plan.products, self.gradients
        factor_nD = scaled_nD if factor_n is None else scaled_nD * factor_n[:, None]
        factor_n1 = states_nD.new_ones(len(states_nD), 1) if factor_n is None else factor_n[:, None]
        right_nD, right_n = factor_nD.to(buffer_Vn.dtype), factor_n1[:, 0].to(buffer_Vn.dtype)

        def carry(tiles: Tiles) -> Tensor:
            back_nD = torch.zeros_like(states_nD)
            for tile in tiles:
                left_vn = products.left_factor(buffer_Vn[tile])
                if self.wanted.states or self.wanted.scale:
                    products.added(back_nD, left_vn.T, self.factor_VD[tile])
                if gradients.table_VD is not None:
                    products.added(gradients.table_VD[tile], left_vn, right_nD)
                if gradients.bias_V is not None:
                    products.added_vector(gradients.bias_V[tile], buffer_Vn[tile], right_n)
            return back_nD

        back_nD = sum(self.lanes.map(carry)) * factor_n1
        if even_n is not None:
            back_nD -= even_n[:, None] * self.table_sum_D
            self.even_states_D += even_n @ scaled_nD
            self.even_sum += even_n.sum()
        if gradients.scale is not None:
            gradients.scale.add_((back_nD * states_nD).sum())
        if gradients.states_ND is not None:
            back_nD = back_nD if self.scale is None else back_nD.mul_(self.scale)
            gradients.states_ND[rows] = back_nD
