"""What is done with a trained model: text, figures, folders for transformers. See README.md."""
