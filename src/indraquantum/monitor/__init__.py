"""Shows runs: plots, tables and summaries."""
