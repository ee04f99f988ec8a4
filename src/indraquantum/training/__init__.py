"""The run: schedule, step, checkpoint, loop."""
