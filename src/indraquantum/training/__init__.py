"""Training: the plan of a run, the engine of its steps, checkpoints, and the loop."""
