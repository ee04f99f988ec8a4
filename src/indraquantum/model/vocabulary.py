"""The vocabulary at both ends of the model: one table of embeddings, which the projector lifts for the head.

This module changes the number of tokens, replaces the table, and decides when the table must be lifted again.

Legend: V vocabulary, d width of the table, D real width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from indraquantum.model.kept_table import KeptTable

T = TypeVar("T")
OWN_MODULES = __name__.removesuffix("model.vocabulary")  # `indraquantum.`; in an exported folder, that file itself


class _Pin:
    """An open `lifted()`, and its table once a forward pass has lifted it."""

    table_VD: Tensor | None = None


class LiftedVocabulary:
    """A base class of IndraQuantumPhase2, which comes before QuantumCore and PreTrainedModel."""

    _input_embed_layer = "embedding"

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)
        self._pins: list[_Pin] = []  # of the `lifted()` that are open, perhaps in other threads
        self._kept = KeptTable()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table E (V, d), which is also the head's table.

        Raises:
            ValueError: the new table has another shape; `resize_token_embeddings` changes the number of tokens.
        """
        expected = (self.config.vocab_size, self.config.d_model)
        if value is not self.embedding and tuple(value.weight.shape) != expected:
            raise ValueError(f"embeddings: got shape {tuple(value.weight.shape)}; must be (V, d) = {expected}")
        super().set_input_embeddings(value)

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module of that name. BERT's name for the embedding works too: PEFT's prompt tuning uses it."""
        return self.embedding if target == "embeddings.word_embeddings" else super().get_submodule(target)

    def get_output_embeddings(self) -> None:
        """Return None: the head has no table of its own, because it uses the lifted input embeddings."""

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Refuse: the head has no table of its own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "set_output_embeddings: the head has no table of its own, because it lifts the input embeddings; "
            "use set_input_embeddings or resize_token_embeddings"
        )

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Change the number of tokens V as transformers does, and the head's bias with it.

        Args:
            new_num_tokens: the new V. Tokens are added or removed at the end; None changes nothing.
            pad_to_multiple_of: round V up to a multiple of this number.
            mean_resizing: draw new embeddings around the mean of the old ones, and give new tokens the mean bias.
                Otherwise draw them as for a new model, with a bias of 0.

        Returns:
            The embedding.
        """
        before = self.config.vocab_size
        embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.vocab_size != before:
            # transformers changed the parameter in place; a graph or gradient of the old size may still cling to it.
            embedding.weight = nn.Parameter(embedding.weight.detach(), requires_grad=embedding.weight.requires_grad)
            self.head.resize(self.config.vocab_size, mean_resizing)
        return embedding

    def lift_table(self, ids_R: Tensor | None = None) -> Tensor:
        """Return the states (V, D) of all tokens in the head, or (R, D) of the tokens `ids_R`."""
        if _is_plain(self.embedding):
            return super().lift_table(ids_R)
        # An adapter around the embedding, for example, adds to what its weight alone would give.
        if ids_R is None:
            device = next(self.embedding.parameters()).device
            # accelerate keeps offloaded weights on the meta device, and its forward moves the ids to where they run
            ids_R = torch.arange(self.config.vocab_size, device="cpu" if device.type == "meta" else device)
        # `forward`, not a call: hooks are for the inputs. NEFTune's would add its noise to the head's table.
        return self._head_states(gathered(self.embedding, lambda: self.embedding.forward(ids_R)))

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, lift the table once for all forward passes without gradients. The weights must not change inside."""
        pin = _Pin()  # the first pass lifts it: FSDP2 gathers the weights only inside the model's forward
        self._pins.append(pin)
        try:
            yield
        finally:
            self._pins.remove(pin)

    def _table(self, use_cache: bool) -> Tensor:
        """Return the lifted table (V, D).

        Without gradients it is the one of an open `lifted()`, or, in calls that may be steps of a decoding loop, the
        one kept from the last call. A compiled graph lifts it anew, because it can't branch on whether weights changed.
        """
        if torch.compiler.is_compiling() and not self._pins:
            return self.lift_table()
        if torch.is_grad_enabled():
            self._kept.drop()
            return self.lift_table()
        if pins := self._pins[-1:]:  # a copy, because another thread may close its own
            if pins[0].table_VD is None:
                pins[0].table_VD = self._kept_table()
            return pins[0].table_VD
        return self._kept_table() if use_cache else self.lift_table()

    def _kept_table(self) -> Tensor:
        """Return the table of the last call, or lift it again if it may have changed."""
        modules = list(self.projector.modules())
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
        if hooked or not all(map(_is_plain, [self.embedding, *modules])):
            return self.lift_table()  # it may depend on more than the weights
        return self._kept.get([self.embedding.weight, *self.projector.parameters()], self.lift_table)


def gathered(module: nn.Module, compute: Callable[[], T]) -> T:
    """Return `compute()`, which reads the weights of `module` outside its forward.

    If `module` is a unit of FSDP2, they are gathered meanwhile, as in its forward, and its other hooks do not run.
    """
    if not hasattr(module, "unshard"):
        return compute()
    if not hasattr(module, "compute_gathered"):
        from torch.distributed.fsdp import register_fsdp_forward_method

        module.compute_gathered = _computed
        register_fsdp_forward_method(module, "compute_gathered")
    return module.compute_gathered(compute)


def _computed(compute: Callable[[], T]) -> T:
    return compute()


def _is_plain(module: nn.Module) -> bool:
    """Return whether `module` is unchanged: no adapter is around it, and its forward is not replaced."""
    of_class = type(module).__module__.startswith(("torch.nn.modules.", OWN_MODULES))
    return of_class and "forward" not in vars(module)
