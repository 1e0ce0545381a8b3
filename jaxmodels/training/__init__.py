"""Training: state, step, loop, precision, sharding, checkpoints, logging. Knows no model."""

from jaxmodels.training.checkpoint import Checkpointer
from jaxmodels.training.compilation import enable_compilation_cache
from jaxmodels.training.loop import fit
from jaxmodels.training.monitor import NonFiniteError
from jaxmodels.training.optimizers import adamw, decay_mask, make_optimizer
from jaxmodels.training.planner import Plan, plan
from jaxmodels.training.precision import compute_dtype
from jaxmodels.training.runtime import Runtime
from jaxmodels.training.sharding import make_mesh, shard_batch
from jaxmodels.training.state import TrainState, init_state, start_from
from jaxmodels.training.step import make_step

__all__ = [
    "Checkpointer",
    "NonFiniteError",
    "Plan",
    "Runtime",
    "TrainState",
    "adamw",
    "compute_dtype",
    "decay_mask",
    "enable_compilation_cache",
    "fit",
    "init_state",
    "make_mesh",
    "make_optimizer",
    "make_step",
    "plan",
    "shard_batch",
    "start_from",
]
