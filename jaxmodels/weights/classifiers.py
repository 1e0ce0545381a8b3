"""What config.json of transformers' image models have in common: a head beside the sizes."""

from collections.abc import Mapping, Set
from typing import Any

import flax.linen as nn

from jaxmodels.weights import config as base
from jaxmodels.weights.config import REQUIRED as REQUIRED


class Config(base.Config):
    """The config.json of an image model, with or without a classifier."""

    def read(self, config: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
        """Fields of the module.

        Args:
          config: content of config.json.
          names: of the tensors, which tell whether there is a head if config does not.

        Raises:
          ValueError: a size is missing, or something is switched on that the module lacks.
        """
        faults = self.faults(config)
        classes = self._num_classes(config, names, faults)
        self.refuse(faults)
        return {**self.sizes(config), "num_classes": classes}

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
            **self.entries(model),
            "architectures": [f"{self.stem}{'ForImageClassification' if classes else 'Model'}"],
            **(head if classes else {}),
        }


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
