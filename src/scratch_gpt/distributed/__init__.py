"""Placement of one model and its optimizer on several processes."""
