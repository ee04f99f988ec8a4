"""What is measured on held-out text. Training looks at it; it knows nothing of training."""
