"""What every registered sequence mixer promises, whatever mathematics is inside.

A new mixer is tested by being registered. What it computes is compared with its
paper in `tests/layers/mixers/`; here it is compared with itself where the
promise is that two ways of calling it agree.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance.mixer_cases import (
    BATCH,
    BIDIRECTIONAL,
    BOTH,
    CAUSAL,
    LENGTH,
    NAMES,
    STATELESS,
    WIDTH,
    assert_close,
    built,
    inputs,
    segments,
    sizes,
    small,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmodels
from jaxmodels.models.generative.dit import DiT
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.registry import module_fields


def test_the_names_are_the_published_ones():
    assert {
        *("softmax", "sliding_window", "sparse", "linear", "efficient", "performer", "linformer"),
        *("gau", "flash_quad", "flash", "retention", "ssd", "gla", "hgrn2", "delta"),
        *("gated_delta", "kda"),
    } <= {*NAMES}
    assert {"linformer"} == {*STATELESS}


@pytest.mark.parametrize("name", NAMES)
def test_defaults_suit_any_width(name):
    mixer = jaxmodels.create_mixer(name)
    for width in (32, 768):
        x = jax.ShapeDtypeStruct((2, 5, width), jnp.float32)
        out, (after, state) = jax.eval_shape(
            lambda x: (x, mixer.init_with_output(jax.random.key(0), x)[0]), x
        )
        assert after.shape == out.shape and after.dtype == jnp.float32 and state is None


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_what_an_output_depends_on(name, causal):
    """By gradients: tokens before it, tokens after it unless causal, no other sequence."""
    _, params, call = built(name, causal)
    weights = jax.random.normal(jax.random.key(3), (WIDTH,))
    place = 13

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: call(params, x)[0][1, place] @ weights)(x)

    # Not at zero: a window, stride or chunk must lie within reach.
    reach = np.abs(np.asarray(gradient(inputs()))).max(axis=-1)
    assert not reach[[0, 2]].any()
    assert reach[1, place] > 0 and reach[1, :place].any()
    assert reach[1, place + 1 :].any() == (not causal)


@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "sliding_window"])
def test_the_distant_past_is_seen(name):
    _, params, call = built(name)
    out = call(params, inputs())[0]
    other = call(params, inputs().at[:, 1].add(1.0))[0]
    assert jnp.max(jnp.abs(other - out)[:, -3:]) > 1e-7


@pytest.mark.parametrize("name", CAUSAL)
def test_token_by_token_is_the_whole(name):
    mixer, params, call = built(name)
    x = inputs()

    @jax.jit
    def stream(params, x):
        def one(state, token):
            out, state = mixer.apply(params, token[:, None], state=state)
            return state, out[:, 0]

        state = mixer.init_state(BATCH, LENGTH, jnp.float32)
        return jax.lax.scan(one, state, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    assert_close(stream(params, x), call(params, x)[0])


@pytest.mark.parametrize("name", CAUSAL)
def test_chunk_by_chunk_is_the_whole(name):
    mixer, params, call = built(name)
    x, state = inputs(), mixer.init_state(BATCH, LENGTH + 2, jnp.float32)
    parts = []
    for low, high in ((0, 11), (11, 12), (12, LENGTH)):
        before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        part, state = call(params, x[:, low:high], state=state)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before
        parts.append(part)
    assert_close(jnp.concatenate(parts, axis=1), call(params, x)[0])


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_packed_documents_are_separate_documents(name, causal):
    _, params, call = built(name, causal)
    lengths = (9, 14)
    ends = np.cumsum(lengths)
    weights = inputs(seed=7)

    def loss(params, x, weights, segment_ids=None):
        out = call(params, x, segment_ids)[0]
        return jnp.sum(out * weights), out

    differentiate = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (d_params, d_x), out = differentiate(params, inputs(), weights, segments(*lengths))
    parts = [
        differentiate(params, inputs()[:, end - n : end], weights[:, end - n : end])
        for n, end in zip(lengths, ends, strict=True)
    ]
    assert_close(out, jnp.concatenate([part[1] for part in parts], axis=1))
    assert_close(d_x, jnp.concatenate([part[0][1] for part in parts], axis=1), 5e-5)
    summed = jax.tree.map(jnp.add, *(part[0][0] for part in parts))
    assert_close(d_params, summed, 5e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_state_goes_on_with_the_last_document(name):
    mixer, params, call = built(name)
    x = inputs()
    empty = mixer.init_state(BATCH, LENGTH + 5, jnp.float32)
    # The first document began in an earlier call; the second goes on after this one.
    _, state = call(params, x[:, :4], state=empty)
    packed, state = call(params, x[:, 4:18], segments(5, 9), state)
    after, _ = call(params, x[:, 18:], state=state)
    first = call(params, x[:, :9])[0]
    second = call(params, x[:, 9:])[0]
    assert_close(packed[:, :5], first[:, 4:])
    assert_close(jnp.concatenate([packed[:, 5:], after], axis=1), second)


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_padding_is_invisible_and_values_do_not_recompile(name, causal):
    mixer, params, _ = built(name, causal)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def call(params, x, segment_ids):
        return mixer.apply(params, x, segment_ids=segment_ids)[0]

    x = inputs()
    ids = segments(17, LENGTH - 17)
    want = call(params, x, ids)
    noisy = call(params, x.at[:, 17:].multiply(-30.0), ids)
    assert_close(noisy[:, :17], want[:, :17])
    # What pads may itself be cut anywhere.
    cut = call(params, x, segments(17, 2, LENGTH - 19))
    assert_close(cut[:, :17], want[:, :17])


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_bfloat16_is_near_float32(name, causal):
    _, params, call = built(name, causal)
    mixer = small(name, causal=causal, dtype=jnp.bfloat16)
    out, _ = jax.jit(mixer.apply)(params, inputs().astype(jnp.bfloat16))
    want = call(params, inputs())[0]
    assert out.dtype == jnp.bfloat16
    error = jnp.linalg.norm(out.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert error < 0.03


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_sharded_over_batch_and_heads_is_one_device(name, causal):
    mixer, params, call = built(name, causal)
    mesh = Mesh(np.asarray(jax.devices()[:6]).reshape(3, 2), ("data", "model"))

    def place(leaf):
        split = leaf.ndim == 2 and leaf.shape[1] % 2 == 0
        return jax.device_put(leaf, NamedSharding(mesh, P(None, "model") if split else P()))

    sharded = jax.tree.map(place, params)
    x = jax.device_put(inputs(), NamedSharding(mesh, P("data")))
    out = jax.jit(lambda params, x: mixer.apply(params, x)[0])(sharded, x)
    assert_close(out, call(params, inputs())[0])


@pytest.mark.parametrize(("name", "causal"), BOTH)
def test_one_token(name, causal):
    mixer, params, call = built(name, causal)
    x = inputs()[:, :1]
    alone = call(params, x)[0]
    assert jnp.isfinite(alone).all()
    # A document of one token, wherever it stands.
    ids = segments(1, 6)
    assert_close(call(params, inputs()[:, :7], ids)[0][:, :1], alone)
    if causal:
        state = mixer.init_state(BATCH, 1, jnp.float32)
        assert_close(call(params, x, state=state)[0], alone)


@pytest.mark.parametrize("name", [n for n in NAMES if "form" in module_fields(small(n))])
def test_forms_agree(name):
    _, params, call = built(name)
    want = call(params, inputs())[0]
    for form in ("parallel", "chunked", "recurrent"):
        out = jax.jit(small(name, form=form).apply)(params, inputs())[0]
        assert_close(out, want)


@pytest.mark.parametrize("name", CAUSAL)
def test_in_a_decoder(name):
    """Trains and streams as a layer of the language model; a step lowers the loss."""
    model = Decoder(width=WIDTH, depth=2, vocab_size=17, mixer=name, mixer_options=sizes(name))
    tokens = jax.random.randint(jax.random.key(4), (BATCH, LENGTH), 0, 17)
    params = jax.jit(model.init)(jax.random.key(5), tokens)

    @jax.jit
    def loss(params):
        logits, _ = model.apply(params, tokens[:, :-1])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return -jnp.mean(picked)

    before, gradient = jax.jit(jax.value_and_grad(loss))(params)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradient)))
    after = loss(jax.tree.map(lambda p, g: p - 0.02 * g / norm, params, gradient))
    assert after < before
    state = model.init_state(BATCH, LENGTH, jnp.float32)
    whole = jax.jit(model.apply)(params, tokens)[0]
    call = jax.jit(lambda tokens, state: model.apply(params, tokens, state=state))
    first, state = call(tokens[:, :12], state)
    second, _ = call(tokens[:, 12:], state)
    assert_close(jnp.concatenate([first, second], axis=1), whole, 5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_in_the_main_jobs_transformer(name):
    """Bidirectional where that is defined, an error that says so where it is not."""
    model = DiT(
        width=WIDTH,
        depth=2,
        num_heads=2,
        input_size=8,
        patch_size=2,
        in_channels=1,
        num_classes=3,
        mixer=name,
        mixer_options=sizes(name),
    )
    x, t, labels = jnp.ones((2, 8, 8, 1)), jnp.ones(2), jnp.zeros(2, jnp.int32)
    if name not in BIDIRECTIONAL:
        with pytest.raises(ValueError, match=r"causal=False is not defined.*\"softmax\""):
            jax.eval_shape(model.init, jax.random.key(0), x, t, labels)
        return
    params = jax.jit(model.init)(jax.random.key(0), x, t, labels)
    params = jax.tree.map(lambda p: p + 0.02, params)
    noise = jax.random.normal(jax.random.key(6), x.shape)
    out, gradient = jax.jit(
        jax.value_and_grad(lambda params: jnp.sum(model.apply(params, noise, t, labels) ** 2))
    )(params)
    assert jnp.isfinite(out)
    mixing = gradient["params"]["blocks"]["mixer"]
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(mixing))
    assert any(g.any() for g in jax.tree.leaves(mixing))
