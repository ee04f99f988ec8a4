"""Text to immutable token rows: sources, tokenizer, packing and the prepared dataset (DESIGN 5)."""
