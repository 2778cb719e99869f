"""States of prompt prefixes, so that what was read once need not be read again.

A row depends only on the tokens that it read. So the row after the first n tokens of one prompt is that of every prompt
that begins with them, and a copy of it replaces their reading. It has the size of a row, however long the prefix.

In mode chunked a row also depends on where chunks end. Prefixes end where calls end, at multiples of `segment`, which
is a whole number of chunks counted from the first token: the chunks of a prefix are those of the whole prompt.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcompress.generation.decode_state import DecodeArrays
from jaxcompress.serving.pool import Pool
from jaxcompress.serving.prefix_files import PrefixFiles

LOG = logging.getLogger("jaxcompress.serving")

REMEMBERED = 2**16
"""The number of prefixes whose hash is remembered without their state."""


@dataclass(frozen=True)
class PrefixLimits:
    """How much prefixes may take.

    Attributes:
      memory_bytes: of states in memory; those used longest ago go first.
      folder: where states are kept on disk; None: nowhere. A process takes over what it finds there.
      disk_bytes: of all files in the folder; those used longest ago are deleted.
    """

    memory_bytes: int = 2**30
    folder: Any = None
    disk_bytes: int = 2**33


class Mark(NamedTuple):
    """The end of a prefix.

    Attributes:
      tokens: the length of the prefix.
      digest: stands for these tokens, and for everything else that a row depends on.
    """

    tokens: int
    digest: bytes


def marks(pool_digest: bytes, prompt: np.ndarray, every: int) -> list[Mark]:
    """The prefixes of a prompt that end at multiples of `every`, shortest first.

    Each digest is SHA-256 of the digest before it and the tokens since, so all of them cost one pass over the prompt.
    """
    found, digest = [], pool_digest
    for end in range(every, len(prompt) + 1, every):
        digest = hashlib.sha256(digest + np.ascontiguousarray(prompt[end - every : end], "<i4").tobytes()).digest()
        found.append(Mark(end, digest))
    return found


class PrefixStore:
    """Rows by the digests of the tokens that they read, in memory and on disk. Used by the engine's thread alone.

    The longest prefix at which a prompt can be cut is kept for each prompt, which serves the next turn of its
    conversation. A shorter one is kept once a second prompt begins with it, such as a system message.
    """

    def __init__(self, limits: PrefixLimits) -> None:
        self._limits = limits
        self._rows: OrderedDict[bytes, DecodeArrays] = OrderedDict()
        self._bytes = 0
        self._met: OrderedDict[bytes, None] = OrderedDict()
        self.files = None if limits.folder is None else PrefixFiles(limits.folder, limits.disk_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of the states in memory."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._rows)

    def longest(self, found: list[Mark], pool: Pool) -> tuple[int, DecodeArrays | None]:
        """The number of tokens of the longest known prefix, and the row after them."""
        for mark in reversed(found):
            if (row := self._known(mark.digest, pool)) is not None:
                return mark.tokens, row
        return 0, None

    def worth_keeping(self, found: list[Mark], known: int) -> dict[int, bytes]:
        """Which prefixes of a prompt to keep while it is read: digests by their lengths. Remembers all of them."""
        new = [mark for mark in found if mark.tokens > known]
        shared = [mark for mark in new if mark.digest in self._met]
        for mark in found:
            self._met[mark.digest] = None
            self._met.move_to_end(mark.digest)
        while len(self._met) > REMEMBERED:
            self._met.popitem(last=False)
        return {mark.tokens: mark.digest for mark in (*shared[-1:], *new[-1:])}

    def keep(self, digest: bytes, row: DecodeArrays, pool: Pool) -> None:
        """Keeps a row, a state of a batch of one."""
        on_host = _on_host(row)
        self._remember(digest, on_host)
        if self.files is not None:
            self.files.write(digest.hex(), pool.state_of(row), pool.spec.model)

    def close(self) -> None:
        """Waits until files are written."""
        if self.files is not None:
            self.files.close()

    def _known(self, digest: bytes, pool: Pool) -> DecodeArrays | None:
        if digest in self._rows:
            self._rows.move_to_end(digest)
            return self._rows[digest]
        if self.files is None:
            return None
        state = self.files.read(digest.hex(), pool.spec.model, pool.spec.policy)
        if state is None:
            return None
        self._remember(digest, row := _on_host(state.arrays))
        return row

    def _remember(self, digest: bytes, row: DecodeArrays) -> None:
        size = _nbytes(row)
        if digest in self._rows or size > self._limits.memory_bytes:
            return
        self._rows[digest], self._bytes = row, self._bytes + size
        while self._bytes > self._limits.memory_bytes:
            self._bytes -= _nbytes(self._rows.popitem(last=False)[1])


def _on_host(row: DecodeArrays) -> DecodeArrays:
    """In the memory of the host. The key is replaced at each admission, and stays an array of the device."""
    return jax.device_get(row._replace(keys=None))._replace(keys=row.keys)  # type: ignore[arg-type]


def _nbytes(row: DecodeArrays) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(row._replace(keys=None)))  # type: ignore[arg-type]
