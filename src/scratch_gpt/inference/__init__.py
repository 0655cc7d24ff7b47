"""Use a saved model: generate text."""
