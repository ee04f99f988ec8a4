"""The teacher's signals: asking any causal LM once, and reading what it said at every step of training."""
