"""Serves a trained model over HTTP, as OpenAI's API does: the command `indra serve`."""
