"""Other people's checkpoints to our parameter trees, and back.

A family is a module with one mapping table, used in both directions, and the
translation of config.json into the fields of the model; see `family.Family`. What
comes as a single file without a config.json has functions of its own.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jaxmodels.registry import module_fields
from jaxmodels.weights import deepseek_v3, dit, gpt2, llama, mixtral, resnet, swin, vit
from jaxmodels.weights.backbones import with_backbone as with_backbone
from jaxmodels.weights.family import Family
from jaxmodels.weights.float8 import with_scales
from jaxmodels.weights.folder import find_folder, open_tensors, read_config, write_folder
from jaxmodels.weights.preprocess import Preprocessing, preprocessing_config
from jaxmodels.weights.preprocess import load_preprocessing as load_preprocessing
from jaxmodels.weights.table import check_shapes, expected_tensors, export_tensors, import_tensors
from jaxmodels.weights.torchvision_detection import (
    load_torchvision_detector as load_torchvision_detector,
)
from jaxmodels.weights.torchvision_detection import (
    save_torchvision_detector as save_torchvision_detector,
)
from jaxmodels.weights.torchvision_detection import torchvision_images as torchvision_images

_FAMILIES = (dit.FAMILY, vit.VIT, vit.DINOV2, swin.SWIN, swin.SWIN_V2, resnet.RESNET)
_FAMILIES += (gpt2.GPT2_FAMILY, llama.LLAMA, llama.QWEN3)
_FAMILIES += (mixtral.MIXTRAL, deepseek_v3.DEEPSEEK_V3)


def load_pretrained(
    source: str | Path, *, revision: str | None = None, **overrides: Any
) -> tuple[nn.Module, dict]:
    """Reads a model with its weights from a folder or the Hugging Face hub.

    Args:
      source: a folder with config.json and safetensors files (whole or in
        shards; in eight bits with scales of blocks too), a pipeline folder whose
        `transformer` is one, or `owner/name` on the hub.
      revision: branch, tag or commit on the hub.
      **overrides: fields of the model that do not change its parameters, such
        as `dtype` or `dropout`; and `num_classes` of an image classifier, which
        throws its head away: 0 for features, other numbers for a new head of
        zeros to fine-tune.

    Returns:
      The module, and its variables with float32 parameters, as `init` would
      return them.

    Raises:
      ValueError: no such folder, an unknown kind of model, weights that do not
        fit (every missing, extra or misshapen tensor is listed) or are quantised in
        a way that is not read, or a pickle.
    """
    folder = find_folder(source, revision)
    config = read_config(folder)
    family = _family_of_config(config, folder)
    with open_tensors(folder) as tensors:
        tensors = {
            family.rename(name): tensor
            for name, tensor in with_scales(tensors, config).items()
            if not re.fullmatch(family.ignored or "", name)
        }
        fields = family.from_config(config, tensors.keys())
        _check_overrides(family, fields, overrides)
        model = family.model(**fields)
        tables, shapes = family.tables(model), _shapes(family, model)
        expected = {}
        for collection, rows in tables.items():
            expected |= expected_tensors(rows, shapes[collection], model)
        found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
        check_shapes(f"load_pretrained: {folder}", expected, found)
        variables = {
            collection: jax.tree.map(jnp.asarray, import_tensors(rows, tensors, model))
            for collection, rows in tables.items()
        }
    model = family.model(**{**fields, **overrides})
    return model, _with_new_head(family, model, variables, fields)


def _check_overrides(family: Family, fields: Mapping, overrides: Mapping) -> None:
    known = module_fields(family.model(**fields))
    fixed = {*fields} - family.free - ({"num_classes"} if family.head else set())
    if {*overrides} - {*known} or {*overrides} & fixed:
        raise ValueError(
            f"load_pretrained: cannot override {sorted(overrides)}; the weights fix "
            f"{sorted(fixed)} and {family.model.__name__} has {known}"
        )


def _with_new_head(family: Family, model: nn.Module, variables: dict, fields: Mapping) -> dict:
    """The variables with a head for the model's num_classes, if that is not the file's."""
    if family.head is None or model.num_classes == fields["num_classes"]:
        return variables
    params = {name: value for name, value in variables["params"].items() if name != family.head}
    if model.num_classes:
        shapes = _shapes(family, model)["params"][family.head]
        params[family.head] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    return {**variables, "params": params}


def save_pretrained(
    model: nn.Module,
    variables: Mapping,
    path: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Writes a model folder that `load_pretrained` and the family's PyTorch library read.

    Args:
      model: the module.
      variables: what `model.init` returned, or `{"params": state.params}`, with
        "batch_stats" if the model has them.
      path: of the folder; a model folder that is already there is replaced,
        and stays whole if anything goes wrong.
      preprocessing: written beside the weights, for `load_preprocessing`.

    Raises:
      ValueError: the format cannot hold this model, the variables are not its
        own, or path is something other than a model folder.
    """
    family = family_of(model)
    config = family.to_config(model)
    shapes = _shapes(family, model)
    tensors: dict[str, np.ndarray] = family.constants(model)
    for collection, rows in family.tables(model).items():
        expected = _named_shapes(shapes[collection])
        found = _named_shapes(variables.get(collection, {}))
        check_shapes(f"save_pretrained: variables[{collection!r}]", expected, found)
        tensors |= export_tensors(rows, variables[collection], model)
    write_folder(
        Path(path),
        config,
        tensors,
        weights_file=family.weights_file,
        preprocessing=None if preprocessing is None else preprocessing_config(preprocessing),
    )


def _named_shapes(params: Mapping) -> dict[str, tuple]:
    return {name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}


def _shapes(family: Family, model: nn.Module) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(model))


def _family_of_config(config: Mapping[str, Any], folder: Path) -> Family:
    for family in _FAMILIES:
        if family.accepts(config):
            return family
    kind = config.get("_class_name", config.get("model_type"))
    raise ValueError(
        f"load_pretrained: {folder / 'config.json'} is of class {kind!r}; "
        f"supported: {', '.join(family.name for family in _FAMILIES)}"
    )


def family_of(model: nn.Module) -> Family:
    """The format of a module; ValueError if none holds it."""
    for family in _FAMILIES:
        if isinstance(model, family.model) and family.holds(model):
            return family
    names = dict.fromkeys(family.model.__name__ for family in _FAMILIES)
    raise ValueError(
        f"save_pretrained: no format for a {type(model).__name__}; supported: {', '.join(names)}"
    )
