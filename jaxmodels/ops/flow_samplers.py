"""From noise to data: timestep schedules, ODE solvers and classifier-free guidance."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

VelocityFn = Callable[[Float[Array, "B *D"], Float[Array, "B"]], Float[Array, "B *D"]]
LabelledVelocityFn = Callable[
    [Float[Array, "B *D"], Float[Array, "B"], Int[Array, "B"]], Float[Array, "B *D"]
]


def shift_timesteps(t: Float[Array, "*T"], shift: float) -> Float[Array, "*T"]:
    """Moves timesteps towards noise, as large images need.

    t' = shift t / (1 + (shift - 1) t)

    Args:
      t: timesteps in [0, 1]; 0 and 1 stay.
      shift: positive; 1 changes nothing, 1 / shift undoes it.

    Raises:
      ValueError: shift is not positive.

    Source: Esser et al. 2024, equation 23 (arXiv:2403.03206).
    """
    if not shift > 0:
        raise ValueError(f"shift_timesteps: shift={shift} must be positive; 1 means no shift")
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(num_pixels: int, base_num_pixels: int) -> float:
    """The shift that keeps the uncertainty of an image the same at another resolution.

    shift = sqrt(num_pixels / base_num_pixels)

    Args:
      num_pixels: rows times columns (of the latent, if there is one) to sample or train at.
      base_num_pixels: the same at the resolution whose timesteps are known to be good.

    Raises:
      ValueError: a number of pixels is not positive.

    Source: Esser et al. 2024, equation 23 (arXiv:2403.03206).
    """
    if num_pixels <= 0 or base_num_pixels <= 0:
        raise ValueError(
            f"resolution_shift: num_pixels={num_pixels} and base_num_pixels={base_num_pixels} "
            "must be positive"
        )
    return math.sqrt(num_pixels / base_num_pixels)


def sample(
    velocity_fn: VelocityFn,
    noise: Float[Array, "B *D"],
    *,
    num_steps: int | None = None,
    timesteps: Float[Array, "T"] | None = None,
    method: str = "euler",
    shift: float = 1.0,
    return_trajectory: bool = False,
) -> Float[Array, "..."]:
    """Follows the velocity field from noise (t = 1) to data (t = 0).

    dx / dt = velocity_fn(x, t)

    One `lax.scan` over the steps. Order and evaluations of velocity_fn per step:
    "euler" 1 and 1, "midpoint" 2 and 2, "heun" 2 and 2. Each is exact in a single
    step when the paths are straight. The state keeps noise's dtype; times and the
    arithmetic of a step are float32.

    Args:
      velocity_fn: takes the state and one timestep per example, gives the velocity.
      noise: the state at t = 1.
      num_steps: of equal length, before the shift.
      timesteps: instead of num_steps and shift, the times themselves, from the
        first (1) to the last (0).
      method: "euler", "midpoint" or "heun".
      shift: see `shift_timesteps`.
      return_trajectory: also give every state on the way.

    Returns:
      The state at the last timestep; or, with return_trajectory, all states with
      time in front, noise first: shape (number of steps + 1, B, ...).

    Raises:
      ValueError: unknown method; both or neither of num_steps and timesteps; a
        shift beside timesteps; less than one step; velocity_fn changes the shape.

    Source: Liu et al. 2022, "Flow Straight and Fast"
    (arXiv:2209.03003), for Euler; Karras et al. 2022, algorithm 1
    (arXiv:2206.00364), for Heun, here also in the last step.
    """
    if method not in _STEPS:
        raise ValueError(f"sample: unknown method {method!r}; choose from {sorted(_STEPS)}")
    times = _schedule(num_steps, timesteps, shift)

    def velocity_at(x, t):
        v = velocity_fn(x, jnp.full(x.shape[:1], t))
        if v.shape != x.shape:
            raise ValueError(
                f"sample: velocity_fn returned shape {v.shape} for a state of shape {x.shape}; "
                "both must be the same (split off a learned variance first)"
            )
        return v.astype(jnp.promote_types(v.dtype, jnp.float32))

    def advance(x, interval):
        x = _STEPS[method](velocity_at, x, *interval)
        return x, (x if return_trajectory else None)

    last, states = lax.scan(advance, noise, (times[:-1], times[1:]))
    return jnp.concatenate([noise[None], states]) if return_trajectory else last


def guided_velocity(
    velocity_fn: LabelledVelocityFn,
    guidance_scale: float | Float[Array, ""],
    labels: Int[Array, "B"],
    null_label: int,
) -> VelocityFn:
    """Classifier-free guidance: exaggerates what the label adds to the velocity.

    v = v_null + guidance_scale (v_label - v_null)

    Both velocities come from one call on a batch of twice the size; a
    guidance_scale of exactly 1.0 asks for the labels alone and costs one batch.

    Args:
      velocity_fn: takes state, timesteps and labels, gives the velocity.
      guidance_scale: 0 ignores the labels, 1 obeys the model, more exaggerates.
      labels: the class of each example.
      null_label: the label that stands for "no label" in training.

    Returns:
      A velocity of state and timesteps, ready for `sample`.

    Raises:
      ValueError: when it is called, if the state's batch is not the number of labels.

    Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance"
    (arXiv:2207.12598), whose weight w is guidance_scale - 1.
    """
    obeys_model = isinstance(guidance_scale, int | float) and guidance_scale == 1

    def guided(x: Float[Array, "B *D"], t: Float[Array, "B"]) -> Float[Array, "B *D"]:
        if x.shape[:1] != labels.shape:
            raise ValueError(
                f"guided_velocity: labels of shape {labels.shape} for a state of shape "
                f"{x.shape}; give one label per example"
            )
        if obeys_model:
            return velocity_fn(x, t, labels)
        both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])
        v = velocity_fn(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        v_label, v_null = jnp.split(v, 2)
        return (v_null + guidance_scale * (v_label - v_null)).astype(v.dtype)

    return guided


def _schedule(num_steps, timesteps, shift):
    if (num_steps is None) == (timesteps is None):
        raise ValueError(
            f"sample: num_steps={num_steps} and timesteps={timesteps}; give exactly one of them"
        )
    if timesteps is None:
        if num_steps < 1:
            raise ValueError(f"sample: num_steps={num_steps} must be at least 1")
        return shift_timesteps(jnp.linspace(1, 0, num_steps + 1, dtype=jnp.float32), shift)
    if shift != 1:
        raise ValueError(
            f"sample: shift={shift} is not applied to given timesteps; "
            "pass shift_timesteps(timesteps, shift) instead"
        )
    if timesteps.ndim != 1 or timesteps.size < 2:
        raise ValueError(
            f"sample: timesteps of shape {timesteps.shape}; give one dimension of at least "
            "two times, from noise to data"
        )
    return timesteps.astype(jnp.float32)


def _move(x, v, dt):
    """x + dt v in the precision of v, which is float32 or more, stored as x is."""
    return (x + dt * v).astype(x.dtype)


def _euler(velocity_at, x, t, t_next):
    return _move(x, velocity_at(x, t), t_next - t)


def _midpoint(velocity_at, x, t, t_next):
    half = 0.5 * (t_next - t)
    middle = _move(x, velocity_at(x, t), half)
    return _move(x, velocity_at(middle, t + half), t_next - t)


def _heun(velocity_at, x, t, t_next):
    v = velocity_at(x, t)
    v_next = velocity_at(_move(x, v, t_next - t), t_next)
    return _move(x, 0.5 * (v + v_next), t_next - t)


_STEPS = {"euler": _euler, "midpoint": _midpoint, "heun": _heun}
