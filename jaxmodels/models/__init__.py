"""Whole networks, one paper one file."""
