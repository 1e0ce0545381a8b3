"""jaxmodels: JAX models that are whole, tested against independent implementations, and fast.

The names below are loaded on first use, so that importing a small part, such
as `jaxmodels.cpu`, costs nothing and starts nothing.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "create_mixer": "jaxmodels.registry",
    "create_model": "jaxmodels.registry",
    "list_mixers": "jaxmodels.registry",
    "list_models": "jaxmodels.registry",
    "register_mixer": "jaxmodels.registry",
    "register_model": "jaxmodels.registry",
    "load_pretrained": "jaxmodels.weights",
    "save_pretrained": "jaxmodels.weights",
}
_ROOMS = ("data", "decoding", "layers", "metrics", "models", "ops", "training", "weights")

__all__ = [*_PUBLIC, *_ROOMS]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"jaxmodels.{name}")
    raise AttributeError(f"module 'jaxmodels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
