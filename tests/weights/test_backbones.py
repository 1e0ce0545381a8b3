"""A trained ResNet inside detectors: its maps there against transformers', and misfits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from weights.torch_models import randomised

import jaxmodels
from jaxmodels.models.detection.centernet import UpConvolutions
from jaxmodels.models.detection.faster_rcnn import StageHead
from jaxmodels.models.detection.feature_pyramid import FeaturePyramid
from jaxmodels.models.vision.residual_variants import DeformableResNet
from jaxmodels.models.vision.resnet import ResNet
from jaxmodels.weights import with_backbone

DEPTHS, WIDTHS = (1, 1, 3, 2), (8, 12, 16, 20)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What `load_pretrained` returns of a folder by transformers, and its maps C2 to C5."""
    config = transformers.ResNetConfig(
        depths=[*DEPTHS], hidden_sizes=[*WIDTHS], embedding_size=8, layer_type="bottleneck"
    )
    theirs = randomised(transformers.ResNetModel(config))
    folder = tmp_path_factory.mktemp("resnet")
    theirs.save_pretrained(folder)
    with torch.no_grad():
        found = theirs(torch.tensor(IMAGES.transpose(0, 3, 1, 2)), output_hidden_states=True)
    maps = [each.numpy().transpose(0, 2, 3, 1) for each in found.hidden_states[1:]]
    model, variables = jaxmodels.load_pretrained(folder, num_classes=0)
    return model, variables, maps


def stages(count=4, kind=ResNet, **fields):
    options = {"stem_width": 8, "num_classes": 0, "norm": "frozen", **fields}
    return kind(DEPTHS[:count], WIDTHS[:count], **options)


def filled(model, trained):
    """Random variables, and those with the trained ResNet."""
    shape = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    before = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.5), jax.eval_shape(model.init, jax.random.key(0), shape)
    )
    return before, with_backbone(model, before, *trained[:2])


def maps_of(model, variables, find):
    return jax.jit(lambda v, x: model.apply(v, x, method=find))(variables, IMAGES)


BACKBONES = {
    "fcos_resnet50_fpn": FeaturePyramid(stages(), levels=("C3", "C4", "C5"), width=4, extra="conv"),
    "centernet_resnet18": UpConvolutions(stages(norm="batch"), widths=(4,)),
    "r_fcn_resnet101_deformable": stages(kind=DeformableResNet),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_are_those_of_the_trained_network(name, trained):
    model = jaxmodels.create_model(name, backbone=BACKBONES[name], num_classes=2)
    before, after = filled(model, trained)

    def find(model, x):
        inner = model.backbone
        while not isinstance(inner, ResNet):
            inner = inner.backbone
        return inner.features(x)

    kept = {
        key: leaf
        for key, leaf in flatten_dict(after["params"]).items()
        if not any("stages" in part or part == "stem_conv" for part in key)
    }
    assert kept and all((leaf == 0.5).all() for leaf in kept.values())
    # Untrained offsets are zero, for which a deformable convolution is a plain one.
    after = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if "offsets" in str(path) else leaf, after
    )
    for ours, theirs in zip(maps_of(model, after, find).values(), trained[2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert jax.tree.map(jnp.shape, before) == jax.tree.map(jnp.shape, after)


def test_the_last_stage_is_the_head(trained):
    head = StageHead(WIDTHS[3], depth=DEPTHS[3], stride=2)
    fields = {"backbone": stages(3), "head": head, "num_classes": 2, "proposal_width": 4}
    model = jaxmodels.create_model("faster_rcnn_resnet50_c4", **fields)
    _, after = filled(model, trained)
    found = maps_of(model, after, lambda model, x: model.head(model.backbone.features(x)["C4"]))
    np.testing.assert_allclose(found, trained[2][3].mean(axis=(1, 2)), rtol=1e-4, atol=1e-4)


def test_trident_blocks_are_those_after_the_backbones(trained):
    backbone = stages(3).clone(depths=(1, 1, 1))
    fields = {"depth": 2, "head": StageHead(WIDTHS[3], depth=DEPTHS[3], stride=2)}
    small = {"num_classes": 2, "proposal_width": 4, **fields}
    model = jaxmodels.create_model("tridentnet_resnet101", backbone=backbone, **small)
    _, after = filled(model, trained)

    def find(model, x):
        c4 = model.trident(model.backbone.features(x)["C4"], (1,), train=False)
        return c4, model.head(c4)

    c4, last = maps_of(model, after, find)
    np.testing.assert_allclose(c4, trained[2][2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(last, trained[2][3].mean(axis=(1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            stages().clone(depths=(1, 1, 2, 2)),
            "extra params/backbone/stages_2_2/conv_1/conv/kernel",
        ),
        (stages().clone(depths=(1, 1, 4, 2)), "missing batch_stats/backbone/stages_2_3/conv_1/nor"),
        (stages(stem_width=9), "misshapen params/backbone/stem_conv/conv/kernel: (7, 7, 3, 8), ex"),
        (stages(stride_on="1x1"), "backbone has stride_on='3x3', the model's ResNet '1x1'"),
    ],
)
def test_another_resnet_is_refused(backbone, message, trained):
    model = jaxmodels.create_model("r_fcn_resnet101", backbone=backbone, num_classes=2)
    with pytest.raises(ValueError, match="with_backbone: ") as caught:
        filled(model, trained)
    assert message in str(caught.value)


def test_other_networks_are_refused(trained):
    model, variables, _ = trained
    with pytest.raises(ValueError, match="a CornerNet on a Hourglass has no ResNet to fill"):
        with_backbone(jaxmodels.create_model("cornernet_hourglass104"), {}, model, variables)
    detector = jaxmodels.create_model("fcos_resnet50_fpn")
    with pytest.raises(ValueError, match="backbone is a CornerNet, but the model has a ResNet"):
        with_backbone(detector, {}, jaxmodels.create_model("cornernet_hourglass104"), {})
