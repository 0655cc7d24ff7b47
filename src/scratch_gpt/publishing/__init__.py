"""Checking, describing and publishing a saved model."""
