"""States of prefixes on disk, each a file as `jaxcompress.save_state` writes it, within a limit of bytes."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue

from jaxcompress.generation.decode_state import DecodeState
from jaxcompress.generation.state_file import Record, read_record, record_of, state_of, write_record
from jaxcompress.inputs.newest_files import bytes_of, keep_newest
from jaxcompress.inputs.whole_file import unfinished
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.policy import Policy

LOG = logging.getLogger("jaxcompress.serving")

SUFFIX = ".state"

UNWRITTEN = 8
"""States that may wait to be written; one more is not written."""

ABANDONED = 3600.0
"""Seconds after which an unfinished file is nobody's. A younger one may be what another server is writing."""

LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
"""Errors of writing that the next file will meet too."""


class PrefixFiles:
    """The files of a folder. They are written by a thread of their own, so that no row waits for the disk.

    A file appears complete or not at all. One that cannot be read is deleted, and counts as absent. Once the disk is
    full or may not be written, no other file is written; those that are there are still read. Several processes may
    share a folder: each reads what the others wrote, and the limit is for all files together.

    Attributes:
      writes: whether files are written.
    """

    def __init__(self, folder: str | Path, most_bytes: int) -> None:
        """Raises OSError if the folder cannot be made or read."""
        self.folder, self._most = Path(folder).expanduser(), most_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in unfinished(self.folder, f"*{SUFFIX}*"):
            with suppress(FileNotFoundError):  # another process deleted it
                if part.stat().st_mtime < time.time() - ABANDONED:  # of a process that was killed while it wrote
                    part.unlink()
        self.writes = True
        self._queue: Queue[tuple[str, Record] | None] = Queue(UNWRITTEN)
        self._thread = threading.Thread(target=self._write_all, name="prefix files", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return bytes_of(self.folder, SUFFIX)

    def read(self, name: str, model: Decoder, policy: Policy) -> DecodeState | None:
        """The state of this name; None if there is none that can be read."""
        path = self._path(name)
        try:
            state = state_of(read_record(path), path, model, policy)
        except FileNotFoundError:  # none, or another process deleted it
            return None
        except (OSError, ValueError, FloatingPointError) as error:
            LOG.warning("a prefix file is left out and deleted: %s", error)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return state

    def write(self, name: str, state: DecodeState, model: Decoder) -> None:
        """Has a state written soon; not if there is one of this name, or too many wait."""
        if not self.writes or os.path.exists(self._path(name)):  # unlike Path.exists, it never raises
            return
        with suppress(Full):
            self._queue.put_nowait((name, record_of(state, model)))

    def close(self) -> None:
        """Waits until what was given is written."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _write_all(self) -> None:
        while (given := self._queue.get()) is not None:
            name, record = given
            if not self.writes:
                continue
            try:
                write_record(self._path(name), record, writer=str(os.getpid()))
            except OSError as error:
                self.writes = error.errno not in LASTING
                what = "a prefix file was not written" if self.writes else "prefix files are no longer written"
                LOG.warning("%s: %s", what, error)
                continue
            keep_newest(self.folder, self._most, SUFFIX)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"
