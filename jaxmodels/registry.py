"""Public names for models: register a function, create by name, list by pattern.

A registered function takes overrides of its module's fields and returns the
module, so the name stands for a size and the overrides for a variation.
"""

import dataclasses
import difflib
import fnmatch
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import flax.linen as nn

_MODELS: dict[str, Callable[..., nn.Module]] = {}

# Linen adds these to every module; they say where it hangs, not what it is.
_LINEN_FIELDS = {"parent", "name"}


def register_model(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: makes `function` available to `create_model` under its own name.

    Args:
      function: takes field overrides as keywords and returns a linen module.

    Returns:
      `function`, unchanged.

    Raises:
      ValueError: another function already has that name.
    """
    name = function.__name__
    known = _MODELS.get(name)
    if known is not None and known.__module__ != function.__module__:
        raise ValueError(
            f"register_model: {name!r} of {function.__module__} is already registered by "
            f"{known.__module__}; choose another function name"
        )
    _MODELS[name] = function
    return function


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Builds the model registered under `name`.

    Args:
      name: a name from `list_models()`, for instance `"dit_s_2"`.
      **overrides: fields of the model's module that differ from the published ones.

    Returns:
      A linen module: a value without parameters.

    Raises:
      ValueError: unknown name (the nearest are listed) or unknown field (the valid are listed).
    """
    _import_all_models()
    if name not in _MODELS:
        raise ValueError(f"create_model: unknown model {name!r}; {_suggest(name, list(_MODELS))}")
    fields = model_fields(_MODELS[name]())
    for field in overrides:
        if field not in fields:
            raise ValueError(
                f"create_model: {name!r} has no field {field!r}; {_suggest(field, fields)}. "
                f"Valid fields: {', '.join(fields)}"
            )
    return _MODELS[name](**overrides)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted.

    Args:
      pattern: as in `"dit_*"`.
    """
    _import_all_models()
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_fields(model: nn.Module) -> list[str]:
    """Names of the constructor fields of a linen module, without linen's own."""
    return [f.name for f in dataclasses.fields(model) if f.init and f.name not in _LINEN_FIELDS]


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {sorted(known)}"


def _import_all_models() -> None:
    """Registration happens on import, so listing needs every model file imported once."""
    import jaxmodels.models as models

    for module in pkgutil.walk_packages(models.__path__, f"{models.__name__}."):
        importlib.import_module(module.name)
