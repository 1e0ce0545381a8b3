"""Linen modules that several models share: thin wrappers that own parameters."""
