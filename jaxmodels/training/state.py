"""Everything that training changes, as one value."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Key

from jaxmodels.training.loss_scale import initial_loss_scale
from jaxmodels.training.precision import scales_loss
from jaxmodels.training.sharding import (
    Rules,
    check_axes_used,
    make_mesh,
    path_name,
    tree_shardings,
)


@flax.struct.dataclass
class TrainState:
    """Parameters and all that is needed to go on training them.

    Attributes:
      step: steps done so far, skipped ones too, an int32 scalar.
      params: the parameters, float32.
      opt_state: the optimizer's state.
      ema: moving average of the parameters, or None.
      model_state: the model's other variables by collection, such as
        "batch_stats"; empty for a model that has parameters only.
      key: the run's key; step `n` uses `fold_in(key, n)`, so that resuming
        needs no history.
      placement: the sharding of every leaf, in tree order; static. A step pins
        its result to it, or XLA might move leaves and compile again for that.
    """

    # Any, because trees of shapes and of shardings have this structure too.
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    key: Any
    model_state: Any = flax.struct.field(default_factory=dict)
    placement: tuple[Sharding, ...] | None = flax.struct.field(pytree_node=False, default=None)
    # No field, not even one of None: Orbax would not restore a run begun without it.
    loss_scale: ClassVar[None] = None


@flax.struct.dataclass
class ScaledTrainState(TrainState):
    """The state of a float16 run.

    Attributes:
      loss_scale: a `LossScale`, which also counts the steps skipped; None stands
        only for a state under construction.
    """

    loss_scale: Any = None


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    example_batch: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    rules: Rules = (),
    ema: bool = False,
    precision: str = "float32",
) -> TrainState:
    """Initialises parameters and optimizer, directly where the mesh wants them.

    One compiled program makes the whole state, so no device ever holds more
    than its part, and XLA drops the forward pass that Flax initialises with.

    Args:
      model: a linen module; variables that are not parameters, such as the
        statistics of a batch norm, become the state's `model_state`.
      optimizer: an optax transformation.
      key: makes the parameters and, folded, every later step.
      example_batch: the arguments of the model's call by name, arrays or
        `jax.ShapeDtypeStruct`s; only shapes and dtypes matter.
      mesh: from `make_mesh`; by default the first device alone.
      rules: see `tree_shardings`.
      ema: whether to keep a moving average (needed by `make_step(ema=...)`).
      precision: the one `make_step` is given; `"float16"` adds a loss scale.

    Returns:
      A `TrainState` at step 0; a `ScaledTrainState` for float16.

    Raises:
      ValueError: unknown precision, rules that do not fit the mesh, or an axis of the
        mesh that nothing is split over.
    """
    init_key, run_key = jax.random.split(key)
    scaled = scales_loss(precision)
    shapes = {name: (x.shape, x.dtype) for name, x in example_batch.items()}

    def build(init_key, run_key):
        example = {name: jnp.zeros(*shape) for name, shape in shapes.items()}
        model_state = dict(model.init(init_key, **example))
        params = model_state.pop("params")
        kind = ScaledTrainState if scaled else TrainState
        scale = {"loss_scale": initial_loss_scale()} if scaled else {}
        return kind(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            # A distinct buffer: step donates both.
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            key=run_key,
            model_state=model_state,
            **scale,
        )

    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    abstract = jax.eval_shape(build, init_key, run_key)
    shardings = tree_shardings(abstract, mesh, rules)
    check_axes_used(shardings, mesh)
    state = jax.jit(build, out_shardings=shardings)(init_key, run_key)
    return state.replace(placement=tuple(jax.tree.leaves(shardings)))


def start_from(state: TrainState, variables: Mapping[str, Any]) -> TrainState:
    """A new state with given variables in place of random ones, to fine-tune them.

    Args:
      state: from `init_state`.
      variables: of the same model, "params" and its other collections; they are copied,
        as a step overwrites its own.

    Returns:
      The state with each variable where its own was laid out; a moving average starts
      from the parameters too.

    Raises:
      ValueError: the variables are not the model's.
    """
    own = {"params": state.params, **state.model_state}
    wanted, given = (
        {path_name(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(dict(tree))}
        for tree in (own, variables)
    )
    if faults := [name for name in {**wanted, **given} if wanted.get(name) != given.get(name)]:
        described = (f"{name}: {given.get(name)}, not {wanted.get(name)}" for name in faults)
        raise ValueError(
            "start_from: variables are not those of the state's model; shapes are\n  "
            + "\n  ".join(described)
        )
    placed = jax.tree.map(
        lambda new, old: jax.device_put(jnp.array(new, old.dtype), old.sharding),
        dict(variables),
        own,
    )
    params = placed.pop("params")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema, model_state=placed)
