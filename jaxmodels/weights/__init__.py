"""Other people's checkpoints to our parameter trees, and back.

A family is a module with one mapping table, `ROWS`, used in both directions,
and the translation of config.json into the fields of the model.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jaxmodels.registry import module_fields
from jaxmodels.weights import dit
from jaxmodels.weights.folder import find_folder, open_tensors, read_config, write_folder
from jaxmodels.weights.table import check_shapes, expected_tensors, export_tensors, import_tensors

_FAMILIES = (dit,)


def load_pretrained(
    source: str | Path, *, revision: str | None = None, **overrides: Any
) -> tuple[nn.Module, dict]:
    """Reads a model with its weights from a folder or the Hugging Face hub.

    Args:
      source: a folder with config.json and safetensors files (whole or in
        shards), a pipeline folder whose `transformer` is one, or `owner/name`
        on the hub.
      revision: branch, tag or commit on the hub.
      **overrides: fields of the model that do not change its parameters, such
        as `dtype` or `label_dropout`.

    Returns:
      The module, and its variables with float32 parameters, as `init` would
      return them.

    Raises:
      ValueError: no such folder, an unknown kind of model, weights that do not
        fit (every missing, extra or misshapen tensor is listed), or a pickle.
    """
    folder = find_folder(source, revision)
    config = read_config(folder)
    family = _family_of_config(config, folder)
    fields = family.from_config(config)
    model = family.MODEL(**fields)
    unknown = {*overrides} - {*module_fields(model)}
    if unknown or {*overrides} & {*fields}:
        raise ValueError(
            f"load_pretrained: cannot override {sorted(overrides)}; the weights fix "
            f"{sorted(fields)} and {family.MODEL.__name__} has {module_fields(model)}"
        )
    model = family.MODEL(**fields, **overrides)
    with open_tensors(folder) as tensors:
        expected = expected_tensors(family.ROWS, _parameter_shapes(family, model), model)
        found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
        check_shapes(f"load_pretrained: {folder}", expected, found)
        params = import_tensors(family.ROWS, tensors, model)
    return model, {"params": jax.tree.map(jnp.asarray, params)}


def save_pretrained(model: nn.Module, variables: Mapping, path: str | Path) -> None:
    """Writes a model folder that `load_pretrained` and the family's PyTorch library read.

    Args:
      model: the module.
      variables: what `model.init` returned, or `{"params": state.params}`.
      path: of the folder; a model folder that is already there is replaced,
        and stays whole if anything goes wrong.

    Raises:
      ValueError: the format cannot hold this model, the variables are not its
        own, or path is something other than a model folder.
    """
    family = _family_of_model(model)
    config = family.to_config(model)
    expected = _named_shapes(_parameter_shapes(family, model))
    found = _named_shapes(variables.get("params", {}))
    check_shapes("save_pretrained: variables['params']", expected, found)
    write_folder(Path(path), config, export_tensors(family.ROWS, variables["params"], model))


def _named_shapes(params: Mapping) -> dict[str, tuple]:
    return {name: leaf.shape for name, leaf in flatten_dict(params, sep="/").items()}


def _parameter_shapes(family: ModuleType, model: nn.Module) -> dict:
    return jax.eval_shape(model.init, jax.random.key(0), *family.example_inputs(model))["params"]


def _family_of_config(config: Mapping[str, Any], folder: Path) -> ModuleType:
    for family in _FAMILIES:
        if family.accepts(config):
            return family
    raise ValueError(
        f"load_pretrained: {folder / 'config.json'} is of class {config.get('_class_name')!r}; "
        f"supported: {', '.join(family.CLASS_NAME for family in _FAMILIES)}"
    )


def _family_of_model(model: nn.Module) -> ModuleType:
    for family in _FAMILIES:
        if isinstance(model, family.MODEL):
            return family
    raise ValueError(
        f"save_pretrained: no format for a {type(model).__name__}; "
        f"supported: {', '.join(family.MODEL.__name__ for family in _FAMILIES)}"
    )
