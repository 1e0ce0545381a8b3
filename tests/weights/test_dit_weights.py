"""DiT against `diffusers`: outputs, gradients, folders both ways."""

import json
import shutil

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DiTTransformer2DModel
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels.models.generative.dit import DiT
from jaxmodels.weights import dit as family
from jaxmodels.weights.table import import_tensors

CONFIG = {
    "sample_size": 6,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 5,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 5,
    "num_embeds_ada_norm": 11,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def torch_dit(seed: int = 0, **changes) -> DiTTransformer2DModel:
    """A random DiT whose blocks share their embeddings and in which nothing is zero."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**(CONFIG | changes)).eval()
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


def write_torch(model: DiTTransformer2DModel, folder) -> None:
    """Writes a folder with a copy of the shared embeddings in every block, as published ones."""
    folder.mkdir(exist_ok=True)
    config = {k: v for k, v in model.config.items() if not k.startswith("_")}
    config["_class_name"] = "DiTTransformer2DModel"
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v.numpy().copy() for k, v in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)


def inputs(batch: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(batch, 6, 6, 3)).astype(np.float32)
    t = rng.uniform(0, 1000, batch).astype(np.float32)
    return x, t, rng.integers(0, 12, batch).astype(np.int32)


def run_torch(model, x, t, labels) -> torch.Tensor:
    out = model(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor(labels)).sample
    return out.permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder written by torch, with the model itself."""
    path = tmp_path_factory.mktemp("theirs") / "model"
    model = torch_dit()
    write_torch(model, path)
    return path, model


def test_outputs_equal_diffusers(folder):
    path, theirs = folder
    model, variables = jaxmodels.load_pretrained(path)
    with torch.no_grad():
        expected = run_torch(theirs, *inputs()).numpy()
    actual = jax.jit(model.apply)(variables, *inputs())
    assert np.abs(expected).mean() > 0.3
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_gradients_equal_diffusers(folder):
    path, theirs = folder
    model, variables = jaxmodels.load_pretrained(path)
    x, t, labels = inputs()
    weights = np.random.default_rng(2).normal(size=(2, 6, 6, 5)).astype(np.float32)

    theirs.zero_grad()
    (run_torch(theirs, x, t, labels) * torch.tensor(weights)).sum().backward()
    named = theirs.named_parameters(remove_duplicate=False)
    expected = import_tensors(family.ROWS, {n: p.grad.numpy() for n, p in named}, model)

    def loss(v):
        out = model.apply(v, jnp.asarray(x), jnp.asarray(t), jnp.asarray(labels))
        return (out * weights).sum()

    actual = jax.jit(jax.grad(loss))(variables)["params"]

    def compare(path, ours, reference):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        scale = np.abs(reference).max()
        # Softmax does not see the bias of the keys; all others must be compared with something.
        assert (scale > 0.1) == (name != "blocks/attention/k/bias"), name
        np.testing.assert_allclose(ours, reference, atol=1e-4 * max(scale, 1), err_msg=name)

    jax.tree_util.tree_map_with_path(compare, actual, expected)


@pytest.mark.parametrize("changes", [{"out_channels": None, "patch_size": 3}, {"num_layers": 1}])
def test_folder_written_here_loads_in_diffusers(tmp_path, changes):
    theirs = torch_dit(seed=3, **changes)
    write_torch(theirs, tmp_path / "theirs")
    model, variables = jaxmodels.load_pretrained(tmp_path / "theirs")
    jaxmodels.save_pretrained(model, variables, tmp_path / "ours")

    again = DiTTransformer2DModel.from_pretrained(tmp_path / "ours").eval()
    assert again.config.out_channels == theirs.config.out_channels
    with torch.no_grad():
        expected, actual = run_torch(theirs, *inputs()), run_torch(again, *inputs())
    # Close, as torch rounds by where in memory a tensor lies.
    torch.testing.assert_close(actual, expected)
    kept = again.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in theirs.state_dict().items())
    before = load_file(tmp_path / "theirs" / WEIGHTS)
    after = load_file(tmp_path / "ours" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_round_trip_is_bit_exact(tmp_path):
    model = DiT(width=12, depth=2, num_heads=3, input_size=5, patch_size=5, in_channels=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(model))
    rng = np.random.default_rng(4)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
    jaxmodels.save_pretrained(model, variables, tmp_path / "model")
    loaded, again = jaxmodels.load_pretrained(
        tmp_path / "model", dtype=jnp.bfloat16, label_dropout=0.3
    )
    assert loaded == model.clone(dtype=jnp.bfloat16, label_dropout=0.3)
    chex.assert_trees_all_equal(variables, again)


def test_half_precision_files_become_float32(folder, tmp_path):
    path, theirs = folder
    shutil.copytree(path, tmp_path / "half")
    tensors = {k: v.bfloat16().clone() for k, v in theirs.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "half" / WEIGHTS)
    _, variables = jaxmodels.load_pretrained(tmp_path / "half")
    kernel = variables["params"]["final"]["project"]["kernel"]
    assert kernel.dtype == jnp.float32
    expected = theirs.proj_out_2.weight.detach().bfloat16().float().numpy().T
    np.testing.assert_array_equal(kernel, expected)


def test_pipeline_of_the_older_class_in_shards(folder, tmp_path):
    """The layout of the public weights: a pipeline, an older class name, switched-off fields."""
    path, _ = folder
    inner = tmp_path / "transformer"
    inner.mkdir()
    config = json.loads((path / "config.json").read_text())
    for field in ("norm_eps", "upcast_attention"):
        del config[field]
    config |= {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    config |= {"use_linear_projection": False, "norm_type": "ada_norm_zero"}
    (inner / "config.json").write_text(json.dumps(config))
    tensors = list(load_file(path / WEIGHTS).items())
    shards = {"one.safetensors": dict(tensors[:40]), "two.safetensors": dict(tensors[40:])}
    for name, part in shards.items():
        save_file(part, inner / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    index = inner / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    chex.assert_trees_all_equal(
        jaxmodels.load_pretrained(tmp_path)[1], jaxmodels.load_pretrained(path)[1]
    )
    (inner / "two.safetensors").unlink()
    with pytest.raises(ValueError, match=r"files that are not there: \['two.safetensors'\]"):
        jaxmodels.load_pretrained(tmp_path)


def test_copies_that_differ_are_named(folder, tmp_path):
    path, _ = folder
    shutil.copytree(path, tmp_path / "untied")
    tensors = load_file(path / WEIGHTS)
    odd = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    other = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2.bias"
    tensors[odd][7, 3] += 1
    tensors[other][0] += 1
    save_file(tensors, tmp_path / "untied" / WEIGHTS)
    with pytest.raises(ValueError, match="differ from those of block 0") as caught:
        jaxmodels.load_pretrained(tmp_path / "untied")
    named = str(caught.value).split(": ")[-1].split(", ")
    assert sorted(named) == sorted([odd, other])


def test_all_faulty_tensors_are_listed(folder, tmp_path):
    path, _ = folder
    shutil.copytree(path, tmp_path / "faulty")
    tensors = load_file(path / WEIGHTS)
    del tensors["transformer_blocks.1.attn1.to_q.bias"], tensors["proj_out_2.bias"]
    tensors["ema.decay"] = np.zeros(3, np.float32)
    tensors["pos_embed.proj.weight"] = np.zeros((20, 3, 2, 7), np.float32)
    save_file(tensors, tmp_path / "faulty" / WEIGHTS)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        jaxmodels.load_pretrained(tmp_path / "faulty")
    for fault in (
        "missing transformer_blocks.1.attn1.to_q.bias (20,)",
        "missing proj_out_2.bias (20,)",
        "extra ema.decay (3,)",
        "misshapen pos_embed.proj.weight: (20, 3, 2, 7), expected (20, 3, 2, 2)",
    ):
        assert fault in str(caught.value)
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "UNet2DModel.*supported: DiTTransformer2DModel"),
        ({"_class_name": None}, "class None; supported"),
        ({"activation_fn": "geglu", "norm_eps": 1e-6}, "'geglu', but a DiT.*norm_eps=1e-06, but"),
        ({"cross_attention_dim": 7}, "cross_attention_dim=7 is unknown"),
        ({"num_layers": ...}, "num_layers is missing"),
    ],
)
def test_config_of_something_else(folder, tmp_path, changes, message):
    path, _ = folder
    config = json.loads((path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    shutil.copytree(path, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        jaxmodels.load_pretrained(tmp_path / "other")


def test_overrides_cannot_change_what_the_weights_fix(folder):
    for overrides in ({"depth": 5}, {"colour": "red"}):
        with pytest.raises(ValueError, match=f"cannot override \\['{next(iter(overrides))}'\\]"):
            jaxmodels.load_pretrained(folder[0], **overrides)


def test_saving_what_does_not_fit(folder, tmp_path):
    model, variables = jaxmodels.load_pretrained(folder[0])
    with pytest.raises(ValueError, match="always has mlp_ratio=4, this model 3"):
        jaxmodels.save_pretrained(model.clone(mlp_ratio=3.0), variables, tmp_path / "a")
    with pytest.raises(ValueError, match=r"only holds mixer=None \(this model has 'linear'\)"):
        jaxmodels.save_pretrained(model.clone(mixer="linear"), variables, tmp_path / "a")
    with pytest.raises(ValueError, match=r"missing final/project/bias \(20,\)"):
        jaxmodels.save_pretrained(model, variables["params"], tmp_path / "a")
    with pytest.raises(ValueError, match=r"misshapen blocks/mlp/up/bias: \(3, 80\), expected \(2"):
        jaxmodels.save_pretrained(model.clone(depth=2), variables, tmp_path / "a")
    with pytest.raises(ValueError, match="no format for a Dense; supported: DiT"):
        jaxmodels.save_pretrained(nn.Dense(3), variables, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
