"""Several processes that run one program, each with its own devices (`jax.distributed`)."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
"""Where SLURM and Open MPI say how many processes they started."""
_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
"""Where GKE lists the hosts of a TPU slice."""


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether SLURM, Open MPI or GKE started this process as one of several."""
    counts = [environment[name] for name in _COUNTS if name in environment]
    several = any(count.isdecimal() and int(count) > 1 for count in counts)
    return several or any("," in environment.get(name, "") for name in _HOSTS)


def join(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes of this run, if there are any. Call it before anything is computed.

    Without arguments, what SLURM, Open MPI or GKE say counts; without them too, this process is alone. A second call
    does nothing.

    Args:
      coordinator: host:port of the first process.
      processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: some of the three are given, but not all; or the process is none of so many.
    """
    given = dict(coordinator=coordinator, processes=processes, process_id=process_id)
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(f"a process needs coordinator, processes and process_id; {', '.join(missing)} is missing")
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise ValueError(f"process_id {process_id} is none of {processes} processes; give 0 to {processes - 1}")
    if jax.distributed.is_initialized():
        return
    if coordinator is not None:
        jax.distributed.initialize(coordinator, processes, process_id)
    elif launched():
        jax.distributed.initialize()


def on_host(array: jax.Array) -> np.ndarray:
    """The whole array in this process, although parts of it may be on the devices of others: all must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
