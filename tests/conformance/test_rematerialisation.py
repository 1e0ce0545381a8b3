"""Every model under every policy: the same parameters, values, gradients and draws, less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models.generative.dit import DiT
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.models.language.deepseek_v3 import DeepseekV3
from jaxmodels.models.language.llama import Llama
from jaxmodels.models.language.multi_token import MultiToken
from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.models.vision.swin import SwinTransformer
from jaxmodels.models.vision.vit import VisionTransformer

VOCAB = 37
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (2, 11)))
LATENTS = IMAGES, jnp.asarray([3.0, 700.0]), jnp.asarray([1, 4])

_HEADS = {"width": 20, "num_heads": 5}
_LANGUAGE = {"width": 24, "vocab_size": VOCAB}
_LATENT = {"q_rank": 13, "kv_rank": 11, "nope_dim": 5, "rope_dim": 6, "value_dim": 7}
_EXPERTS = {"num_experts": 6, "groups": 3, "top_groups": 2, "top_k": 3, "expert_width": 17}
_ROTARY = {"num_heads": 4, "num_kv_heads": 2, "mlp_width": 41}
_LLAMA = Llama(**_LANGUAGE, **_ROTARY, depth=5)
MODELS = {
    "dit": DiT(**_HEADS, depth=5, input_size=16, patch_size=4, in_channels=3, num_classes=7),
    "vit": VisionTransformer(
        **_HEADS, depth=6, image_size=16, patch_size=4, num_classes=7, dropout=0.2, drop_path=0.3
    ),
    "swin": SwinTransformer(
        width=12, depths=(4,), num_heads=(2,), window=2, patch_size=2, drop_path=0.3
    ),
    "resnet": ResNet((1, 4), (8, 16), stem="cifar", stem_width=8, num_classes=5),
    "llama": _LLAMA,
    "deepseek": DeepseekV3(
        **_LANGUAGE, **_LATENT, **_EXPERTS, depth=3, num_heads=4, mlp_width=41, dense_depth=1
    ),
    "hybrid": Decoder(
        **_LANGUAGE,
        depth=3,
        mixer=("softmax", "retention", "retention"),
        mixer_options={"num_heads": 2},
    ),
    "heads": MultiToken(_LLAMA.clone(parent=None), heads=2),
}
# Each policy with each way of running blocks, and each model with some policy.
CASES = [
    *(("vit", {"remat": remat}) for remat in ("dots", "blocks", "sqrt", "everything")),
    *(("resnet", {"remat": remat}) for remat in ("dots", "everything")),
    ("llama", {"remat": "sqrt"}),
    ("llama", {"scan": True}),
    ("dit", {"remat": "sqrt"}),
    ("swin", {"remat": "sqrt"}),
    ("deepseek", {"remat": "everything"}),
    ("hybrid", {"remat": "blocks"}),
    ("heads", {"remat": "sqrt"}),
]


def changed(model, fields):
    if isinstance(model, MultiToken):
        return model.clone(trunk=model.trunk.clone(parent=None, **fields))
    return model.clone(**fields)


def plain(name):
    return changed(MODELS[name], {"remat": "none"})


def inputs(model):
    if isinstance(model, DiT):
        return LATENTS
    return (TOKENS if hasattr(model, "loss") else IMAGES,)


@functools.cache
def variables(name):
    """Random everywhere: blocks that start as identities hide mistakes."""
    model = plain(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs(model))
    rng = np.random.default_rng(2)

    def draw(leaf):
        if leaf.ndim < 2:  # also variances, which are positive
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5, jnp.float32)

    return jax.tree.map(draw, shapes)


def loss(model, params, rest):
    key = jax.random.key(3)
    if hasattr(model, "loss"):
        batch = {"tokens": TOKENS, "targets": TOKENS[:, ::-1]}
        value, terms, rest = model.loss(params, batch, key, rest)
        return value, (terms, rest)
    out, rest = model.apply(
        {"params": params, **rest},
        *inputs(model),
        train=True,
        rngs={"dropout": key},
        mutable=[*rest],
    )
    return jnp.mean(jnp.sin(out)), rest


def gradient(name, model):
    of = jax.jit(jax.value_and_grad(functools.partial(loss, model), has_aux=True))
    rest = dict(variables(name))
    return of(rest.pop("params"), rest)


expected = functools.cache(lambda name: gradient(name, plain(name)))


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_policies_change_no_value(name, fields):
    """The loss, its terms, all gradients, and statistics and biases that training moves."""
    model = changed(MODELS[name], fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs(model))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables(name))
    found, wanted = gradient(name, model), expected(name)
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(wanted[1]))

    # What is computed again is fused otherwise, and rounded otherwise.
    def near(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-6 * scale)

    jax.tree.map(near, found, wanted)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "llama"])
def test_policies_keep_less_and_less(name):
    def kept(remat):
        model, rest = changed(MODELS[name], {"remat": remat}), dict(variables(name))
        params = rest.pop("params")
        back = jax.eval_shape(
            lambda params: jax.vjp(lambda p: loss(model, p, rest)[0], params)[1], params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    none, dots, blocks, sqrt = (kept(remat) for remat in ("none", "dots", "blocks", "sqrt"))
    assert none > dots > max(blocks, sqrt)


def test_initial_values_do_not_depend_on_the_policy():
    for name in ("vit", "llama"):
        one, other = (
            jax.jit(model.init)(jax.random.key(0), *inputs(model))
            for model in (plain(name), changed(MODELS[name], {"remat": "sqrt"}))
        )
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_state_goes_through_the_blocks_one_by_one():
    model = changed(MODELS["llama"], {"remat": "sqrt"})
    (whole, none), (out, state) = jax.jit(
        lambda state: [model.apply(variables("llama"), TOKENS, state=s) for s in (None, state)]
    )(model.init_state(2, 11))
    assert none is None and len(state) == 5 and all(layer.k.any() for layer in state)
    np.testing.assert_allclose(out, whole, rtol=1e-4, atol=1e-5)


def test_sqrt_takes_a_quarter_of_the_memory_at_depth_64():
    """What XLA reports beside the arguments, gradients of the parameters included."""

    def temporary(remat):
        model = MODELS["vit"].clone(depth=64, remat=remat)
        shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
        of = jax.jit(jax.grad(lambda params: loss(model, params, {})[0]))
        return of.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary("sqrt") <= 0.25 * temporary("none")


def test_the_registry_passes_policies_on_and_unknown_ones_are_named():
    for name in ("vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "dit_s_8"):
        assert jaxmodels.create_model(name, remat="sqrt").remat == "sqrt"
    for name in ("dit", "vit", "swin", "resnet", "llama", "hybrid"):
        model = changed(MODELS[name], {"remat": "half"})
        with pytest.raises(ValueError, match=f"{type(model).__name__}: remat='half' is none of"):
            jax.eval_shape(model.init, jax.random.key(0), *inputs(model))
