"""The one Alpaca prompt: training documents and `indra test --instruction` are built by the same function."""

from __future__ import annotations


def format_alpaca(instruction: str, input: str, output: str = "") -> str:
    """Return the Alpaca prompt, with the answer where it is given.

    Args:
        instruction: What to do.
        input: What to do it with; an empty one leaves its block out.
        output: The answer; empty leaves the prompt open for a model to go on.

    Returns:
        The text, exactly as DESIGN 5 has it: no preamble, no space after the last heading's line break.
    """
    block = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n{output}"
