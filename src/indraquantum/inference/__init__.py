"""Uses of a trained model: writing text, measuring it, and exporting it for transformers."""
