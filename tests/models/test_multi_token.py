"""Parallel heads: each a decoder of its own, trained together in the memory of one."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmodels.models.language.decoder import Decoder
from jaxmodels.models.language.language_model import DecoderBlock
from jaxmodels.models.language.llama import Llama
from jaxmodels.models.language.multi_token import MultiToken, targets_ahead

VOCAB, HEADS = 17, 3
TIED = Decoder(
    width=6, depth=3, vocab_size=VOCAB, mlp_width=10, mixer_options={"num_heads": 1, "head_dim": 4}
)
UNTIED = Llama(
    width=6, depth=2, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=10, vocab_size=VOCAB
)
TOKENS = jax.random.randint(jax.random.key(0), (2, 13), 0, VOCAB)
# Two documents and padding; a first document that is one token long.
SEGMENTS = jnp.array([[1] * 5 + [2] * 7 + [0], [1] + [2] * 9 + [0] * 3])


def batch_of(tokens, segments):
    """Targets one ahead, of weight one within a document."""
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1))) & (segments > 0)
    weights = jnp.where(same, jnp.arange(1, 14.0)[None] / 7, 0)
    targets = jnp.roll(tokens, -1, axis=1)
    return {"tokens": tokens, "targets": targets, "segment_ids": segments, "weights": weights}


BATCH = batch_of(TOKENS, SEGMENTS)


def make(trunk, **fields):
    model = MultiToken(trunk, heads=HEADS, **fields)
    params = jax.jit(model.init)(jax.random.key(1), TOKENS)["params"]
    return model, jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), params
    )


def trunk_of_head(model, params, number):
    """The parameters of a plain model that is one head."""
    last = f"block_{model.depth - 1}"
    own = params["trunk"][last] if number == 0 else params[f"block_ahead_{number - 1}"]
    return {**params["trunk"], last: own}


@pytest.mark.parametrize("trunk", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_head_is_the_trunk_with_another_last_block(trunk):
    model, params = make(trunk, drafting=True)
    assert set(params) == {"trunk", "block_ahead_0", "block_ahead_1"}
    apply = jax.jit(model.apply, static_argnames="method")
    hidden, state = apply({"params": params}, TOKENS, None, SEGMENTS, method="hidden")
    assert hidden.shape == (2, 13, HEADS * 6) and state is None
    plain = jax.jit(trunk.apply)
    for number in range(HEADS):
        own = trunk_of_head(model, params, number)
        expected, _ = plain({"params": own}, TOKENS, None, SEGMENTS)
        vectors = hidden[..., number * 6 :]
        found = apply({"params": params}, vectors, method="logits")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    kernel = model.output_kernel(params)
    np.testing.assert_allclose(hidden[..., -6:] @ kernel, found, rtol=1e-4, atol=1e-5)


def test_a_call_is_the_trunks():
    model, params = make(TIED)
    for drafting in (False, True):
        logits, _ = jax.jit(MultiToken(TIED, HEADS, drafting).apply)({"params": params}, TOKENS)
        expected, _ = jax.jit(TIED.apply)({"params": params["trunk"]}, TOKENS)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    state = model.init_state(2, 13)
    assert len(state) == 3
    _, state = jax.jit(model.apply)({"params": params}, TOKENS, state=state)
    assert int(state[0].length) == 13


def test_heads_can_be_cached():
    model, params = make(TIED, drafting=True)
    apply = jax.jit(partial(model.apply, method="hidden"))
    expected, _ = apply({"params": params}, TOKENS)
    state, found = model.init_state(2, 13), []
    assert len(state) == 3 + HEADS - 1
    for part in jnp.split(TOKENS, [5, 6], axis=1):
        hidden, state = apply({"params": params}, part, None, None, state)
        found.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-5)


def plain_loss(trunk, model, params, batch, z_loss):
    """Every head a plain model, every pair of a place and its target by itself."""
    documents = np.asarray(batch["segment_ids"])
    total, terms = 0.0, []
    for ahead in range(HEADS):
        logits, _ = trunk.apply(
            {"params": trunk_of_head(model, params, ahead)},
            batch["tokens"],
            None,
            batch["segment_ids"],
        )
        places = [
            (row, t)
            for row, t in np.ndindex(documents.shape)
            if t + ahead < 13 and documents[row, t] == documents[row, t + ahead]
        ]
        rows, t = np.array(places).T
        logits, w = logits[rows, t], batch["weights"][rows, t + ahead]
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["targets"][rows, t + ahead]
        )
        terms.append(jnp.sum(w * each) / jnp.sum(w))
        squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        total += terms[-1] + z_loss * jnp.sum(w * squares) / jnp.sum(w)
    return total, terms


@pytest.mark.parametrize("trunk", [TIED, UNTIED], ids=["tied", "untied"])
def test_loss_is_the_sum_of_plain_models(trunk):
    model, params = make(trunk)
    of = jax.value_and_grad(
        lambda p: model.loss(p, BATCH, jax.random.key(3), z_loss=0.1)[:2], has_aux=True
    )
    (loss, terms), gradients = jax.jit(of)(params)
    plain = jax.value_and_grad(lambda p: plain_loss(trunk, model, p, BATCH, 0.1), has_aux=True)
    (expected, parts), slopes = jax.jit(plain)(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    names = ["cross_entropy", "cross_entropy_2", "cross_entropy_3"]
    np.testing.assert_allclose([terms[name] for name in names], parts, rtol=1e-5)
    assert set(terms) == {*names, "z_loss", "z_loss_2", "z_loss_3"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), gradients, slopes
    )


def test_targets_ahead():
    targets, weights = targets_ahead(BATCH, 2)
    np.testing.assert_array_equal(targets[:, :11], BATCH["targets"][:, 2:])
    np.testing.assert_array_equal(weights[0] > 0, [1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(weights[1] > 0, [0] * 1 + [1] * 6 + [0] * 6)
    # Nothing marked: all targets there are. An id that comes back is another document.
    _, weights = targets_ahead({"targets": BATCH["targets"]}, 1)
    np.testing.assert_array_equal(weights, [[1] * 12 + [0]] * 2)
    back = {"targets": jnp.zeros((1, 3), int), "segment_ids": jnp.array([[1, 2, 1]])}
    np.testing.assert_array_equal(targets_ahead(back, 2)[1], 0)
    np.testing.assert_array_equal(targets_ahead(back, 4)[1], 0)


class Counts(nn.Module):
    """A feed-forward with a loss and with a count of its calls, as experts have."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.normal(), (x.shape[-1],))
        calls = self.variable("router", "calls", lambda: jnp.zeros(()))
        if not self.is_initializing():
            self.sow("losses", "size", jnp.sum(scale**2))
        if not self.is_initializing() and self.is_mutable_collection("router"):
            calls.value += 1
        return x * scale[None, None]


