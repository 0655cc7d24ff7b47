"""How one device computes: precision, compilation, memory and its peak speed."""
