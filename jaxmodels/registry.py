"""Public names: register a function, create by name, list by pattern.

A registered function takes overrides of its module's fields and returns the
module, so the name stands for a size and the overrides for a variation. Models
and sequence mixers each have a list of names.
"""

import dataclasses
import difflib
import fnmatch
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import flax.linen as nn

# Linen adds these to every module; they say where it hangs, not what it is.
_LINEN_FIELDS = {"parent", "name"}


class _Names:
    """The public names of one kind of module, found by importing a package whole."""

    def __init__(self, kind: str, package: str):
        self._kind, self._package = kind, package
        self._functions: dict[str, Callable[..., nn.Module]] = {}

    def register(self, function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        name = function.__name__
        known = self._functions.get(name)
        if known is not None and known.__module__ != function.__module__:
            raise ValueError(
                f"register_{self._kind}: {name!r} of {function.__module__} is already registered "
                f"by {known.__module__}; choose another function name"
            )
        self._functions[name] = function
        return function

    def create(self, name: str, overrides: dict[str, Any]) -> nn.Module:
        self._import_all()
        if name not in self._functions:
            raise ValueError(
                f"create_{self._kind}: unknown {self._kind} {name!r}; "
                f"{_suggest(name, list(self._functions))}"
            )
        fields = module_fields(self._functions[name]())
        for field in overrides:
            if field not in fields:
                raise ValueError(
                    f"create_{self._kind}: {name!r} has no field {field!r}; "
                    f"{_suggest(field, fields)}. Valid fields: {', '.join(fields)}"
                )
        return self._functions[name](**overrides)

    def list(self, pattern: str) -> list[str]:
        self._import_all()
        return sorted(fnmatch.filter(self._functions, pattern))

    def _import_all(self) -> None:
        """Registration happens on import, so listing needs every file imported once."""
        package = importlib.import_module(self._package)
        for module in pkgutil.walk_packages(package.__path__, f"{self._package}."):
            importlib.import_module(module.name)


_MODELS = _Names("model", "jaxmodels.models")
_MIXERS = _Names("mixer", "jaxmodels.layers.mixers")


def register_model(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: makes `function` available to `create_model` under its own name.

    Args:
      function: takes field overrides as keywords and returns a linen module.

    Returns:
      `function`, unchanged.

    Raises:
      ValueError: another function already has that name.
    """
    return _MODELS.register(function)


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
    return _MODELS.create(name, overrides)


def list_models(pattern: str = "*") -> list[str]:
    """Names of the registered models that match a shell pattern, sorted.

    Args:
      pattern: as in `"dit_*"`.
    """
    return _MODELS.list(pattern)


def register_mixer(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator: makes `function` available to `create_mixer` under its own name.

    Args:
      function: takes field overrides as keywords and returns a sequence mixer,
        a linen module with the signature that `jaxmodels.layers.mixers` states.

    Returns:
      `function`, unchanged.

    Raises:
      ValueError: another function already has that name.
    """
    return _MIXERS.register(function)


def create_mixer(name: str, **overrides: Any) -> nn.Module:
    """Builds the sequence mixer registered under `name`.

    Args:
      name: a name from `list_mixers()`, for instance `"gated_delta"`.
      **overrides: fields of the mixer's module that differ from the defaults.

    Returns:
      A linen module: a value without parameters.

    Raises:
      ValueError: unknown name (the nearest are listed) or unknown field (the valid are listed).
    """
    return _MIXERS.create(name, overrides)


def list_mixers(pattern: str = "*") -> list[str]:
    """Names of the registered sequence mixers that match a shell pattern, sorted.

    Args:
      pattern: as in `"flash*"`.
    """
    return _MIXERS.list(pattern)


def module_fields(module: nn.Module) -> list[str]:
    """Names of the constructor fields of a linen module, without linen's own."""
    return [f.name for f in dataclasses.fields(module) if f.init and f.name not in _LINEN_FIELDS]


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {sorted(known)}"
