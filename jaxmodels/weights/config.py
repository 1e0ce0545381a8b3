"""How a config.json of transformers relates to the fields of a module, both ways."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Config:
    """The config.json of one model type.

    Attributes:
      model_type: of transformers.
      stem: of the names of its classes, such as `<stem>Model` and `<stem>ForCausalLM`.
      fields: name in config.json to our field and its default, or REQUIRED.
      fixed: options that our module has built in, with the value they must have.
    """

    model_type: str
    stem: str
    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, Any]

    def accepts(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json is of this model type."""
        return config.get("model_type") == self.model_type

    def faults(self, config: Mapping[str, Any]) -> list[str]:
        """What is missing from config.json, or switched on that the module lacks."""
        faults = [
            f"{name} is missing"
            for name, (_, default) in self.fields.items()
            if default is REQUIRED and name not in config
        ]
        return faults + [
            f"{name}={config[name]!r}, only {value!r} is supported"
            for name, value in self.fixed.items()
            if config.get(name, value) != value
        ]

    def refuse(self, faults: list[str]) -> None:
        """Raises ValueError with all faults, if there are any."""
        if faults:
            raise ValueError(
                f"load_pretrained: config.json of a {self.model_type}: {'; '.join(faults)}"
            )

    def sizes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our fields that stand in config.json under another name."""
        return {
            ours: _hashable(config.get(theirs, default))
            for theirs, (ours, default) in self.fields.items()
        }

    def entries(self, model: nn.Module) -> dict[str, Any]:
        """What config.json says of a module: its type, sizes and fixed options."""
        named = {theirs: getattr(model, ours) for theirs, (ours, _) in self.fields.items()}
        return {"model_type": self.model_type, **named, **self.fixed}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
