"""Computation on one device: precision, compilation, memory and peak speed."""
