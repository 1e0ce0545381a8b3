"""Decoding: text from language models. Knows the call of a model, not which model it is."""

from jaxmodels.decoding.drafts import Draft, ModelDraft, NgramDraft
from jaxmodels.decoding.generate import NO_TOKEN, Generation, generate
from jaxmodels.decoding.head_drafts import MedusaDraft, ModuleDraft, MultiTokenDraft
from jaxmodels.decoding.ragged import RaggedPrompts, join_ragged, last_logits
from jaxmodels.decoding.speculative import (
    Speculation,
    acceptance,
    speculative_generate,
    tokens_a_round,
)

__all__ = [
    "NO_TOKEN",
    "Draft",
    "Generation",
    "MedusaDraft",
    "ModelDraft",
    "ModuleDraft",
    "MultiTokenDraft",
    "NgramDraft",
    "RaggedPrompts",
    "Speculation",
    "acceptance",
    "generate",
    "join_ragged",
    "last_logits",
    "speculative_generate",
    "tokens_a_round",
]
