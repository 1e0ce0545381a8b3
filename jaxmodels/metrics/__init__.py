"""Measures of results; they know no model."""
