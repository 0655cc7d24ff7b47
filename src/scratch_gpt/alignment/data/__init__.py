"""Rows of alignment data in one form."""
