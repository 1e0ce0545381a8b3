"""What config.json of transformers' image models have in common: sizes, fixed options, a head."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any

import flax.linen as nn

REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Config:
    """How the config.json of one model type relates to the fields of a module.

    Attributes:
      model_type: of transformers.
      stem: of the names of its classes, `<stem>Model` and `<stem>ForImageClassification`.
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

    def read(self, config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
        """Fields of the module.

        Args:
          config: content of config.json.
          names: of the tensors, which tell whether there is a head if config does not.

        Raises:
          ValueError: a size is missing, or something is switched on that the module lacks.
        """
        faults = [
            f"{name} is missing"
            for name, (_, default) in self.fields.items()
            if default is REQUIRED and name not in config
        ]
        faults += [
            f"{name}={config[name]!r}, only {value!r} is supported"
            for name, value in self.fixed.items()
            if config.get(name, value) != value
        ]
        classes = self._num_classes(config, names, faults)
        if faults:
            raise ValueError(
                f"load_pretrained: config.json of a {self.model_type}: {'; '.join(faults)}"
            )
        fields = {
            ours: _hashable(config.get(theirs, default))
            for theirs, (ours, default) in self.fields.items()
        }
        return {**fields, "num_classes": classes}

    def _num_classes(self, config: Mapping[str, Any], names: Set[str], faults: list[str]) -> int:
        model, classifier = f"{self.stem}Model", f"{self.stem}ForImageClassification"
        has_head = any(name.startswith("classifier.") for name in names)
        architecture = (config.get("architectures") or [classifier if has_head else model])[0]
        if architecture not in (model, classifier):
            faults.append(f"architecture {architecture}, only {model} or {classifier} is supported")
        if architecture == model:
            return 0
        return len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)

    def write(self, model: nn.Module) -> dict[str, Any]:
        """The config.json of a module, complete with the labels' placeholders."""
        classes = model.num_classes
        labels = {str(i): f"LABEL_{i}" for i in range(classes)}
        head = {
            "id2label": labels,
            "label2id": {label: int(i) for i, label in labels.items()},
        }
        return {
            "model_type": self.model_type,
            "architectures": [f"{self.stem}{'ForImageClassification' if classes else 'Model'}"],
            **{theirs: getattr(model, ours) for theirs, (ours, _) in self.fields.items()},
            **self.fixed,
            **(head if classes else {}),
        }


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def require_fields(name: str, model: nn.Module, **expected: Any) -> None:
    """Raises unless the fields of `model` have the only values that a format can hold.

    Raises:
      ValueError: naming the format and every other field.
    """
    faults = [
        f"{field}={value!r} (this model has {getattr(model, field)!r})"
        for field, value in expected.items()
        if getattr(model, field) != value
    ]
    if faults:
        raise ValueError(
            f"save_pretrained: the format {name!r} only holds {', '.join(faults)}; save the "
            f"parameters with a checkpoint instead"
        )
