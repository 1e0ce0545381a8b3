"""The training step: one jitted, donated, pure function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxmodels.training.precision import cast_floating, compute_dtype
from jaxmodels.training.state import TrainState

LossFn = Callable[[Any, Any, Key[Array, ""]], tuple[Float[Array, ""], dict[str, Array]]]
StatefulLossFn = Callable[
    [Any, Any, Key[Array, ""], Any], tuple[Float[Array, ""], dict[str, Array], Any]
]


def make_step(
    loss_fn: LossFn | StatefulLossFn,
    optimizer: optax.GradientTransformation,
    *,
    precision: str = "float32",
    accumulate: int = 1,
    ema: float | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Compiles `(state, batch) -> (state, metrics)`.

    Where arrays live is decided by the state and the batch that come in (see
    `init_state` and `shard_batch`); the step itself runs on any mesh.

    Args:
      loss_fn: `(params, batch, key) -> (loss, metrics)`, the mean over the batch;
        for a state whose `model_state` is not empty,
        `(params, batch, key, model_state) -> (loss, metrics, model_state)`.
      optimizer: an optax transformation, the one `init_state` was given.
      precision: `"float32"`, or `"bfloat16"` to hand `loss_fn` a bfloat16 copy
        of the parameters; gradients and updates stay float32.
      accumulate: how many equal parts of the batch to take one after the other,
        their gradients averaged: less memory, the same update. A `model_state`
        goes from part to part.
      ema: decay of the moving average, or None. The first steps use the smaller
        `(1 + n) / (10 + n)`, or the average would remember the initial values.

    Returns:
      The step, which donates `state`. Metrics: `loss_fn`'s, `loss`, `grad_norm` before
      clipping, `first_nonfinite` (index of the first gradient that is not, or -1).

    Raises:
      ValueError: unknown precision, `accumulate` below 1 or not dividing the
        batch, `ema` outside (0, 1), or a state without a moving average for it.
    """
    dtype = compute_dtype(precision)
    if accumulate < 1:
        raise ValueError(f"make_step: accumulate={accumulate} must be at least 1")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"make_step: ema={ema} must lie in (0, 1); None means no average")

    def gradients(params, model_state, batch, key):
        def loss_in_compute_dtype(params):
            extra = (model_state,) if model_state else ()
            loss, metrics, *changed = loss_fn(cast_floating(params, dtype), batch, key, *extra)
            return loss.astype(jnp.float32), (metrics, changed[0] if extra else model_state)

        of = jax.value_and_grad(loss_in_compute_dtype, has_aux=True)
        (loss, (metrics, model_state)), grads = of(params)
        return (grads, {"loss": loss, **metrics}), model_state

    def step(state, batch):
        if ema is not None and state.ema is None:
            raise ValueError(
                f"make_step: ema={ema} but the state has no moving average; "
                "create it with init_state(..., ema=True)"
            )
        key = jax.random.fold_in(state.key, state.step)
        (grads, metrics), model_state = _accumulated(gradients, accumulate)(
            state.params, state.model_state, batch, key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema if ema is None else _move(state.ema, params, state.step, ema)
        metrics |= _gradient_health(grads)
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=average,
            model_state=model_state,
        )
        return _pinned(state), metrics

    return jax.jit(step, donate_argnums=0)


def _pinned(state: TrainState) -> TrainState:
    if state.placement is None:
        return state
    leaves, structure = jax.tree.flatten(state)
    pinned = map(jax.lax.with_sharding_constraint, leaves, state.placement)
    return jax.tree.unflatten(structure, pinned)


def _accumulated(gradients: Callable, parts: int) -> Callable:
    if parts == 1:
        return gradients

    def split(leaf):
        if leaf.shape[0] % parts:
            raise ValueError(
                f"make_step: accumulate={parts} does not divide the batch of {leaf.shape[0]}; "
                "choose a divisor"
            )
        # Strided parts: each device keeps its own examples in every part.
        return leaf.reshape(-1, parts, *leaf.shape[1:]).swapaxes(0, 1)

    def averaged(params, model_state, batch, key):
        batches = jax.tree.map(split, batch)
        keys = jax.random.split(key, parts)
        first = jax.tree.map(lambda x: x[0], batches)
        shapes, _ = jax.eval_shape(gradients, params, model_state, first, key)

        def add(carry, part):
            total, model_state = carry
            found, model_state = gradients(params, model_state, *part)
            return (jax.tree.map(jnp.add, total, found), model_state), None

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (total, model_state), _ = jax.lax.scan(add, (zeros, model_state), (batches, keys))
        return jax.tree.map(lambda x: x / parts, total), model_state

    return averaged


def _move(average: Any, params: Any, step: Int[Array, ""], decay: float) -> Any:
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(params, average, 1.0 - decay)


def _gradient_health(grads: Any) -> dict[str, Array]:
    squares = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    bad = ~jnp.isfinite(squares)
    return {
        "grad_norm": jnp.sqrt(jnp.sum(squares)),
        "first_nonfinite": jnp.where(bad.any(), jnp.argmax(bad), -1),
    }
