"""Every kind of model on every kind of mesh gives what it gives on one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import training
from jaxmodels.models.detection.fcos import FCOS
from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.models.generative.dit import DiT
from jaxmodels.models.language.decoder import Decoder
from jaxmodels.models.language.llama import Llama
from jaxmodels.models.language.mixtral import Mixtral
from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.models.vision.swin import SwinTransformer
from jaxmodels.models.vision.vit import VisionTransformer
from jaxmodels.training.communication import bytes_sent
from jaxmodels.training.sharding import check_axes_used, tree_shardings

BATCH, SIDE, LENGTH, VOCAB = 8, 16, 24, 36
RNG = np.random.default_rng(0)
LLAMA = {"width": 24, "depth": 1, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 20}
MODELS = {
    "vit": VisionTransformer(16, 2, 4, image_size=SIDE, patch_size=4, num_classes=6),
    "dit": DiT(16, 2, 4, input_size=SIDE, patch_size=2, in_channels=3, num_classes=6),
    "swin": SwinTransformer(width=8, depths=(2, 1), num_heads=(2, 4), window=3, num_classes=6),
    "detector": FCOS(
        FeaturePyramid(
            ResNet((1, 1), (8, 16), bottleneck=False, stem_width=8, num_classes=0),
            ("C2", "C3"),
            width=8,
            extra=None,
        ),
        3,
        (9.0,),
        head_width=16,
        head_depth=1,
    ),
    "decoder": Llama(**LLAMA, vocab_size=VOCAB),
    "ssd": Decoder(
        vocab_size=VOCAB,
        width=24,
        depth=1,
        mixer="ssd",
        mixer_options={"num_heads": 4, "head_dim": 6, "chunk_size": 4},
    ),
    "experts": Mixtral(**LLAMA, vocab_size=VOCAB, num_experts=4),
}
# ViT's 17 tokens do not divide by a ring of four; the rest does.
CASES = [
    ("vit", "data=2,fsdp=2,tensor=2"),
    ("vit", "sequence=4,tensor=2"),
    ("dit", "fsdp=2,sequence=2,tensor=2"),
    ("swin", "data=2,fsdp=2,tensor=2"),
    ("detector", "fsdp=4,tensor=2"),
    ("decoder", "fsdp=2,tensor=4"),
    ("decoder", "data=2,sequence=4"),
    ("ssd", "sequence=4,tensor=2"),
    ("experts", "fsdp=2,expert=4"),
    ("experts", "expert=2,sequence=2,tensor=2"),
]
# At most so many bytes are sent by a device in these ways. Heads stay on their devices, and
# parts of sequences too: what is gathered is where documents begin. So do tokens, unless
# they travel to experts: what is gathered are parameters.
LIMITS = {
    CASES[0]: {"all-to-all": 0, "collective-permute": 0},
    ("decoder", "data=2,sequence=4"): {"all-gather": 8 * BATCH * LENGTH},
    ("experts", "fsdp=2,expert=4"): {"all-gather": 4000},
}


def images():
    return RNG.normal(size=(BATCH, SIDE, SIDE, 3)).astype(np.float32)


def labels():
    return RNG.integers(0, 6, BATCH)


def classification_batch(_):
    return {"images": images(), "labels": labels()}


def classification_loss(model, params, batch, state):
    logits = model.apply({"params": params}, batch["images"])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1)
    return -chosen.mean()


def flow_batch(_):
    return {"x": images(), "t": RNG.uniform(0, 1000, BATCH).astype(np.float32), "y": labels()}


def flow_loss(model, params, batch, state):
    out = model.apply({"params": params}, batch["x"], batch["t"], batch["y"])
    return jnp.mean(jnp.square(out - batch["x"]))


def detection_batch(_):
    corner, size = RNG.uniform(0, 8, (BATCH, 5, 2)), RNG.uniform(4, 8, (BATCH, 5, 2))
    return {
        "image": images(),
        "boxes": np.concatenate([corner, corner + size], axis=-1).astype(np.float32),
        "box_labels": RNG.integers(-1, 3, (BATCH, 5)),
        "box_ignored": np.zeros((BATCH, 5), bool),
        "image_size": np.full((BATCH, 2), SIDE),
    }


def text_batch(_):
    ids = np.sort(RNG.integers(0, 3, (BATCH, LENGTH)), axis=1)
    tokens, targets = RNG.integers(0, VOCAB, (2, BATCH, LENGTH))
    return {"tokens": tokens, "targets": targets, "segment_ids": ids}


def own_loss(model, params, batch, state):
    return model.loss(params, batch, jax.random.key(1), state)[0]


KINDS = {
    "vit": (classification_batch, classification_loss),
    "swin": (classification_batch, classification_loss),
    "dit": (flow_batch, flow_loss),
    "detector": (detection_batch, own_loss),
}


@functools.cache
def built(name):
    """A batch, variables away from special starting values, and what one device makes of them."""
    model = MODELS[name]
    make_batch, loss = KINDS.get(name, (text_batch, own_loss))
    batch = make_batch(name)
    example = {"dit": ("x", "t", "y")}.get(name, tuple(batch)[:1])
    variables = dict(
        jax.jit(model.init)(jax.random.key(0), *(jnp.asarray(batch[key][:1]) for key in example))
    )
    params = variables.pop("params")
    keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), keys)
    params = jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), params, keys)
    of = jax.value_and_grad(lambda params, batch: loss(model, params, batch, variables))
    return params, batch, of, jax.device_get(jax.jit(of)(params, batch))


def on_mesh(name, text):
    """The compiled function and its arguments where the mesh wants them."""
    params, batch, of, _ = built(name)
    mesh = training.make_mesh(text)
    shardings = tree_shardings(params, mesh)
    check_axes_used(shardings, mesh)
    placed = jax.device_put(params, shardings), training.shard_batch(batch, mesh)
    with jax.set_mesh(mesh):
        return jax.jit(of, out_shardings=(None, shardings)).lower(*placed).compile(), placed


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_many_devices_give_what_one_gives(name, mesh):
    compiled, arguments = on_mesh(name, mesh)
    loss, gradients = jax.device_get(compiled(*arguments))
    expected_loss, expected = built(name)[-1]
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for leaf in jax.tree.leaves(expected):
        assert np.isfinite(leaf).all()
    chex.assert_trees_all_close(gradients, expected, rtol=1e-4, atol=1e-5)
    sent = bytes_sent(compiled.as_text())
    for kind, most in LIMITS.get((name, mesh), {}).items():
        assert sent.get(kind, 0) <= most
