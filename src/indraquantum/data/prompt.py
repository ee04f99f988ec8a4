"""The Alpaca prompt: one function builds it for training documents and for `indra test --instruction`."""

from __future__ import annotations


def format_alpaca(instruction: str, input: str, output: str = "") -> str:
    """Return the Alpaca prompt, with the answer if it is given.

    Args:
        instruction: What to do.
        input: What to do it with. If it is empty, its block is left out.
        output: The answer. If it is empty, the prompt ends where a model continues.

    Returns:
        The text, without a preamble and without a space after the last line break.
    """
    block = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n{output}"
