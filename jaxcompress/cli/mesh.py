"""The flags that spread a command over devices and processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jaxcompress.cli.paths import FOLDER

if TYPE_CHECKING:
    from jaxcompress.distributed import ShardingRules


@dataclass(frozen=True, kw_only=True)
class MeshFlag:
    """The devices."""

    mesh: str | None = None
    """Spread rows, heads and weights over devices, such as data=2,tensor=4: data and fsdp divide the rows, tensor the
    kv heads; tensor and fsdp divide the weights. One device if not given."""

    def rules(self) -> ShardingRules | None:
        """Where arrays go; None for one device.

        Raises:
          ValueError: this is no mesh, or there are not so many devices.
        """
        if self.mesh is None:
            return None
        from jaxcompress.distributed import ShardingRules, make_mesh

        return ShardingRules(make_mesh(self.mesh))


@dataclass(frozen=True, kw_only=True)
class ProcessFlags(MeshFlag):
    """The devices, of one process or of several."""

    coordinator: str | None = None
    """host:port of the first of several processes that run this command together, each started with --process-id. Under
    SLURM, Open MPI and GKE none of the three flags is needed."""
    processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this one is, from 0. The first one prints and writes files."""

    def rules(self) -> ShardingRules | None:
        """The same, after the other processes were joined.

        Raises:
          ValueError: flags of processes without --mesh, or some of them only; other cases as for one process.
        """
        told = (self.coordinator, self.processes, self.process_id)
        if self.mesh is None:
            if told != (None, None, None):
                raise ValueError(
                    "--coordinator, --processes and --process-id are for --mesh: give one over all devices"
                )
            return None
        import jax

        self.join_others()
        if jax.process_count() > 1:
            _print_only_ours(first=is_first())
        return super().rules()

    def join_others(self) -> None:
        """Joins the other processes, if there are any."""
        from jaxcompress.distributed import join

        if self.mesh is not None:
            join(self.coordinator, self.processes, self.process_id)


@dataclass(frozen=True, kw_only=True)
class ProfileFlag(ProcessFlags):
    """The devices, and what they do."""

    profile: Annotated[Path | None, FOLDER] = None
    """Write a trace of the whole command into this folder, for XProf, TensorBoard or Perfetto. Give it few tokens or
    steps: traces are large."""

    @contextmanager
    def profiled(self) -> Iterator[None]:
        """Traces what is done meanwhile, if --profile asks for it."""
        if self.profile is None:
            yield
            return
        import jax

        self.join_others()  # a trace looks for devices, before which processes have to be joined
        with jax.profiler.trace(self.profile):
            yield


def _print_only_ours(*, first: bool) -> None:
    """From now on standard output has what the first process prints. What libraries of C++ print there (Gloo tells whom
    it is connected to) goes to standard error."""
    sys.stdout.flush()
    ours = os.dup(1) if first else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding="utf-8")


def is_first() -> bool:
    """Whether this process prints and writes files."""
    import jax

    return jax.process_index() == 0
