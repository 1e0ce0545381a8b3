"""What a training step will hold on each device, known before anything is compiled."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jaxmodels.ops.mesh_axes import AXES, BATCH_AXES
from jaxmodels.ops.rematerialisation import POLICIES
from jaxmodels.registry import module_fields
from jaxmodels.training.liveness import peak_bytes
from jaxmodels.training.precision import cast_floating, compute_dtype, scales_loss
from jaxmodels.training.runtime import current_runtime
from jaxmodels.training.sharding import Rules, path_name, tree_shardings
from jaxmodels.training.state import init_state

# From the one that costs least time.
_REMEDIES = [policy for policy in POLICIES if policy not in ("none", "offload")]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device, of a step of training.

    Attributes:
      parameters, optimizer, ema: the state's; split where the mesh splits them.
      other: keys, counters, scales and variables that are not parameters.
      batch: the device's part of a batch.
      gradients: of the parameters, split as they are; with accumulation also the sum.
        Where a parameter moves as soon as its gradient is there, no more than the peak.
      activations: the most that the forward and backward pass, or an optimizer that needs
        all gradients at once, hold besides.
      setting: mesh, remat and accumulation, in words.
    """

    parameters: int
    optimizer: int
    ema: int
    other: int
    batch: int
    gradients: int
    activations: int
    setting: str = ""
    _variant: Callable[..., "Plan"] | None = dataclasses.field(default=None, repr=False)

    @property
    def total(self) -> int:
        """Arguments and temporary memory of the compiled step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        names = ("parameters", "gradients", "optimizer", "ema", "other", "batch", "activations")
        return {name: getattr(self, name) for name in names}

    def print(self, console: Console | None = None) -> None:
        """Prints a table."""
        table = Table()
        table.add_column("what")
        table.add_column("MiB", justify="right")
        table.add_column("share", justify="right")
        for name, size in self.parts().items():
            table.add_row(name, f"{size / 2**20:,.1f}", f"{size / self.total:.0%}")
        table.add_section()
        table.add_row("total", f"{self.total / 2**20:,.1f}", "")
        console = console or Console()
        console.print(f"memory of one device, {self.setting}", highlight=False)
        console.print(table)

    def require_room(self, available: int | None) -> None:
        """Raises unless the step fits.

        Args:
          available: bytes of one device, such as `device_memory()`; None is any number.

        Raises:
          ValueError: it does not; says what is needed, what is there, and which
            rematerialisation, accumulation or mesh would fit.
        """
        if available is None or self.total <= available:
            return
        raise ValueError(
            f"plan: training with {self.setting} needs {_mib(self.total)} a device, and there are "
            f"{_mib(available)}; {self._remedy(available)}"
        )

    def _remedy(self, available: int) -> str:
        for change in _changes() if self._variant else ():
            try:
                found = self._variant(**change)
            except ValueError:
                # A batch that does not divide, or a model without the field.
                continue
            if found.total <= available:
                words = " and ".join(f"{name}={value!r}" for name, value in change.items())
                return f"{words} would fit, with {_mib(found.total)}"
        return "nothing that the planner knows would fit; take a smaller model or batch"


def _changes() -> list[dict[str, Any]]:
    """What to try, the least change first."""
    single = [{"remat": policy} for policy in _REMEDIES]
    parts = [{"accumulate": n} for n in (2, 4, 8, 16)]
    meshes = [{"mesh": f"fsdp={n}"} for n in (2, 4, 8, 16, 32, 64)]
    both = [{"mesh": mesh["mesh"], "remat": "sqrt"} for mesh in meshes]
    return [*single, *parts, *meshes, *both]


def plan(
    model: nn.Module,
    loss_fn: Callable[[nn.Module], Callable[..., Any]],
    optimizer: optax.GradientTransformation,
    example_batch: Mapping[str, Any],
    batch: Mapping[str, Any],
    *,
    mesh: Mesh | str | None = None,
    rules: Rules = (),
    precision: str = "float32",
    accumulate: int = 1,
    ema: bool = False,
) -> Plan:
    """Adds up what a step of training holds on each device; compiles nothing.

    total = parameters + optimizer + ema + other + batch + gradients + activations

    States are counted leaf by leaf, as `init_state` places them. Activations are the most
    that live at once in the traced forward and backward pass of a device's part of the
    batch (`training.liveness`), and gradients are all held if the optimizer needs them
    together, to clip their norm for example. XLA's own figure was within 15 % of the total
    for the models tested. Under `fsdp` it was a sixth less with `remat="sqrt"` and for Swin,
    and 0.75 to 1.19 of the total where parameters are larger than what a device computes
    of its examples: XLA may gather examples instead, or keep parameters transposed too. It
    is more on CPUs that were not tuned (`cpu.tune`). Axes other than `data` and `fsdp`
    split activations too, which is not counted.

    Args:
      model: a linen module.
      loss_fn: `model -> loss function`, so that other policies can be tried; the loss
        function is as of `make_step`.
      optimizer, example_batch, rules, ema: as of `init_state`.
      mesh: from `make_mesh`, or its text, whose devices need not be there; by default one
        device.
      batch: what the loss gets, arrays or `jax.ShapeDtypeStruct`s of the whole batch.
      precision, accumulate: as of `make_step`.

    Raises:
      ValueError: accumulation or the mesh does not divide the batch; unknown precision, or
        a text that is no mesh.
    """
    options = {"rules": rules, "precision": precision, "ema": ema}

    def variant(remat=None, accumulate=accumulate, mesh=mesh):
        sizes = _sizes(mesh)
        tried = model if remat is None else _with_policy(model, remat)
        traced = tried, loss_fn(tried), optimizer, example_batch, batch
        return _measure(*traced, _mesh(sizes), accumulate, **options)

    return dataclasses.replace(variant(), _variant=variant)


def device_memory() -> int | None:
    """Bytes of one device of this process: what it says, or its share of the host's memory.

    None where neither is known.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if device.platform != "cpu" or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def _measure(
    model, loss_fn, optimizer, example_batch, batch, mesh, accumulate, *, rules, precision, ema
) -> Plan:
    make = partial(init_state, model, optimizer, ema=ema, precision=precision)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: make(key, example_batch), key)
    shardings = tree_shardings(state, mesh, rules)
    local = _local_batch(batch, mesh, accumulate)

    def of(name):
        return _bytes(getattr(state, name), getattr(shardings, name))

    gradients = of("params")
    counted = {"parameters": gradients, "optimizer": of("opt_state"), "ema": of("ema")}
    whole = _bytes(state, shardings)
    batch_bytes = accumulate * _bytes(local)
    several = accumulate > 1
    skips = scales_loss(precision) or current_runtime().on_nan == "skip"
    alone = _moves_alone(optimizer, state.params, state.opt_state)
    at_once = alone and not several and not skips
    peak = peak_bytes(
        _gradient(loss_fn, compute_dtype(precision)),
        state.params,
        local,
        key,
        state.model_state,
        **_parts(state, shardings, local),
        taken=len(jax.tree.leaves(state.params)) if at_once else 0,
    )
    if not alone and not several:
        peak = max(peak, 2 * gradients)  # what the optimizer makes of them, beside them
    held = min(gradients, peak)
    return Plan(
        **counted,
        other=whole - sum(counted.values()),
        batch=batch_bytes,
        gradients=held * (2 if several else 1),
        # A batch is laid out anew for its parts.
        activations=peak - held + (batch_bytes if several else 0),
        setting=_setting(model, mesh, accumulate),
    )


