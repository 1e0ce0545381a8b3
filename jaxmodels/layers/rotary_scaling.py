"""Ways to stretch rotary positions, as values: `Rotary(scaling=NtkAware(factor=8.0))`."""

import dataclasses

from jaxtyping import Array, Float, Int

from jaxmodels.ops import rotary_scaling as rs


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Position interpolation; see `ops.rotary_scaling.interpolated_frequencies`.

    Attributes:
      factor: wanted length over trained length.
    """

    factor: float
    attention_factor = 1.0

    def frequencies(self, width: int, base: float, lengths: Int[Array, "B T"]) -> Float[Array, "N"]:
        """Frequencies of all tokens; `lengths` does not matter here."""
        return rs.interpolated_frequencies(width, base, factor=self.factor)


@dataclasses.dataclass(frozen=True)
class NtkAware:
    """NTK-aware scaling; see `ops.rotary_scaling.ntk_frequencies`.

    Attributes:
      factor: wanted length over trained length.
    """

    factor: float
    attention_factor = 1.0

    def frequencies(self, width: int, base: float, lengths: Int[Array, "B T"]) -> Float[Array, "N"]:
        """Frequencies of all tokens; `lengths` does not matter here."""
        return rs.ntk_frequencies(width, base, factor=self.factor)


@dataclasses.dataclass(frozen=True)
class DynamicNtk:
    """NTK-aware scaling by the length so far; see `ops.rotary_scaling.dynamic_ntk_frequencies`.

    The length is the last position of a call's queries in a document, plus one:
    that of the whole document when it is read at once, that of the prefix when
    it is decoded. So the same document read in pieces gives other outputs
    beyond train_length, as it does wherever this method is used.

    Attributes:
      train_length: up to which nothing changes.
      factor: how fast the scale grows with the length.
    """

    train_length: int
    factor: float = 1.0
    attention_factor = 1.0

    def frequencies(
        self, width: int, base: float, lengths: Int[Array, "B T"]
    ) -> Float[Array, "B T N"]:
        """Frequencies of tokens in documents of these lengths."""
        return rs.dynamic_ntk_frequencies(
            lengths, width, base, train_length=self.train_length, factor=self.factor
        )


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN; see `ops.rotary_scaling.yarn_frequencies` and `yarn_attention_factor`.

    Attributes:
      factor: wanted length over trained length.
      train_length: that the model was trained with.
      beta_fast, beta_slow: turns in train_length that bound the ramp.
    """

    factor: float
    train_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def attention_factor(self) -> float:
        """What turned channels of queries and keys are multiplied by."""
        return rs.yarn_attention_factor(self.factor)

    def frequencies(self, width: int, base: float, lengths: Int[Array, "B T"]) -> Float[Array, "N"]:
        """Frequencies of all tokens; `lengths` does not matter here."""
        return rs.yarn_frequencies(width, base, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling; see `ops.rotary_scaling.llama3_frequencies`.

    Attributes:
      factor: by which the slow pairs are slowed.
      train_length: that the model was trained with.
      low_turns, high_turns: turns in train_length between which the rule changes.
    """

    factor: float
    train_length: int
    low_turns: float = 1.0
    high_turns: float = 4.0
    attention_factor = 1.0

    def frequencies(self, width: int, base: float, lengths: Int[Array, "B T"]) -> Float[Array, "N"]:
        """Frequencies of all tokens; `lengths` does not matter here."""
        return rs.llama3_frequencies(width, base, **dataclasses.asdict(self))


Scaling = Interpolation | NtkAware | DynamicNtk | Yarn | Llama3
