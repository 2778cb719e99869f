"""A pool: a fixed number of rows, each the bounded state of one sequence, and what is done to them on the device."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from jaxcompress import __version__
from jaxcompress.checkpoints._written import policy_digest
from jaxcompress.distributed.rules import ShardingRules
from jaxcompress.generation.decode_state import DecodeArrays, DecodeState, init_decode_state
from jaxcompress.generation.sampling import RowKeys, row_keys
from jaxcompress.inputs.scalars import whole
from jaxcompress.models.checks import check_fits, check_mode, warn_of_positions
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.fingerprint import fingerprint
from jaxcompress.models.init_state import Slots
from jaxcompress.models.modes import Mode, ReadCall, calls
from jaxcompress.policies.checks import check_policy
from jaxcompress.policies.own import own_code
from jaxcompress.policies.policy import Policy
from jaxcompress.serving.programs import Written, put_row, read_row, take_row, write_tokens
from jaxcompress.serving.row_sampling import RowSampling, idle_rows
from jaxcompress.state.kv_state import State
from jaxcompress.state.placement import Placement


@dataclass(frozen=True)
class PoolSpec:
    """What a pool is made of.

    Attributes:
      model: a decoder. Several pools may share one.
      policy, slots, placement, dtype: see `jaxcompress.generation.init_decode_state`. They belong to the pool, since
        its arrays and programs depend on them.
      rows: sequences at a time.
      mode: `streaming`, or `chunked` with a selection every `chunk` tokens.
      segment: tokens of a prompt that are read before the other rows go on; in mode chunked rounded to a whole number
        of chunks. A prefix can be kept at multiples of it.
      group: tokens that are written before anything else is done.
      sharding: where the rows go; the model must be there too. All rows are then computed whenever tokens are written,
        since devices have rows of their own.

    Raises:
      ValueError: a number is below 1, the state of the policy cannot be pooled, or the mesh does not divide rows or
        heads.
    """

    model: Decoder
    policy: Policy
    slots: Slots
    rows: int = 8
    placement: Placement | None = None
    dtype: DTypeLike | None = None
    mode: Mode = "streaming"
    chunk: int = 128
    segment: int = 128
    group: int = 8
    sharding: ShardingRules | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "chunk", "segment", "group"):
            object.__setattr__(self, name, whole(getattr(self, name), name, least=1))
        check_policy(self.policy)
        if self.policy.oneshot_only:
            raise ValueError(
                f"a state of policy {self.policy.name} cannot be a row of a pool: the policy selects from a whole "
                "prompt at once, and a pool reads prompts in pieces between the tokens of other rows; give it to "
                "generate with mode oneshot, or take a policy that selects as it reads"
            )
        if self.mode == "oneshot":
            raise ValueError(
                "a pool reads prompts in pieces between the tokens of other rows, and mode oneshot reads a whole "
                "prompt at once; take mode streaming or chunked"
            )
        check_mode(self.policy, self.mode)
        by = 1 if self.mode == "streaming" else self.chunk
        object.__setattr__(self, "segment", max(self.segment // by, 1) * by)
        if self.sharding is not None:
            self.sharding.check(self.model.config, batch=self.rows)

    @property
    def one(self) -> ShardingRules | None:
        """Where the state of one sequence goes."""
        return None if self.sharding is None else self.sharding.one_row

    def calls(self, tokens: int, start: int = 0) -> list[ReadCall]:
        """The calls that read a prompt of so many tokens from `start` on."""
        return calls(self.mode, tokens, chunk=self.chunk, segment=self.segment, start=start)

    def check_request(self, prompt: int, written: int) -> None:
        """Warns as `generate` does of positions; raises ValueError if a policy that cannot make room has none."""
        warn_of_positions(self.model.config, self.policy, self.placement, prompt + written)
        self._check_fits(prompt, written)

    def room(self, prompt: int, most: int) -> int:
        """How many tokens can be written after a prompt, up to `most`; 0 if a policy that cannot make room has none."""

        def over(written: int) -> bool:
            try:
                self._check_fits(prompt, written)
            except ValueError:
                return True
            return False

        return most if self.policy.forgets else bisect_left(range(1, most + 1), True, key=over)

    def _check_fits(self, prompt: int, written: int) -> None:
        check_fits(self.model.config, self.policy, self._shapes, prompt + written, prompt=prompt)

    @cached_property
    def _shapes(self) -> State:
        """A state of one sequence, without its arrays."""
        return jax.eval_shape(lambda: self.fresh().kv)

    def fresh(self, rows: int | None = None) -> DecodeState:
        """The state of so many rows, or of one sequence, before any token is read."""
        return init_decode_state(
            self.model, self.policy, self.slots, batch=rows or 1, dtype=self.dtype, placement=self.placement,
            sharding=self.one if rows is None else self.sharding,
        )  # fmt: skip

    def digest(self) -> bytes:
        """32 bytes that stand for everything that a row depends on beside the tokens that it read: the model and the
        type of its weights, the policy with its weights and code, the shape of the rows, how they are read."""
        facts = dict(
            version=__version__, model=fingerprint(self.model), config=repr(self.model.config),
            weights=str(self.model.dtype), policy=policy_digest(self.policy), code=own_code(self.policy).hex(),
            slots=np.asarray(self.slots).tolist(), placement=self.placement, dtype=str(self._shapes[0].keys.dtype),
            mode=self.mode, chunk=self.chunk if self.mode == "chunked" else 1, segment=self.segment,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


class Pool:
    """The rows of a pool on the device. Not safe for several threads.

    Attributes:
      spec: what it is made of.
      widths: numbers of rows that a call of `write` computes: 1, 4, 16, ... and all rows; over several devices only all
        rows. Few, since each is a program.
      sampling: the settings of the rows; a row with no token left is idle.
    """

    def __init__(self, spec: PoolSpec) -> None:
        self.spec = spec
        fewer = () if spec.sharding else (4**n for n in range(16) if 4**n < spec.rows)
        self.widths = (*fewer, spec.rows)
        self.sampling = idle_rows(spec.rows)
        self._one = spec.fresh()
        self._arrays = spec.fresh(spec.rows).arrays

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._arrays) if hasattr(leaf, "nbytes"))

    def admit(self, row: int, keys: RowKeys, known: DecodeArrays | None = None) -> None:
        """Makes a row fresh, or what is known of a prefix.

        Args:
          keys: [1], of the row.
        """
        one = self._one.arrays if known is None else known
        if self.spec.one is not None:  # a prefix may come from a file
            one = self.spec.one.put(one)
        self._arrays = put_row(self._arrays, np.int32(row), one, keys, self.spec.sharding)

    def read(self, row: int, tokens: np.ndarray, call: ReadCall) -> bool:
        """Reads the tokens of a call into a row; returns whether its logits are finite."""
        padded, valid = np.zeros((1, call.width), np.int32), np.zeros((1, call.width), bool)
        here = tokens[call.start : call.stop]
        padded[0, : len(here)], valid[0, : len(here)] = here, True
        self._arrays, broken = read_row(
            self.spec.model, self._arrays, np.int32(row), padded, valid, self.spec.policy,
            chunk=call.chunk, placement=self.spec.placement, sharding=self.spec.sharding,
        )  # fmt: skip
        return int(broken[0]) < 0

    def write(self, rows: list[int]) -> Written:
        """Writes up to `group` tokens with these rows; [W, N] arrays on the host, a line for each of them."""
        width = next(width for width in self.widths if width >= len(rows))
        index, settings = None, self.sampling
        lines = rows
        if width < self.spec.rows:
            idle = [row for row in range(self.spec.rows) if row not in rows]
            index = np.array([*rows, *idle[: width - len(rows)]], np.int32)
            lines = list(range(len(rows)))
            settings = RowSampling(*(x[index] for x in self.sampling))
            settings.left[len(rows) :] = 0
        else:
            settings = settings._replace(left=np.where(np.isin(np.arange(self.spec.rows), rows), settings.left, 0))
        self._arrays, written = write_tokens(
            self.spec.model, self._arrays, index, settings, self.spec.policy,
            group=self.spec.group, placement=self.spec.placement, sharding=self.spec.sharding,
        )  # fmt: skip
        return jax.tree.map(lambda x: np.asarray(x)[lines], written)

    def take(self, row: int) -> DecodeArrays:
        """A copy of a row."""
        return take_row(self._arrays, np.int32(row), self.spec.one)

    def held(self, row: int, tokens: int) -> Float[np.ndarray, " T"]:
        """Of each of the first tokens of a row, the share of layers and heads that hold it."""
        found = [np.asarray(part.positions[:, row]) for part in self._arrays.kv]
        places = np.concatenate([x.reshape(-1) for x in found])
        heads = self.spec.model.config.num_kv_heads  # in a pool a token has a slot for each head that holds it
        of = lambda part: heads if part.owner is not None else 1
        sets = sum(x.shape[0] * x.shape[1] * of(part) for x, part in zip(found, self._arrays.kv, strict=True))
        return np.bincount(places[places >= 0], minlength=tokens)[:tokens] / sets

    def state_of(self, one: DecodeArrays) -> DecodeState:
        """A row as a state of its own."""
        return replace(self._one, **one._asdict())

    def reset(self) -> None:
        """New arrays, after a call that failed and took the old ones with it."""
        self._arrays = self.spec.fresh(self.spec.rows).arrays
        self.sampling = idle_rows(self.spec.rows)

    def warm_up(self) -> None:
        """Compiles every program of the pool. It must be idle."""
        self.admit(0, row_keys([0]))
        self.admit(0, row_keys([0]), self.take(0))
        longest = self.spec.segment
        seen: set[tuple[int, int]] = set()
        for tokens in range(1, longest + 1):
            (call,) = self.spec.calls(tokens)
            if (call.width, call.chunk) not in seen:
                seen.add((call.width, call.chunk))
                self.read(0, np.zeros(tokens, np.int32), call)
        for width in self.widths:
            self.write(list(range(width)))  # every row is idle
        self.admit(0, row_keys([0]))
