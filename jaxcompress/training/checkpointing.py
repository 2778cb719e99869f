"""Checkpoints of a run, written by Orbax: in the background, exact, and either complete or absent.

This module is not `jaxcompress.checkpoints`, which reads and writes models in exchange formats. A checkpoint is a
folder named after its step. Orbax writes it under another name and renames it when it is complete, so a process may die
at any moment.
"""

from __future__ import annotations

import logging
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.extend.backend

from jaxcompress._extras import extra

with extra("train"):
    from orbax.checkpoint import v1 as ocp

State = TypeVar("State")

_PARTIAL = ".orbax-checkpoint-tmp"


class SaveFailed(OSError):
    """A checkpoint could not be written. Earlier checkpoints are untouched."""


class Checkpoints:
    """The checkpoints of one run.

        with Checkpoints("runs/a/checkpoints") as checkpoints:
            state, where = checkpoints.restore(state)
            data.set_state(where)

    Args:
      folder: created if it does not exist. Incomplete checkpoints that a killed process left in it are deleted.
      keep: how many of the newest checkpoints to keep. An older one is deleted when its successor is complete.

    Raises:
      OSError: the folder cannot be created.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"at least 1 checkpoint must be kept, keep={keep}")
        self.folder = Path(folder).expanduser().absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_partial()
        self._keep = keep
        self._orbax = self._open()
        self._saving: tuple[int, Any] | None = None
        logging.getLogger("absl").addFilter(_not_from_orbax)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None if there is none."""
        return max((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), default=None)

    def save(self, step: int, state: Any, data: Any) -> None:
        """Waits for an earlier save, copies a state to host memory and writes it in the background.

        The state may be donated as soon as this returns.

        Args:
          state: pytree of arrays.
          data: the position in the data: `get_state()` of its iterator, or any other JSON value.

        Raises:
          SaveFailed: this save or the earlier one failed.
        """
        self.wait()
        try:
            parts = {"state": _named(state), "data": {"state": data}}
            self._saving = step, self._orbax.save_checkpointables_async(step, parts, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failed(step, error) from error

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
          SaveFailed: the save failed; says why, and which checkpoint is the last good one.
        """
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()
        except Exception as error:  # any failure of the background thread
            raise self._failed(step, error) from error
        if self.latest != step:
            raise self._failed(step, RuntimeError("it is not there"))

    def restore(self, like: State, step: int | None = None) -> tuple[State, Any]:
        """The state of a checkpoint, and its position in the data.

        Args:
          like: a state, or its shapes (`jax.eval_shape`), as the run has it now. Arrays get its shardings, or go to the
            first device if it has none.
          step: of the checkpoint; the newest by default.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: the checkpoint is of another model or optimizer (names the first array that differs and both
            shapes), or cannot be read.
        """
        step = self.latest if step is None else step
        folder = self.folder / str(step)
        if step is None or not folder.is_dir():
            raise FileNotFoundError(
                f"there is no checkpoint {'' if step is None else f'of step {step} '}in {self.folder}"
            )
        wanted = _named(jax.tree.map(_abstract, like))
        try:
            saved: Any = self._orbax.checkpointables_metadata(step).metadata
            _check_same(saved["state"], wanted, folder)
            loaded = self._orbax.load_checkpointables(step, {"state": wanted, "data": None})
        except Mismatch:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"the checkpoint {folder} cannot be read: {reason}") from error
        arrays = [loaded["state"][name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(like), arrays), loaded["data"]["state"]

    def close(self) -> None:
        """Waits for the last save. Raises SaveFailed as `wait` does."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            logging.getLogger("absl").removeFilter(_not_from_orbax)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except SaveFailed:
            if error is None:  # otherwise the earlier error is raised
                raise

    def _open(self) -> ocp.training.Checkpointer:
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
        context = ocp.Context()
        context.checkpointables.registry = registry
        newest: Any = ocp.training.preservation_policies.LatestN(self._keep)
        return ocp.training.Checkpointer(str(self.folder), context=context, preservation_policy=newest)

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        with suppress(Exception):  # it would raise the same error again
            self._orbax.close()
        self._orbax = self._open()
        self._remove_partial()
        reason = re.sub(r"\s*\[os_error_code.*", "", str(error).strip().split("\n")[0])
        kept = "there is none before it" if self.latest is None else f"step {self.latest} is the last good one"
        return SaveFailed(f"the checkpoint of step {step} could not be saved in {self.folder} ({kept}): {reason}")

    def _remove_partial(self) -> None:
        for path in self.folder.glob(f"*{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)


class Mismatch(ValueError):
    """A checkpoint is of another model or optimizer."""


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by name, such as `params.layers.mlp.gate.kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): x for path, x in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same name")
    return named


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.extend.backend.get_default_device())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _check_same(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    told = lambda x: f"{list(x.shape)} {x.dtype}" if x is not None else "absent"
    for name in sorted({*saved, *wanted}, key=lambda name: (not name.startswith("params"), name)):
        one, other = saved.get(name), wanted.get(name)
        if one is None or other is None or (tuple(one.shape), one.dtype) != (tuple(other.shape), other.dtype):
            raise Mismatch(
                f"the checkpoint {folder} is of another model or optimizer: {name} is {told(one)} there, "
                f"{told(other)} here"
            )


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """False for Orbax's warnings and errors: it logs each failure several times, with traces, before raising it."""
    return "orbax" not in record.pathname or record.levelno < logging.WARNING
