"""Rotary positions in a config.json of transformers, both ways.

Files of version 5 have `rope_parameters`; older ones `rope_theta` and, where
positions are stretched, `rope_scaling`.
"""

from collections.abc import Mapping
from typing import Any

from jaxmodels.layers.rotary_scaling import DynamicNtk, Interpolation, Llama3, Scaling, Yarn

_TRAIN_LENGTH = "original_max_position_embeddings"
# Names of our fields, by kind: theirs.
_YARN = {"factor": "factor", "train_length": _TRAIN_LENGTH}
_YARN |= {"beta_fast": "beta_fast", "beta_slow": "beta_slow"}
_LLAMA3 = {"factor": "factor", "train_length": _TRAIN_LENGTH}
_LLAMA3 |= {"low_turns": "low_freq_factor", "high_turns": "high_freq_factor"}
_KINDS: dict[str, tuple[type, dict[str, str]]] = {
    "linear": (Interpolation, {"factor": "factor"}),
    "dynamic": (DynamicNtk, {"factor": "factor", "train_length": _TRAIN_LENGTH}),
    "yarn": (Yarn, _YARN),
    "llama3": (Llama3, _LLAMA3),
}


def rope_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary positions, in the form of version 5."""
    older = {"rope_theta": config.get("rope_theta"), **(config.get("rope_scaling") or {})}
    entries = dict(config.get("rope_parameters") or older)
    entries["rope_type"] = entries.pop("type", entries.get("rope_type", "default"))
    return entries


def read_rotary(config: Mapping[str, Any], base: float) -> tuple[float, Scaling | None]:
    """Base and scaling of a config.json.

    Args:
      config: its content.
      base: where it names none.

    Raises:
      ValueError: a kind of scaling that we do not have.
    """
    entries = rope_entries(config)
    base = entries.get("rope_theta") or base
    kind = entries["rope_type"]
    if kind == "default":
        return float(base), None
    if kind not in _KINDS:
        raise ValueError(
            f"load_pretrained: config.json has rotary positions of type {kind!r}; supported: "
            f"default, {', '.join(_KINDS)}"
        )
    scaling, names = _KINDS[kind]
    if kind == "dynamic" or _TRAIN_LENGTH not in entries:
        entries[_TRAIN_LENGTH] = config.get("max_position_embeddings")
    return float(base), scaling(**{o: entries[t] for o, t in names.items() if t in entries})


def write_rotary(base: float, scaling: Scaling | None, context: int | None) -> dict[str, Any]:
    """The entry `rope_parameters` of a config.json.

    Args:
      base, scaling: of the rotary positions.
      context: of the model, which for theirs is where dynamic scaling begins.

    Raises:
      ValueError: the format has no such scaling.
    """
    if isinstance(scaling, DynamicNtk) and scaling.train_length != context:
        raise ValueError(
            f"save_pretrained: the format begins dynamic scaling at the model's context={context}, "
            f"and train_length={scaling.train_length}; make them equal"
        )
    entries = {"rope_theta": base, "rope_type": "default"}
    if scaling is None:
        return entries
    for kind, (known, names) in _KINDS.items():
        if type(scaling) is known:
            return {
                **entries,
                "rope_type": kind,
                **{theirs: getattr(scaling, ours) for ours, theirs in names.items()},
            }
    raise ValueError(
        f"save_pretrained: the format has no {type(scaling).__name__}; save the parameters with "
        "a checkpoint instead"
    )
