"""Every registered language model: at its published size by shapes alone, and small for real."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmodels
from jaxmodels.models.language.language_model import LanguageModel

BATCH, LENGTH, VOCAB = 2, 13, 37
TOKENS = jax.ShapeDtypeStruct((3, 7), jnp.int32)
# As their authors state them.
PARAMETERS = {
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "deepseek_v3": 671_026_404_352,
}
SMALL = {
    "width": 24,
    "depth": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "mlp_width": 41,
    "vocab_size": VOCAB,
    "dense_depth": 1,
    "q_rank": 13,
    "kv_rank": 11,
    "nope_dim": 5,
    "rope_dim": 6,
    "value_dim": 7,
    "expert_width": 17,
    "num_experts": 6,
    "groups": 3,
    "top_groups": 2,
    "top_k": 3,
    "capacity_factor": None,
}


def is_language_model(name):
    return isinstance(jaxmodels.create_model(name), LanguageModel)


NAMES = [name for name in jaxmodels.list_models() if is_language_model(name)]
# One size of each family is enough for what depends on the code and not on the size.
FAMILIES = {type(jaxmodels.create_model(name)).__name__: name for name in reversed(NAMES)}


@functools.cache
def small(name):
    """A model and its variables."""
    fields = jaxmodels.registry.module_fields(jaxmodels.create_model(name))
    model = jaxmodels.create_model(name, **{k: v for k, v in SMALL.items() if k in fields})
    return model, jax.jit(model.init)(jax.random.key(0), tokens())


def tokens(seed=0, length=LENGTH):
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (BATCH, length)))


@functools.cache
def apply(name):
    return jax.jit(small(name)[0].apply)


def test_all_families_are_registered():
    assert {*FAMILIES} >= {"GPT2", "Llama", "Qwen3", "Mixtral", "DeepseekV3"}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_published(name):
    """Blocks are alike but for the first ones, so that two depths tell the size of all."""
    model = jaxmodels.create_model(name)
    # The module that looks ahead is not counted.
    extra = {"num_ahead": 0} if hasattr(model, "num_ahead") else {}
    first = getattr(model, "dense_depth", 0) + 1
    one, two = (count_parameters(model.clone(depth=first + i, **extra)) for i in range(2))
    assert one + (model.depth - first) * (two - one) == PARAMETERS[name]


def count_parameters(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize("name", FAMILIES.values())
def test_shapes_of_logits_loss_and_state(name):
    model = jaxmodels.create_model(name)
    model = model.clone(depth=getattr(model, "dense_depth", 0) + 2)
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    model_state = {kind: tree for kind, tree in variables.items() if kind != "params"}
    assert "losses" not in model_state

    state = jax.eval_shape(lambda: model.init_state(3, 11))
    logits, after = jax.eval_shape(
        lambda v, t, s: model.apply(v, t, state=s), variables, TOKENS, state
    )
    assert logits.shape == (3, 7, model.vocab_size) and logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )

    batch = {"tokens": TOKENS, "targets": TOKENS}
    loss, terms, changed = jax.eval_shape(
        model.loss, variables["params"], batch, jax.random.key(0), model_state
    )
    assert loss.shape == () and loss.dtype == jnp.float32
    assert all(term.shape == () for term in terms.values()) and "cross_entropy" in terms
    assert jax.tree.structure(changed) == jax.tree.structure(model_state)
    kernel = jax.eval_shape(model.output_kernel, variables["params"])
    assert kernel.shape == (model.width, model.vocab_size)


@pytest.mark.parametrize("name", FAMILIES.values())
def test_a_token_depends_on_all_before_it_and_on_none_after(name):
    model, variables = small(name)
    embedded = variables["params"]["embed"]["embedding"][tokens()]

    # The table of each place is its own, so that the gradient tells them apart.
    def chosen(table):
        params = {**variables["params"], "embed": {"embedding": table.reshape(-1, model.width)}}
        places = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
        wide = model.clone(vocab_size=BATCH * LENGTH)
        hidden, _ = wide.apply({**variables, "params": params}, places, method="hidden")
        return jnp.sum(jnp.square(hidden[:, 8] - 0.3))

    seen = jnp.abs(jax.jit(jax.grad(chosen))(embedded)).sum(-1) > 0
    assert seen[:, :9].all() and not seen[:, 9:].any()


@pytest.mark.parametrize("name", FAMILIES.values())
def test_pieces_with_a_state_are_the_whole(name):
    model, variables = small(name)
    whole, _ = apply(name)(variables, tokens())
    state, parts = model.init_state(BATCH, LENGTH), []
    for piece in jnp.split(tokens(), [5, 6], axis=1):
        logits, state = apply(name)(variables, piece, state=state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES.values())
def test_padding_on_the_left_is_another_document(name):
    model, variables = small(name)
    alone, _ = apply(name)(variables, tokens()[:, 4:])
    segment_ids = jnp.asarray([[0] * 4 + [1] * (LENGTH - 4)] * BATCH)
    padded, state = apply(name)(
        variables, tokens(), segment_ids=segment_ids, state=model.init_state(BATCH, LENGTH + 1)
    )
    np.testing.assert_allclose(padded[:, 4:], alone, atol=2e-5, rtol=1e-4)
    following, _ = apply(name)(variables, tokens(1)[:, :1], state=state)
    joined = jnp.concatenate([tokens()[:, 4:], tokens(1)[:, :1]], axis=1)
    expected, _ = apply(name)(variables, joined)
    np.testing.assert_allclose(following[:, 0], expected[:, -1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES.values())
def test_packed_loss_is_that_of_the_documents(name):
    """Auxiliary losses of experts are of a batch and not of a document: left out."""
    model, variables = small(name)
    model_state = {kind: tree for kind, tree in variables.items() if kind != "params"}
    cut, weights = 5, jnp.ones((BATCH, LENGTH)).at[:, 4].set(0.0)
    batch = {"tokens": tokens(), "targets": tokens(1), "weights": weights}
    batch["segment_ids"] = jnp.asarray([[0] * cut + [1] * (LENGTH - cut)] * BATCH)

    @jax.jit
    def of(params, batch):
        terms = model.loss(params, batch, jax.random.key(0), model_state)[1]
        return terms["cross_entropy"] * jnp.sum(batch["weights"])

    packed = of(variables["params"], batch)
    alone = [
        of(variables["params"], {k: v[:, part] for k, v in batch.items() if k != "segment_ids"})
        for part in (slice(0, cut), slice(cut, None))
    ]
    np.testing.assert_allclose(packed, sum(alone), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES.values())
def test_training_lowers_the_loss(name):
    model, _ = small(name)
    optimizer = optax.adam(1e-2)
    state = jaxmodels.training.init_state(model, optimizer, jax.random.key(0), {"tokens": tokens()})
    step = jaxmodels.training.make_step(model.loss, optimizer)
    losses = []
    for _ in range(12):
        state, metrics = step(state, {"tokens": tokens(), "targets": tokens(1)})
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("family", ["Mixtral", "DeepseekV3"])
def test_padding_does_not_enter_the_balance_of_experts(family):
    model, variables = small(FAMILIES[family])
    if family == "Mixtral":
        model = model.clone(balance_coefficient=0.25)
    model_state = {kind: tree for kind, tree in variables.items() if kind != "params"}
    padding, ids = 4, jnp.ones((BATCH, LENGTH), int).at[:, -4:].set(0)
    batch = {"targets": tokens(1), "weights": 1.0 * ids, "segment_ids": ids}

    @jax.jit
    def of(text):
        batch_of = {**batch, "tokens": text}
        _, terms, state = model.loss(variables["params"], batch_of, jax.random.key(0), model_state)
        return terms, state

    others = tokens().at[:, -padding:].set(tokens(2)[:, -padding:])
    assert (others != tokens()).any()
    assert of(tokens())[0]["balance"] > 0
    chex.assert_trees_all_close(of(others), of(tokens()), rtol=1e-5)
