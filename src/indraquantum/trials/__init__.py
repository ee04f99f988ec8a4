"""Measures without leaving a run behind: speed and memory, a dry run, a learning-rate test."""
