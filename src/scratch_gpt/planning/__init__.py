"""Before a run: what it needs, and whether it fits."""
