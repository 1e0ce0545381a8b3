"""Which timesteps a rectified flow trains on: densities on [0, 1] and their quantiles.

Every density is a small frozen value with two methods, `quantile(u)`, which
turns a uniform number into a timestep, and `density(t)`, which integrates to one.

Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis", section 3.1 (arXiv:2403.03206).
"""

import dataclasses
import difflib
import math
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logit, ndtri
from jaxtyping import Array, Float, Key

MODE_SCALE_MAX = 2 / (math.pi - 2)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every timestep alike: pi(t) = 1."""

    def quantile(self, u: Float[Array, "*T"]) -> Float[Array, "*T"]:
        """The timestep below which a share `u` of all timesteps lies."""
        return u

    def density(self, t: Float[Array, "*T"]) -> Float[Array, "*T"]:
        """The density at `t`; 0 outside of [0, 1]."""
        return _within(t, jnp.ones_like(t))


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """Prefers the middle: logit(t) is normal, so both ends have density zero.

    pi(t) = exp(-(logit(t) - mean)^2 / (2 std^2)) / (std sqrt(2 pi) t (1 - t))

    Args:
      mean: of logit(t); below 0 prefers data, above 0 prefers noise.
      std: of logit(t), positive.

    Raises:
      ValueError: mean is not finite, or std is not positive and finite.

    Source: equation 19.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not math.isfinite(self.mean):
            raise ValueError(f"LogitNormal: mean={self.mean} must be finite")
        if not 0 < self.std < math.inf:
            raise ValueError(f"LogitNormal: std={self.std} must be positive and finite")

    def quantile(self, u: Float[Array, "*T"]) -> Float[Array, "*T"]:
        """The timestep below which a share `u` of all timesteps lies."""
        return jax.nn.sigmoid(self.mean + self.std * ndtri(u))

    def density(self, t: Float[Array, "*T"]) -> Float[Array, "*T"]:
        """The density at `t`; 0 at both ends, where the formula is 0 / 0."""
        inside = (t > 0) & (t < 1)
        # The unused branch must stay finite too, or its gradient would be NaN.
        t = jnp.where(inside, t, 0.5)
        z = (logit(t) - self.mean) / self.std
        log_density = -0.5 * z**2 - jnp.log(t) - jnp.log1p(-t)
        return jnp.where(inside, jnp.exp(log_density) / (self.std * math.sqrt(2 * math.pi)), 0.0)


@dataclasses.dataclass(frozen=True)
class Mode:
    """Prefers the middle (scale > 0) or the ends (scale < 0), yet never excludes any.

    f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u),   pi(t) = |d f^-1(t) / dt|

    The density has no closed form; f is inverted by a fixed number of
    bisections and one Newton step, about 25 evaluations of a sine each.

    Args:
      scale: in [-1, 2 / (pi - 2)], where f is monotonic. At the lower limit the
        density is infinite at t = 0 and 1, at the upper one at t = 1/2.

    Raises:
      ValueError: scale outside of its range.

    Source: equation 20.
    """

    scale: float = 1.29

    def __post_init__(self):
        if not -1 <= self.scale <= MODE_SCALE_MAX:
            raise ValueError(
                f"Mode: scale={self.scale} is outside of [-1, 2 / (pi - 2) = "
                f"{MODE_SCALE_MAX:.4f}], where the map from u to t is not monotonic"
            )

    def quantile(self, u: Float[Array, "*T"]) -> Float[Array, "*T"]:
        """The timestep below which a share `u` of all timesteps lies."""
        # Rounding of 1 + scale may overstep the ends by one unit in the last place.
        return jnp.clip(self._map(u), 0, 1)

    def density(self, t: Float[Array, "*T"]) -> Float[Array, "*T"]:
        """The density at `t`; 1 / (1 + scale) at both ends, 0 outside of [0, 1]."""
        return _within(t, 1 / self._slope(self._inverse(t)))

    def _map(self, u):
        """f(1 - u), which rises; f itself falls."""
        return (1 + self.scale) * u - self.scale * jnp.sin(0.5 * math.pi * u) ** 2

    def _slope(self, u):
        slope = (1 + self.scale) - 0.5 * math.pi * self.scale * jnp.sin(math.pi * u)
        return jnp.maximum(slope, 0)

    def _inverse(self, t):
        # Floating point is fine near 0 only, and f is symmetric about (1/2, 1/2).
        t = jnp.minimum(t, 1 - t)

        def halve(_, bracket):
            low, high = bracket
            middle = 0.5 * (low + high)
            below = self._map(middle) < t
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, _ = lax.fori_loop(0, 24, halve, (jnp.zeros_like(t), jnp.full_like(t, 0.5)))
        # Newton adds the last digits, and the gradient that bisection does not have.
        slope = self._slope(low)
        return low + (t - self._map(low)) / jnp.where(slope > 0, slope, 1)