def _gradient(loss_fn: Callable[..., Any], dtype: Any) -> Callable[..., Any]:
    """As `make_step` takes it: the gradient, and what the loss returns beside the loss."""

    def gradient(params, batch, key, model_state):
        def loss(params):
            extra = (model_state,) if model_state else ()
            value, *rest = loss_fn(cast_floating(params, dtype), batch, key, *extra)
            return value.astype(jnp.float32), rest

        return jax.grad(loss, has_aux=True)(params)

    return gradient


def _moves_alone(optimizer: optax.GradientTransformation, params: Any, opt_state: Any) -> bool:
    """Whether the move of every parameter needs no gradient but its own.

    XLA then moves it as soon as its gradient is there, and holds that no longer.
    """
    count = len(jax.tree.leaves(params))
    jaxpr = jax.make_jaxpr(optimizer.update)(params, opt_state, params).jaxpr
    needs = {var: {n} for n, var in enumerate(jaxpr.invars[:count])}
    for equation in jaxpr.eqns:
        read = [needs.get(var, set()) for var in equation.invars if isinstance(var, core.Var)]
        needs |= dict.fromkeys(equation.outvars, set().union(*read))
    return all(len(needs.get(var, ())) <= 1 for var in jaxpr.outvars[:count])


def _parts(state: Any, shardings: Any, local: Any) -> dict[str, list[int]]:
    """Into how many parts arguments and results of the gradient are split."""
    counts = [
        leaf.size // max(1, math.prod(sharding.shard_shape(leaf.shape)))
        for leaf, sharding in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(shardings.params), strict=True
        )
    ]
    rest = len(jax.tree.leaves((local, state.key, state.model_state)))
    return {"argument_parts": [*counts, *[1] * rest], "result_parts": counts}


def _bytes(tree: Any, shardings: Any = None) -> int:
    """Of one device's part of a tree."""
    leaves = jax.tree.leaves(tree)
    if shardings is None:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    placed = zip(leaves, jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in placed)


def _local_batch(batch: Mapping[str, Any], mesh: Any, accumulate: int) -> Any:
    """What one device takes at a time."""
    parts = accumulate * math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)

    def cut(path, leaf):
        if leaf.shape[0] % parts:
            raise ValueError(
                f"plan: batch[{path_name(path)}] has {leaf.shape[0]} examples, which do not "
                f"divide into {parts} parts, of the mesh and of accumulate={accumulate}; use a "
                f"multiple of {parts}"
            )
        return jax.ShapeDtypeStruct((leaf.shape[0] // parts, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map_with_path(cut, batch)


def _sizes(mesh: Mesh | str | None) -> dict[str, int]:
    if not isinstance(mesh, str):
        return {} if mesh is None else dict(mesh.shape)
    pairs = [[piece.strip() for piece in part.split("=")] for part in mesh.split(",")]
    if any(len(p) != 2 or p[0] not in AXES or not p[1].isdigit() or p[1] == "0" for p in pairs):
        raise ValueError(
            f"plan: cannot read mesh={mesh!r}; write axis=size pairs such as 'data=2,fsdp=4' with "
            f"axes from {', '.join(AXES)}"
        )
    return {axis: int(size) for axis, size in pairs}


def _mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh whose devices need not be there: only sizes are asked of it."""
    sizes = sizes or {"data": 1}
    stand_in = np.full(tuple(sizes.values()), jax.devices()[0])
    return Mesh(stand_in, tuple(sizes))


def _with_policy(model: nn.Module, remat: str) -> nn.Module:
    if "remat" not in module_fields(model):
        raise ValueError(f"plan: {type(model).__name__} has no field remat")
    return model.clone(remat=remat)


def _setting(model: nn.Module, mesh: Any, accumulate: int) -> str:
    text = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"mesh={text!r}, remat={getattr(model, 'remat', 'none')!r}, accumulate={accumulate}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
