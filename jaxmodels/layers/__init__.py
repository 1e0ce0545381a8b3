"""Linen modules that several models share: thin wrappers that own parameters."""

from jaxmodels.layers.attention import Attention as Attention
