"""A step tells the operations of a model which mesh it is for."""

import jax
import numpy as np
import pytest

from jaxmodels import training
from jaxmodels.models.language.llama import Llama
from jaxmodels.training.communication import bytes_sent


def test_sequences_stay_apart_and_useless_axes_are_refused():
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "num_kv_heads": 2, "mlp_width": 24}
    model, optimizer = Llama(**sizes, vocab_size=32), training.adamw(1e-3, steps=4)
    tokens = np.random.default_rng(0).integers(0, 32, (4, 16)).astype(np.int32)
    example, key = {"tokens": tokens}, jax.random.key(0)
    mesh = training.make_mesh("data=2,sequence=4")
    state = training.init_state(model, optimizer, key, example, mesh=mesh)
    batch = training.shard_batch({"tokens": tokens, "targets": tokens}, mesh)
    step = training.make_step(model.loss, optimizer)
    sent = bytes_sent(step.lower(state, batch).compile().as_text())
    # Without a word from the step, keys and values would be gathered.
    assert set(sent) == {"collective-permute", "all-reduce"}
    with pytest.raises(ValueError, match="no parameter is split over expert=8"):
        training.init_state(model, optimizer, key, example, mesh=training.make_mesh("expert=8"))
