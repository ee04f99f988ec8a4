"""The teacher's signals: captured once from any causal LM, and read at every step of training."""
