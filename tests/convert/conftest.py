"""The small models of the model tests."""

from tests.model.conftest import build, ids

__all__ = ["build", "ids"]
