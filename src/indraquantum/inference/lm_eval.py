"""Runs EleutherAI's lm-evaluation-harness on a checkpoint. It needs pip install 'indraquantum[lm-eval]'.

    python -m indraquantum.inference.lm_eval run --model indraquantum --model_args checkpoint=CHECKPOINT --tasks TASK

All options are the harness's own. This module registers the model `indraquantum`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from indraquantum.data.fast_tokenizer import transformers_tokenizer
from indraquantum.errors import UserError, optional_package
from indraquantum.inference.load import load_model

try:
    with optional_package("python -m", "indraquantum.inference.lm_eval", "lm_eval", "indraquantum[lm-eval]"):
        from lm_eval.api.instance import Instance
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
except UserError as error:
    if __name__ != "__main__":
        raise
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)


@register_model("indraquantum")
class IndraQuantumLM(HFLM):
    """A checkpoint as a model of the harness. Every text begins as in training, with BOS if there is one.

    Args:
        checkpoint: the path of a checkpoint that training wrote.
        device: where to compute; by default on the CPU.
        options: options of HFLM, such as batch_size and max_length.
    """

    def __init__(self, checkpoint: str, device: str | None = None, **options: Any) -> None:
        model, tokenizer = load_model(Path(checkpoint), torch.device(device or "cpu"))
        options.setdefault("add_bos_token", tokenizer.bos_id is not None)
        super().__init__(pretrained=model, tokenizer=transformers_tokenizer(tokenizer), **options)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute as HFLM does, which adds a BOS itself; a second BOS would be predicted and counted."""
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = before


def main() -> None:
    """Run the harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
