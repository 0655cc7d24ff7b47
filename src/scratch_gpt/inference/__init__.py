"""Using a saved model: generating text."""
