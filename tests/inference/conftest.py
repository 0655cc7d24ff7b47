"""Fixtures of the inference tests."""

from tests.evaluation.conftest import saved_model  # noqa: F401 (a fixture)