@dataclasses.dataclass(frozen=True)
class CosMap:
    """The noise levels (log-SNR) that the cosine schedule of diffusion models visits.

    pi(t) = 2 / (pi - 2 pi t + 2 pi t^2)

    Source: section 3.1, "CosMap".
    """

    def quantile(self, u: Float[Array, "*T"]) -> Float[Array, "*T"]:
        """The timestep below which a share `u` of all timesteps lies."""
        noise = jnp.sin(0.5 * math.pi * u)
        data = jnp.sin(0.5 * math.pi * (1 - u))
        return noise / (noise + data)

    def density(self, t: Float[Array, "*T"]) -> Float[Array, "*T"]:
        """The density at `t`; 2 / pi at both ends, 0 outside of [0, 1]."""
        return _within(t, 2 / (math.pi * (1 - 2 * t * (1 - t))))


TimestepDensity = Uniform | LogitNormal | Mode | CosMap

_DENSITIES = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "cosmap": CosMap}


def sample_timesteps(
    key: Key[Array, ""],
    shape: tuple[int, ...],
    density: TimestepDensity,
    *,
    stratified: bool = False,
) -> Float[Array, "..."]:
    """Timesteps distributed as `density`, one per example of a batch.

    t = quantile(u),   u uniform in [0, 1)

    Stratified, the n numbers u lie one in each interval [i/n, (i+1)/n), in
    random order: each timestep alone is distributed as before, but no batch
    misses a range of noise levels, so the loss varies less from batch to batch.

    Args:
      key: used once.
      shape: of the result, usually `(batch,)`.
      density: for instance `LogitNormal(0.0, 1.0)`.
      stratified: spread the batch evenly.

    Returns:
      float32 in [0, 1].

    Source: the densities' own; stratification as in Kingma et al. 2021,
    "Variational Diffusion Models", "low-discrepancy sampler" (arXiv:2107.00630).
    """
    if stratified:
        order_key, key = jax.random.split(key)
        count = math.prod(shape)
        stratum = jax.random.permutation(order_key, count).reshape(shape)
        u = (stratum + jax.random.uniform(key, shape)) / count
    else:
        u = jax.random.uniform(key, shape)
    return density.quantile(u)


def parse_density(text: str) -> TimestepDensity:
    """A timestep density from its text form, as typed on a command line.

    Args:
      text: a name with optional numbers, such as `"uniform"`, `"logit_normal"`,
        `"logit_normal(0.0, 1.0)"`, `"mode(1.29)"` or `"cosmap"`.

    Returns:
      The density as a value; numbers left out keep their defaults.

    Raises:
      ValueError: unreadable text, unknown name (the nearest or all are listed),
        too many numbers, or a number out of range.
    """
    match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text.strip())
    if match is None:
        raise ValueError(
            f"parse_density: cannot read {text!r}; write name or name(number, ...), "
            f"with one of {_known_densities()}"
        )
    name, inside = match.groups()
    if name not in _DENSITIES:
        near = difflib.get_close_matches(name, _DENSITIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"parse_density: unknown density {name!r}; {hint}known: {_known_densities()}"
        )
    words = inside.split(",") if inside and inside.strip() else []
    limit = len(dataclasses.fields(_DENSITIES[name]))
    if len(words) > limit:
        raise ValueError(
            f"parse_density: {text!r} gives {len(words)} numbers, but {name} takes "
            f"at most {limit}; known: {_known_densities()}"
        )
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(
            f"parse_density: {inside!r} in {text!r} is not a list of numbers"
        ) from None
    return _DENSITIES[name](*numbers)


def _known_densities() -> str:
    def signature(name):
        fields = ", ".join(field.name for field in dataclasses.fields(_DENSITIES[name]))
        return f"{name}({fields})" if fields else name

    return ", ".join(map(signature, _DENSITIES))


def _within(t, density):
    return jnp.where((t >= 0) & (t <= 1), density, 0)
