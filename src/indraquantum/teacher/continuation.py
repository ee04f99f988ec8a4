"""Lets a teacher itself continue a few prompts, for comparison with its students."""

from __future__ import annotations

from typing import TYPE_CHECKING

from indraquantum.config import CaptureSettings, TestSettings
from indraquantum.teacher.loading import compute_dtype, load_model
from indraquantum.teacher.refusals import quiet_transformers
from indraquantum.teacher.teacher_files import find_teacher

if TYPE_CHECKING:
    from indraquantum.data.tokenizer import TextTokenizer


def continuations(
    settings: CaptureSettings, tokenizer: TextTokenizer, prompts: list[str], how: TestSettings
) -> list[str]:
    """Return what a teacher writes after each prompt, without the prompt.

    Args:
        settings: the teacher, and where it computes.
        tokenizer: its tokenizer.
        prompts: the texts to continue.
        how: the seed, and how to choose tokens.

    Raises:
        UserError: the teacher can't be loaded.
    """
    import torch

    from indraquantum.device import choose_device

    device = choose_device(settings)
    model = load_model(find_teacher("--teacher", settings.teacher), compute_dtype(device, settings.precision), device)
    texts = []
    with quiet_transformers(), torch.inference_mode():
        for prompt in prompts:
            ids_1T = torch.tensor([tokenizer.encode_prompt(prompt)], device=device)
            torch.manual_seed(how.seed)
            written_1T = model.eval().generate(
                ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=how.max_new_tokens, do_sample=True,
                temperature=how.temperature, top_p=how.top_p, top_k=how.top_k, eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.eos_id,
            )  # fmt: skip
            texts.append(tokenizer.decode(written_1T[0, ids_1T.shape[1] :].tolist()))
    return texts
