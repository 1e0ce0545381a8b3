"""Several processes that train together: found, compared, told apart.

The runtime is JAX's own. `jaxmodels.launch` starts processes on one machine; on a
cluster its scheduler does, and JAX finds the others by what the scheduler tells.
"""

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Set by jaxmodels.launch for each process that it starts.
COUNT, INDEX = "JAXMODELS_NUM_PROCESSES", "JAXMODELS_PROCESS_ID"
# Set by hand where nothing else tells, as on TPU machines made one by one.
FORCE = "JAXMODELS_DISTRIBUTED"
# How many processes a scheduler started, or the names of all.
_NUMBERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_NAMES = ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")

# A process that finds its results alone may keep the others waiting this long at its end.
_LONGEST_END_SECONDS = 24 * 3600


def start(*, heartbeat_seconds: int = 60) -> None:
    """Joins the other processes, if the environment speaks of any; once, before any array.

    Recognised are processes of `jaxmodels.launch`, of SLURM and Open MPI, TPU pods
    and GKE by the names of their workers, and anything that JAX finds by itself if
    the variable JAXMODELS_DISTRIBUTED is set.

    Args:
      heartbeat_seconds: a process that gives no sign for so long is given up, and the
        others end.

    Raises:
      ValueError: the variable that `launch` sets is no number of a process.
    """
    if jax.distributed.is_initialized() or not _several():
        return
    # SIGTERM to one process then stops all of them after the same step.
    jax.config.update("jax_enable_preemption_service", True)
    options = {
        "heartbeat_timeout_seconds": heartbeat_seconds,
        "shutdown_timeout_seconds": _LONGEST_END_SECONDS,
    }
    if COUNT in os.environ:
        options |= {
            "num_processes": int(os.environ[COUNT]),
            "process_id": int(os.environ[INDEX]),
            "cluster_detection_method": "deactivate",
        }
    jax.distributed.initialize(**options)


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The values of all processes in their order; every process calls it.

    Args:
      value: anything JSON can hold.
    """
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([text.size], np.int32)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def share(batch_size: int) -> dict[str, int]:
    """The part of a batch that this process reads, as arguments of `data.batches`.

    Args:
      batch_size: examples of all processes together.

    Raises:
      ValueError: it does not divide by their number.
    """
    count = jax.process_count()
    if batch_size % count:
        raise ValueError(
            f"share: batch_size={batch_size} does not divide over {count} processes; use a "
            f"multiple of {count}"
        )
    part = {"process_index": jax.process_index(), "process_count": count}
    return {"batch_size": batch_size // count, **part}


def to_host(tree: Any) -> Any:
    """A tree of whole NumPy arrays, whichever devices hold the parts; every process calls it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


class Follower(Exception):  # noqa: N818 (it is no error)
    """Ends a process that has nothing left to do while the first one goes on."""


def first_goes_on() -> None:
    """From here on the first process works alone; `experiment.run` lets the others wait.

    Training is everybody's work; pictures, tables and files of results are not. Call
    it after the last `fit` and `to_host`.
    """
    if not is_first():
        raise Follower


def _several() -> bool:
    numbers = (os.environ.get(name, "") for name in (COUNT, *_NUMBERS))
    return (
        any(number.isdigit() and int(number) > 1 for number in numbers)
        or any("," in os.environ.get(name, "") for name in _NAMES[:1])
        or bool(os.environ.get(_NAMES[1]))
        or bool(os.environ.get(FORCE))
    )
