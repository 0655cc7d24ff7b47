"""Measuring a saved model: bits per byte and benchmarks through the lm-eval harness."""
