"""Decoding: text from language models. Knows the call of a model, not which model it is."""

from jaxmodels.decoding.generate import NO_TOKEN, Generation, generate

__all__ = ["NO_TOKEN", "Generation", "generate"]
