"""What a family of checkpoints is: how others name, configure and lay out one of our models."""

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.weights.table import Row

TRANSFORMERS_WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Family:
    """One format of folder and the module that it becomes.

    Attributes:
      name: what config.json calls it.
      model: class of the module.
      accepts: whether a config.json is of this family.
      from_config: fields of the module, from config.json and the names of the tensors.
      to_config: the config.json of a module; ValueError if the format cannot hold it.
      tables: rows of a module's parameters, by collection of its variables.
      example_inputs: shapes of the arguments of a call.
      weights_file: name of the safetensors file.
      holds: whether a module of the class is of this family and not of another.
      free: fields of from_config that do not change the parameters.
      head: name of the classifier among the parameters, which num_classes replaces.
      ignored: regular expression of tensors that mean nothing here.
      rename: from a name in older files to the one in the table.
      constants: such tensors, which readers of the format expect all the same.
    """

    name: str
    model: type[nn.Module]
    accepts: Callable[[Mapping[str, Any]], bool]
    from_config: Callable[[Mapping[str, Any], Set[str]], dict[str, Any]]
    to_config: Callable[[Any], dict[str, Any]]
    tables: Callable[[Any], dict[str, list[Row]]]
    example_inputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]
    weights_file: str = TRANSFORMERS_WEIGHTS
    holds: Callable[[Any], bool] = lambda model: True
    free: frozenset[str] = frozenset()
    head: str | None = None
    ignored: str | None = None
    rename: Callable[[str], str] = lambda name: name
    constants: Callable[[Any], dict[str, np.ndarray]] = lambda model: {}


def image_input(side: int, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shape of one square image, all that a vision model takes."""
    return (jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32),)


def token_input() -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shape of a short text, all that a language model takes."""
    return (jax.ShapeDtypeStruct((1, 2), jnp.int32),)