class Counting(Decoder):
    """A decoder of such feed-forwards."""

    def setup(self):
        self.embed = nn.Embed(self.vocab_size, self.width)
        self.block = [DecoderBlock(mixer, Counts()) for mixer in self.mixers()]
        self.final_norm, self.head, self.place = nn.RMSNorm(), None, None


def test_losses_and_variables_of_all_blocks_take_part():
    model = MultiToken(
        Counting(**{f: getattr(TIED, f) for f in ("width", "depth", "mixer_options")}), HEADS
    )
    variables = jax.jit(model.init)(jax.random.key(1), TOKENS)
    params, router = variables["params"], {"router": variables["router"]}
    blocks = [
        *(params["trunk"][f"block_{i}"] for i in range(3)),
        params["block_ahead_0"],
        params["block_ahead_1"],
    ]
    sizes = [float(jnp.sum(block["mlp"]["scale"] ** 2)) for block in blocks]

    def loss(params, router):
        loss, terms, changed = model.loss(params, BATCH, jax.random.key(0), router)
        return loss, (terms, changed)

    of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (terms, changed)), gradients = of(params, router)
    (_, (_, twice)), _ = of(params, changed)
    assert jax.tree.structure(changed) == jax.tree.structure(router)
    assert [float(x) for x in jax.tree.leaves(twice)] == [2] * 5
    np.testing.assert_allclose(terms["size"], sum(sizes[:3]), rtol=1e-5)
    np.testing.assert_allclose((terms["size_2"], terms["size_3"]), sizes[3:], rtol=1e-5)
    losses = sum(terms[name] for name in terms if name.startswith("cross_entropy"))
    np.testing.assert_allclose(value, losses + sum(sizes), rtol=1e-5)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradients))


def test_memory_of_training_hardly_grows_with_heads():
    trunk = Decoder(
        width=8, depth=2, vocab_size=2048, mixer_options={"num_heads": 1, "head_dim": 8}
    )
    tokens = jnp.zeros((2, 64), int)

    def bytes_of(heads):
        model = MultiToken(trunk, heads)
        params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        batch = {"tokens": tokens, "targets": tokens}
        of = jax.grad(lambda p: model.loss(p, batch, jax.random.key(0))[0])
        return jax.jit(of).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(6) < 1.2 * bytes_of(2)


def test_bad_input():
    with pytest.raises(ValueError, match="MultiToken: heads=0 must be at least 1"):
        MultiToken(TIED, 0).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="depth=1 at least 2, of which the last is the first head"):
        MultiToken(TIED.clone(depth=1), 2).init(jax.random.key(0), TOKENS)
    model, params = make(TIED, drafting=True)
    with pytest.raises(ValueError, match=r"state has 3 values, .* heads=3 needs 5; use init_state"):
        model.apply({"params": params}, TOKENS, state=TIED.init_state(2, 13))
    with pytest.raises(ValueError, match="MultiToken: the batch has no 'targets'"):
        model.loss(params, {"tokens": TOKENS}, jax.random.key(0))
