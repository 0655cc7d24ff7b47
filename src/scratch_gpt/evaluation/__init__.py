"""Measure a model, saved or in training: bits per byte, and benchmarks through the lm-eval harness."""
