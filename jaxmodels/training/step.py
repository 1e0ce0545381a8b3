"""The training step: one jitted, donated, pure function."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from jaxmodels.training.precision import (
    cast_floating,
    compute_dtype,
    float32_where_kept,
    matching_paths,
    products,
    scales_loss,
)
from jaxmodels.training.runtime import current_runtime
from jaxmodels.training.sharding import placed_on
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
    skip_nonfinite: bool | None = None,
    keep_float32: str | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Array]]]:
    """Compiles `(state, batch) -> (state, metrics)`.

    Where arrays live is decided by the state and the batch that come in (see
    `init_state` and `shard_batch`); the step itself runs on any mesh.

    Args:
      loss_fn: `(params, batch, key) -> (loss, metrics)`, the mean over the batch;
        for a state whose `model_state` is not empty,
        `(params, batch, key, model_state) -> (loss, metrics, model_state)`.
      optimizer: an optax transformation, the one `init_state` was given.
      precision: `"float32"`, or `"bfloat16"` or `"float16"` to hand `loss_fn` a
        copy of the parameters in that type; gradients and updates stay float32.
        float16 differentiates the loss times the state's loss scale, and skips
        the steps where that overflows. `"float8"` is bfloat16 with the products of
        linear maps and experts, forward and backward, in eight bits scaled tile by
        tile (`ops.float8`); name in `keep_float32` those that are not to be.
      accumulate: how many equal parts of the batch to take one after the other,
        their gradients averaged: less memory, the same update. A `model_state`
        goes from part to part.
      ema: decay of the moving average, or None. The first steps use the smaller
        `(1 + n) / (10 + n)`, or the average would remember the initial values.
      skip_nonfinite: a step whose loss or a gradient is not finite changes
        nothing but `step`, so that data and keys go on; None is what the command
        line asked for, `--on-nan skip`.
      keep_float32: regular expression; the parameters whose paths it is found
        in stay float32. A linen module whose parameters all do computes in
        float32 as well, whatever its `dtype`; so name layers whole. Outside
        modules JAX's promotion decides.

    Returns:
      The step, which donates `state`. Metrics: `loss_fn`'s, `loss`, `grad_norm` before
      clipping, `first_nonfinite` (index of the first gradient that is not, or -1);
      `skipped` (0 or 1) where steps can be, and `loss_scale`, the next step's, in float16.

    Raises:
      ValueError: unknown precision, `accumulate` below 1 or not dividing the
        batch, `ema` outside (0, 1), a state without a moving average for it, a
        state made for another precision, or `keep_float32` found nowhere.

    Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv:1710.03740);
    float8 from DeepSeek-AI 2024, "DeepSeek-V3", section 3.3 (arXiv:2412.19437).
    """
    dtype = compute_dtype(precision)
    if accumulate < 1:
        raise ValueError(f"make_step: accumulate={accumulate} must be at least 1")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"make_step: ema={ema} must lie in (0, 1); None means no average")
    if skip_nonfinite is None:
        skip_nonfinite = current_runtime().on_nan == "skip"

    def gradients(scale, params, model_state, batch, key):
        kept = matching_paths(params, keep_float32)
        mixed = kept and dtype != jnp.float32

        def loss_in_compute_dtype(params):
            extra = (model_state,) if model_state else ()
            with float32_where_kept() if mixed else contextlib.nullcontext():
                low = cast_floating(params, dtype, kept)
                loss, metrics, *changed = loss_fn(low, batch, key, *extra)
            loss = loss.astype(jnp.float32)
            kept_state = changed[0] if extra else model_state
            return loss if scale is None else scale.scaled(loss), (loss, metrics, kept_state)

        of = jax.value_and_grad(loss_in_compute_dtype, has_aux=True)
        with products(precision):
            (_, (loss, metrics, model_state)), grads = of(params)
        return (grads, {"loss": loss, **metrics}), model_state

    def update(state, grads, model_state):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema if ema is None else _move(state.ema, params, state.step, ema)
        return state.replace(
            params=params, opt_state=opt_state, ema=average, model_state=model_state
        )

    def step(state, batch):
        _check_state(state, precision, ema)
        key = jax.random.fold_in(state.key, state.step)
        scale = state.loss_scale
        several = _accumulated(functools.partial(gradients, scale), accumulate)
        with placed_on(state.placement):
            (grads, metrics), model_state = several(state.params, state.model_state, batch, key)
        grads = grads if scale is None else scale.unscaled(grads)
        if skip_nonfinite or scale is not None:
            after, said = _unless_nonfinite(update, state, grads, model_state, metrics["loss"])
            metrics |= said
        else:
            after = update(state, grads, model_state)
        metrics |= _gradient_health(grads)
        return _pinned(after.replace(step=state.step + 1)), metrics

    return jax.jit(step, donate_argnums=0)


def _check_state(state: TrainState, precision: str, ema: float | None) -> None:
    if ema is not None and state.ema is None:
        raise ValueError(
            f"make_step: ema={ema} but the state has no moving average; "
            "create it with init_state(..., ema=True)"
        )
    if scales_loss(precision) != (state.loss_scale is not None):
        has = "no" if state.loss_scale is None else "a"
        raise ValueError(
            f"make_step: precision={precision!r} but the state has {has} loss scale; "
            f"create it with init_state(..., precision={precision!r})"
        )


def _unless_nonfinite(
    update: Callable, state: TrainState, grads: Any, model_state: Any, loss: Float[Array, ""]
) -> tuple[TrainState, dict[str, Array]]:
    """The state after an update, or as it was; and what is to be said about that."""
    finite = jnp.isfinite(loss) & (_gradient_health(grads)["first_nonfinite"] < 0)
    # A branch updates in place; choosing between two states would hold both.
    after = jax.lax.cond(finite, update, lambda state, *_: state, state, grads, model_state)
    said = {"skipped": (~finite).astype(jnp.int32)}
    if state.loss_scale is not None:
        after = after.replace(loss_scale=state.loss_scale.after(finite))
        said["loss_scale"] = after.loss_scale.value
    return after, said


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
