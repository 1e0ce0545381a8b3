"""Position schemes: definitions, and that every mixer they are given to stays what it is."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxmodels import ops
from jaxmodels.layers.mixers.latent import LatentMixer
from jaxmodels.layers.mixers.softmax import SoftmaxMixer
from jaxmodels.layers.position_biases import Alibi, Kerple, Sandwich, T5Bias
from jaxmodels.layers.positions import (
    NoPositions,
    ReRope,
    Rotary,
    XPos,
    attended_keys,
    hybrid_window_full,
)
from jaxmodels.layers.rotary_scaling import DynamicNtk, NtkAware, Yarn
from jaxmodels.ops.rerope import naive_rerope_attention
from jaxmodels.ops.rotary import rotary_frequencies

B, T, H, K, V = 2, 13, 3, 10, 7
PLACES = jnp.broadcast_to(jnp.arange(T), (B, T))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


Q, KEYS, VALUES = (draw(i, B, T, H, n) for i, n in enumerate((K, K, V)))


def attend(scheme, q=Q, **options):
    keys = attended_keys(scheme, KEYS, PLACES)
    return scheme.attend(q, keys, VALUES, PLACES, PLACES, causal=True, **options)


def with_log_n(q, train_length):
    """Queries scaled position by position, in float64."""
    scales = [max(1.0, math.log(t + 1) / math.log(train_length)) for t in range(T)]
    return jnp.asarray((np.asarray(q, np.float64) * np.reshape(scales, (T, 1, 1))).astype("f4"))


def test_no_positions_is_plain_attention():
    expected = ops.dot_product_attention(Q, KEYS, VALUES, causal=True, implementation="naive")
    np.testing.assert_allclose(attend(NoPositions()), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("plain", "scaled"),
    [
        (NoPositions(), NoPositions(4)),
        (Rotary(), Rotary(train_length=4)),
        (ReRope(3), ReRope(3, rotary=Rotary(train_length=4))),
        (XPos(Rotary()), XPos(Rotary(train_length=4))),
    ],
    ids=lambda scheme: type(scheme).__name__,
)
def test_log_n_scales_queries(plain, scaled):
    expected = attend(plain, with_log_n(Q, 4))
    np.testing.assert_allclose(attend(scaled), expected, rtol=1e-4, atol=1e-5)


def test_partial_rotary_leaves_the_last_channels():
    """Keys that differ in the first channels alone give the same as whole rotary of these."""
    zeros = jnp.zeros((B, T, H, K - 6))
    q, k = (jnp.concatenate([x[..., :6], zeros], -1) for x in (Q, KEYS))
    scale = 1 / math.sqrt(K)
    partial, whole = Rotary(fraction=0.6), Rotary()
    out = partial.attend(q, partial.keys(k, PLACES), VALUES, PLACES, PLACES, causal=True)
    turned = whole.keys(k[..., :6], PLACES)
    expected = whole.attend(q[..., :6], turned, VALUES, PLACES, PLACES, causal=True, scale=scale)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_xpos_by_definition():
    """In complex float64; the fade is that of Sun et al., algorithm 1."""
    base, z = 19.0, lambda x: torch.tensor(np.asarray(x, np.float64))
    q, k = (torch.complex(z(x)[..., ::2], z(x)[..., 1::2]) for x in (Q, KEYS))
    i = torch.arange(K // 2, dtype=torch.float64)
    zeta, w = (2 * i / K + 0.4) / 1.4, 10_000.0 ** (-2 * i / K)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    wave = torch.exp(1j * distance[..., None] * w) * zeta ** (distance[..., None] / base)
    logits = torch.einsum("bthi,bshi,tsi->bhts", q, k.conj(), wave).real / K**0.5
    weights = torch.softmax(logits.masked_fill(distance < 0, -torch.inf), -1)
    expected = torch.einsum("bhts,bshv->bthv", weights, z(VALUES))
    np.testing.assert_allclose(attend(XPos(scale_base=base)), expected, rtol=1e-4, atol=1e-5)


def test_xpos_is_finite_far_out():
    far = XPos().attend(Q, KEYS, VALUES, PLACES + 40_000, PLACES + 40_000, causal=True)
    # Angles of forty thousand radians are known to three digits in float32.
    np.testing.assert_allclose(far, attend(XPos()), atol=2e-2)


@pytest.mark.parametrize("leak", [None, 3.0])
def test_rerope_passes_the_rotation_on(leak):
    rotary = Rotary(53.0, layout="interleaved")
    expected = naive_rerope_attention(
        Q,
        KEYS,
        VALUES,
        rotary_frequencies(K, 53.0),
        rectify_at=4,
        leak=leak,
        layout="interleaved",
    )
    out = attend(ReRope(4, leak, rotary))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_rerope_passes_the_scaling_on():
    rotary = Rotary(scaling=Yarn(3.0, 4), train_length=4)
    np.testing.assert_allclose(
        attend(ReRope(T, None, rotary)), attend(rotary), rtol=1e-4, atol=1e-5
    )


SCHEMES = {
    "none": NoPositions(3),
    "rotary": Rotary(fraction=0.6, layout="interleaved"),
    "ntk": Rotary(scaling=NtkAware(3.0), train_length=3),
    "yarn": Rotary(scaling=Yarn(3.0, 4)),
    "dynamic": Rotary(scaling=DynamicNtk(3)),
    "xpos": XPos(),
    "rerope": ReRope(2),
    "leaky": ReRope(2, 3.0, Rotary(scaling=Yarn(3.0, 4))),
    "alibi": Alibi(),
    "sandwich": Sandwich(),
    "kerple": Kerple("power"),
    "t5": T5Bias(),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_documents_and_streaming(name):
    """Packed documents equal separate ones, and the last queries alone those of the whole."""
    scheme, cut = SCHEMES[name], 5
    ids = jnp.broadcast_to((jnp.arange(T) >= cut).astype(int), (B, T))
    seen = jnp.tril(jnp.ones((1, 1, T, T), bool))[:, :, cut:]
    learned = {}
    if isinstance(scheme, nn.Module):
        init = functools.partial(scheme.init, method="attend")
        learned = jax.jit(init)(jax.random.key(0), Q, KEYS, VALUES, PLACES, PLACES)

    @jax.jit
    def run(q, k, v):
        def attend(q, k, v, q_places, k_places, **options):
            arguments = q, attended_keys(scheme, k, k_places), v, q_places, k_places
            if not learned:
                return scheme.attend(*arguments, **options)
            return scheme.apply(learned, *arguments, method="attend", **options)

        whole = attend(q, k, v, PLACES, PLACES, causal=True)
        last = attend(q[:, cut:], k, v, PLACES[:, cut:], PLACES, mask=seen)
        places = PLACES - cut * ids
        packed = attend(q, k, v, places, places, causal=True, segment_ids=ids)
        rest = (x[:, cut:] for x in (q, k, v, places, places))
        return whole[:, cut:], last, packed[:, cut:], attend(*rest, causal=True)

    whole, last, packed, separate = run(Q, KEYS, VALUES)
    np.testing.assert_allclose(last, whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed, separate, rtol=1e-4, atol=1e-5)


def test_a_trained_model_takes_any_extrapolation_method():
    """No scheme of these has parameters, and within the trained length some change nothing."""
    x = draw(7, B, T, 17)
    trained = SoftmaxMixer(num_heads=3, head_dim=8)
    variables = jax.jit(trained.init)(jax.random.key(0), x)
    expected, _ = trained.apply(variables, x)
    for scheme, same in (
        (Rotary(scaling=DynamicNtk(T)), True),
        (Rotary(train_length=T), True),
        (ReRope(2), False),
    ):
        out, _ = SoftmaxMixer(position=scheme, num_heads=3, head_dim=8).apply(variables, x)
        assert np.allclose(out, expected, rtol=1e-4, atol=1e-5) == same, scheme


MIXERS = {
    "softmax": SoftmaxMixer(num_heads=3, head_dim=8),
    "window": SoftmaxMixer(num_heads=3, head_dim=8, window=11),
    "latent": LatentMixer(num_heads=3, kv_rank=6, nope_dim=4, rope_dim=4, value_dim=5),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("scaling", [None, DynamicNtk(T)], ids=["fixed", "by length"])
def test_keys_are_cached_turned_unless_the_turn_follows_the_length(name, scaling):
    """A step then turns its own key alone, whatever the cache holds; the outputs are those
    of the whole sequence either way."""
    rotary = Rotary(scaling=scaling)
    assert rotary.follows_length == (scaling is not None)
    mixer, x = MIXERS[name].clone(position=rotary), draw(7, B, T, 17)
    variables = jax.jit(mixer.init)(jax.random.key(0), x)
    expected, _ = mixer.apply(variables, x)

    def step(x, state):
        return mixer.apply(variables, x, state=state)

    state, outs = mixer.init_state(B, 29, jnp.float32), []
    lines = str(jax.make_jaxpr(step)(x[:, :1], state)).splitlines()
    turned = max(
        math.prod(map(int, re.search(r"f32\[([\d,]+)\] = cos", line)[1].split(",")))
        for line in lines
        if " = cos " in line
    )
    assert (turned > B * 8) == (scaling is not None)
    take = jax.jit(step)
    for t in range(T):
        out, state = take(x[:, t : t + 1], state)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, rtol=1e-4, atol=1e-5)


def test_hybrid_of_window_and_full_layers():
    """The last token sees the first one, which windows alone do not let it."""
    layers = hybrid_window_full(3, window=2, train_length=4)
    assert [layer["window"] for layer in layers] == [2, 2, None]
    assert [type(layer["position"]) for layer in layers] == [Rotary, Rotary, NoPositions]
    assert layers[-1]["position"].train_length == 4
    narrow = hybrid_window_full(3, window=2, train_length=4, full=0)

    @functools.partial(jax.jit, static_argnums=1)
    def last(x, hybrid):
        for layer in layers if hybrid else narrow:
            options = {"causal": True, "window": layer["window"]}
            keys = attended_keys(layer["position"], x, PLACES[:1])
            x = x + layer["position"].attend(x, keys, x, PLACES[:1], PLACES[:1], **options)
        return x[0, -1].sum()

    for hybrid, first_seen in ((True, 0), (False, T - 1 - 3 * 2)):
        moves = jnp.abs(jax.grad(last)(Q[:1], hybrid)).max(axis=(0, 2, 3))
        np.testing.assert_array_equal(moves > 0, np.arange(T) >= first_seen)


def test_bad_input():
    with pytest.raises(ValueError, match=r"Rotary: fraction=1.5 must be in \(0, 1\]"):
        attend(Rotary(fraction=1.5))
    with pytest.raises(ValueError, match="rotary_frequencies: width=3 cannot be split"):
        attend(Rotary(fraction=0.3))
    with pytest.raises(ValueError, match=r"hybrid_window_full: full=4 must be in \[0, depth=3\]"):
        hybrid_window_full(3, window=2, train_length=4, full=4)
