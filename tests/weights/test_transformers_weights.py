"""Folders of transformers' image models: read, written and read again, bit by bit."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from weights.torch_models import images, loaded, randomised, to_torch

import jaxmodels
from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.models.vision.swin import SwinTransformer
from jaxmodels.models.vision.swin_v2 import SwinTransformerV2
from jaxmodels.models.vision.vit import VisionTransformer
from jaxmodels.weights.preprocess import Preprocessing, load_preprocessing

LABELS = {"id2label": {i: str(i) for i in range(5)}}
PLAIN = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
PLAIN |= {"image_size": 15, "patch_size": 5}
SWIN = {"embed_dim": 6, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2, "patch_size": 3}
SWIN |= {"image_size": 18}
RESNET = {"embedding_size": 4, "hidden_sizes": [8, 16], "depths": [1, 2]}


def vit_config():
    return transformers.ViTConfig(**PLAIN, intermediate_size=31, **LABELS)


def dinov2_config(**changes):
    return transformers.Dinov2Config(**PLAIN, **LABELS, **changes)


def v2_config():
    return transformers.Swinv2Config(**SWIN, **LABELS, pretrained_window_sizes=[3, 2])


MODELS = {
    "vit": lambda: transformers.ViTModel(vit_config(), add_pooling_layer=False),
    "vit with pooler": lambda: transformers.ViTModel(vit_config()),
    "vit classifier": lambda: transformers.ViTForImageClassification(vit_config()),
    "dinov2": lambda: transformers.Dinov2Model(dinov2_config(use_mask_token=False)),
    "dinov2 classifier": lambda: transformers.Dinov2ForImageClassification(
        dinov2_config(use_swiglu_ffn=True)
    ),
    "swin": lambda: transformers.SwinModel(transformers.SwinConfig(**SWIN)),
    "swin classifier": lambda: transformers.SwinForImageClassification(
        transformers.SwinConfig(**SWIN, **LABELS)
    ),
    "swinv2": lambda: transformers.Swinv2Model(v2_config()),
    "swinv2 classifier": lambda: transformers.Swinv2ForImageClassification(v2_config()),
    "resnet": lambda: transformers.ResNetModel(
        transformers.ResNetConfig(**RESNET, downsample_in_bottleneck=True)
    ),
    "resnet classifier": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(**RESNET, **LABELS, layer_type="basic")
    ),
}


def pooled(model, x):
    out = model(to_torch(x))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit")
    loaded(randomised(MODELS["vit classifier"]()), path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_both_directions_are_bit_exact(tmp_path, name):
    theirs = randomised(MODELS[name]())
    model, variables = loaded(theirs, tmp_path / "theirs")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    jaxmodels.save_pretrained(model, variables, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])
        assert (before[key].dtype, before[key].shape) == (after[key].dtype, after[key].shape)

    options = {"add_pooling_layer": False} if name == "vit" else {}
    again, info = type(theirs).from_pretrained(
        tmp_path / "ours", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    assert again.config.num_labels == theirs.config.num_labels or "classifier" not in name
    side = theirs.config.image_size if hasattr(theirs.config, "image_size") else 32
    x = images(2, side, side, 3)
    kept = again.state_dict()
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, kept[key]), key
    with torch.no_grad():  # close, as torch rounds by where in memory a tensor lies
        torch.testing.assert_close(pooled(again.eval(), x), pooled(theirs, x))
    reread, same = jaxmodels.load_pretrained(tmp_path / "ours")
    assert reread == model
    chex.assert_trees_all_equal(variables, same)


OURS = {
    "vit": VisionTransformer(width=12, depth=2, num_heads=3, image_size=10, patch_size=5),
    "dinov2": VisionTransformer(
        width=16, depth=1, num_heads=2, image_size=10, patch_size=5, layer_scale=0.1, num_classes=0
    ),
    "swin": SwinTransformer(width=6, depths=(1, 1), num_heads=(1, 2), window=2, num_classes=3),
    "swinv2": SwinTransformerV2(
        width=6, depths=(1, 1), num_heads=(1, 2), window=2, image_size=32, trained_windows=(3, 0)
    ),
    "resnet": ResNet(depths=(1, 1), widths=(8, 8), stem_width=8, stride_on="1x1"),
}


@pytest.mark.parametrize("name", OURS)
def test_models_made_here_come_back(tmp_path, name):
    model = OURS[name]
    shape = jax.ShapeDtypeStruct((1, 20, 20, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), shape)
    rng = np.random.default_rng(4)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
    own = Preprocessing(size=17, crop=(15, 15), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    jaxmodels.save_pretrained(model, variables, tmp_path / name, preprocessing=own)
    assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == name
    again, same = jaxmodels.load_pretrained(tmp_path / name, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(variables, same)
    assert again.dtype == jnp.bfloat16
    assert again.num_classes == model.num_classes
    assert load_preprocessing(tmp_path / name) == own


def test_another_number_of_classes_is_a_new_head(classifier):
    model, variables = jaxmodels.load_pretrained(classifier)
    finer, fresh = jaxmodels.load_pretrained(classifier, num_classes=3, drop_path=0.1, dropout=0.2)
    assert finer == model.clone(num_classes=3, drop_path=0.1, dropout=0.2)
    head = fresh["params"].pop("head")
    assert jax.tree.map(jnp.shape, head) == {"kernel": (12, 3), "bias": (3,)}
    assert not any(leaf.any() for leaf in jax.tree.leaves(head))
    body = {k: v for k, v in variables["params"].items() if k != "head"}
    chex.assert_trees_all_equal(fresh["params"], body)
    features, without = jaxmodels.load_pretrained(classifier, num_classes=0)
    assert features.num_classes == 0
    chex.assert_trees_all_equal(without["params"], body)
    with pytest.raises(ValueError, match=r"cannot override \['width'\]"):
        jaxmodels.load_pretrained(classifier, width=24)


def test_tensors_without_meaning_are_passed_over(classifier, tmp_path):
    """A pooler that a classifier does not use, and the tables that old Swin files have."""
    swin = tmp_path / "swin"
    loaded(randomised(MODELS["swin classifier"]()), swin)
    extra = {
        classifier: "vit.pooler.dense.weight",
        swin: "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index",
    }
    for source, name in extra.items():
        folder = tmp_path / name
        shutil.copytree(source, folder)
        tensors = load_file(source / "model.safetensors")
        save_file(tensors | {name: np.zeros((4, 4), np.float32)}, folder / "model.safetensors")
        chex.assert_trees_all_equal(
            jaxmodels.load_pretrained(folder), jaxmodels.load_pretrained(source)
        )


def test_weights_of_another_architecture_list_every_fault(classifier, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(classifier, other)
    tensors = load_file(other / "model.safetensors")
    del tensors["vit.layernorm.bias"]
    tensors["vit.encoder.layer.2.layernorm_after.bias"] = np.zeros(12, np.float32)
    tensors["classifier.weight"] = np.zeros((9, 12), np.float32)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        jaxmodels.load_pretrained(other)
    assert str(caught.value).splitlines()[1:] == [
        "  missing vit.layernorm.bias (12,)",
        "  extra vit.encoder.layer.2.layernorm_after.bias (12,)",
        "  misshapen classifier.weight: (9, 12), expected (5, 12)",
    ]
    # The weights of one model type under the name of another: all are missing, all are extra.
    loaded(randomised(MODELS["resnet classifier"]()), tmp_path / "resnet")
    config = (classifier / "config.json").read_text()
    (tmp_path / "resnet" / "config.json").write_text(config)
    with pytest.raises(ValueError, match="does not fit") as caught:
        jaxmodels.load_pretrained(tmp_path / "resnet")
    assert "missing vit.embeddings.cls_token (1, 1, 12)" in str(caught.value)
    assert "extra resnet.embedder.embedder.convolution.weight (4, 3, 7, 7)" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "convnext"}, "'convnext'; supported: .* vit, dinov2, swin, swinv2, resnet"),
        ({"hidden_act": "relu"}, "of a vit: hidden_act='relu', only 'gelu' is supported"),
        ({"qkv_bias": False, "hidden_size": ...}, "hidden_size is missing; qkv_bias=False"),
        ({"architectures": ["ViTMAEModel"]}, "architecture ViTMAEModel, only ViTModel or ViTFor"),
    ],
)
def test_configs_of_something_else(classifier, tmp_path, changes, message):
    config = json.loads((classifier / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    shutil.copytree(classifier, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        jaxmodels.load_pretrained(tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit", {"pool": "mean"}, r"'vit' only holds pool='token' \(this model has 'mean'\)"),
        ("vit", {"num_registers": 2, "mixer": "linear"}, "mixer=None .*, num_registers=0"),
        ("vit", {"pooler": True}, "pooler=False"),
        ("dinov2", {"hidden_width": 50}, "'dinov2' has no hidden_width=50 for width=16"),
        ("dinov2", {"num_classes": 3}, "pool='token_and_mean'"),
        ("resnet", {"stem": "cifar"}, "stem='imagenet'"),
        ("resnet", {"output_stride": 8}, "output_stride=32"),
    ],
)
def test_models_that_the_format_cannot_hold(tmp_path, name, changes, message):
    with pytest.raises(ValueError, match=message):
        jaxmodels.save_pretrained(OURS[name].clone(**changes), {"params": {}}, tmp_path / "a")


def test_statistics_are_part_of_a_model(tmp_path):
    model, variables = loaded(randomised(MODELS["resnet"]()), tmp_path / "a")
    with pytest.raises(ValueError, match=r"variables\['batch_stats'\] does not fit") as caught:
        jaxmodels.save_pretrained(model, {"params": variables["params"]}, tmp_path / "b")
    assert "missing stem_conv/norm/mean (4,)" in str(caught.value)
