"""Rectified flow: straight paths between data and noise, and what is learned on them.

Time runs from data (t = 0) to noise (t = 1) and a network learns the velocity

    x_t = (1 - t) x0 + t noise,   d x_t / dt = noise - x0

This file holds the path and its loss; `flow_densities` says which timesteps to
train on and `flow_samplers` follows the learned velocity back. Use all of it as
`from jaxmodels.ops import flow`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmodels.ops.flow_densities import (
    CosMap,
    LogitNormal,
    Mode,
    TimestepDensity,
    Uniform,
    parse_density,
    sample_timesteps,
)
from jaxmodels.ops.flow_samplers import (
    guided_velocity,
    resolution_shift,
    sample,
    shift_timesteps,
)

__all__ = [
    "CosMap",
    "LogitNormal",
    "Mode",
    "TimestepDensity",
    "Uniform",
    "flow_matching_loss",
    "guided_velocity",
    "interpolate",
    "parse_density",
    "resolution_shift",
    "sample",
    "sample_timesteps",
    "shift_timesteps",
    "snr_weight",
    "target_weight",
    "velocity",
]


def interpolate(
    x0: Float[Array, "B *D"], noise: Float[Array, "B *D"], t: Float[Array, "B"]
) -> Float[Array, "B *D"]:
    """The point at time t on the straight path from data to noise.

    x_t = (1 - t) x0 + t noise

    Args:
      x0: data.
      noise: standard normal.
      t: one timestep per example, in [0, 1]; 0 is data, 1 is noise.

    Returns:
      x_t, computed in float32 or more, in x0's dtype.

    Raises:
      ValueError: x0 and noise differ in shape, or t is not one number per example.

    Source: Esser et al. 2024, section 3 (arXiv:2403.03206); Liu et al. 2022
    (arXiv:2209.03003) with time reversed.
    """
    _check_same_shape("interpolate", x0=x0, noise=noise)
    _check_per_example("interpolate", "t", t, x0)
    # A weakly typed t would let the products round to x0's precision.
    t = t.astype(jnp.promote_types(x0.dtype, jnp.float32))
    t = t.reshape(t.shape + (1,) * (x0.ndim - 1))
    return ((1 - t) * x0 + t * noise).astype(x0.dtype)


def velocity(x0: Float[Array, "B *D"], noise: Float[Array, "B *D"]) -> Float[Array, "B *D"]:
    """The velocity of the straight path, the same at every time: noise - x0.

    Args:
      x0: data.
      noise: standard normal.

    Raises:
      ValueError: x0 and noise differ in shape.

    Source: Liu et al. 2022, equation 1 (arXiv:2209.03003), with time reversed.
    """
    _check_same_shape("velocity", x0=x0, noise=noise)
    return noise - x0


def flow_matching_loss(
    prediction: Float[Array, "B *D"],
    target: Float[Array, "B *D"],
    weight: Float[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Squared error of a predicted velocity, per example.

    loss_b = weight_b mean_d (prediction_bd - target_bd)^2

    Training on timesteps of some density with weight 1 minimises the same
    expectation as training on uniform timesteps with weight `density.density(t)`.

    Args:
      prediction: the network's velocity at (x_t, t).
      target: `velocity(x0, noise)`.
      weight: per example; None means 1.

    Returns:
      float32 (or more), one number per example; its mean is the training loss.

    Raises:
      ValueError: prediction and target differ in shape, or weight is not one
        number per example.

    Source: Lipman et al. 2022, equation 9 (arXiv:2210.02747); Esser et al. 2024,
    section 2 (arXiv:2403.03206).
    """
    _check_same_shape("flow_matching_loss", prediction=prediction, target=target)
    dtype = jnp.promote_types(prediction.dtype, jnp.float32)
    error = prediction.astype(dtype) - target.astype(dtype)
    loss = jnp.mean(error**2, axis=tuple(range(1, error.ndim)))
    if weight is None:
        return loss
    _check_per_example("flow_matching_loss", "weight", weight, prediction)
    return weight * loss


def target_weight(t: Float[Array, "*T"], target: str) -> Float[Array, "*T"]:
    """The weight that turns the velocity loss into the loss of another prediction.

    noise error = (1 - t) velocity error,   data error = -t velocity error

    because noise = x_t + (1 - t) velocity and x0 = x_t - t velocity.

    Args:
      t: timesteps in [0, 1].
      target: "velocity" (weight 1), "noise" (weight (1 - t)^2, the loss of
        diffusion models) or "data" (weight t^2).

    Raises:
      ValueError: unknown target.

    Source: Esser et al. 2024, section 2 (arXiv:2403.03206).
    """
    weights = {"velocity": jnp.ones_like(t), "noise": (1 - t) ** 2, "data": t**2}
    if target not in weights:
        raise ValueError(f"target_weight: unknown target {target!r}; choose from {list(weights)}")
    return weights[target]


def snr_weight(t: Float[Array, "*T"], density: TimestepDensity) -> Float[Array, "*T"]:
    """The weight of each noise level in the objective that all diffusion losses share.

    w(t) = t / (1 - t) density(t)   in   -1/2 E[w(t) lambda'(t) |noise error|^2]

    with t uniform and lambda = log((1 - t)^2 / t^2) the log signal-to-noise
    ratio. Flow matching with timesteps of this density minimises exactly that,
    so the weight is what compares densities with other schedules.

    Args:
      t: timesteps in [0, 1).
      density: of the timesteps in training.

    Source: Esser et al. 2024, section 2 and equation 18 (arXiv:2403.03206).
    """
    return t / (1 - t) * density.density(t)


def _check_same_shape(function: str, **arrays: Array) -> None:
    (first, a), (second, b) = arrays.items()
    if a.shape != b.shape:
        raise ValueError(
            f"{function}: {first} has shape {a.shape} but {second} has {b.shape}; "
            "both must be the same"
        )


def _check_per_example(function: str, name: str, value: Array, batch: Array) -> None:
    if value.shape != batch.shape[:1]:
        raise ValueError(
            f"{function}: {name} has shape {value.shape} for a batch of shape {batch.shape}; "
            f"give one number per example, shape {batch.shape[:1]}"
        )
