"""Reading prompts of any length and writing on, in a fixed number of slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import index
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcompress.generation.sampling import Sampler, remember, row_keys
from jaxcompress.models.bounded import (
    Mode,
    Slots,
    calls,
    check_fits,
    check_mode,
    check_policy,
    init_state,
    last_hidden,
    padded,
    read,
)
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.base import Placement, Policy
from jaxcompress.state import State, runs
from jaxcompress.token_ids import TokenIds, prompt_ids, token_ids

LOOK_AHEAD = 2
"""Segments that are given to the device before the first of them is known to be read."""

WRITE_AT_MOST = 512
"""Room for tokens to be written is made in few sizes up to this, and in multiples of it."""


class Rows(NamedTuple):
    """The arrays of a `Progress`: what changes, and what jitted functions consume."""

    state: State
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    keys: Key[Array, " B"]
    done: Bool[Array, " B"]
    broken: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """Where B sequences stand between two tokens; everything needed to go on.

    A progress can be used once: `prefill`, `read_on`, `write` and `continue_` take over its memory (they donate it, so
    that there is never a second state) and give back a new one. For two things from one point, copy it first:

        context = prefill(model, [text], start(model, policy, slots), policy)
        for question in questions:
            asked = prefill(model, [question], context.copy(), policy)
            answer, _ = write(model, asked, policy, 64)

    Attributes:
      state: the bounded state after the last token.
      logits: [B, V] float32, for the next token.
      seen: [B, V] bool, tokens that prompt or output contain (for the repetition penalty).
      keys: [B] random keys, one per row, so that a row's tokens do not depend on its neighbours.
      done: [B] bool, rows whose newest token is a stop token. Nothing more is written to them until they have read
        something: a conversation goes on with `prefill`.
      broken: [B] int32, position after which logits were first not finite, -1 while they are. There is no way back:
        the state holds what is no number, and whatever would go on from it raises FloatingPointError.
      policy: what the state was made for; it has to be the same in every call.
      placement: where the tokens in the state stand for RoPE, None where the policy puts them; settled by the first
        call that reads (static).
    """

    state: State
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    keys: Key[Array, " B"]
    done: Bool[Array, " B"]
    broken: Int[Array, " B"]
    policy: Policy
    placement: Placement | None = field(default=None, metadata={"static": True})

    @property
    def rows(self) -> Rows:
        """The arrays."""
        return Rows(self.state, self.logits, self.seen, self.keys, self.done, self.broken)

    def copy(self) -> Progress:
        """The same in memory of its own: each of the two can be used."""
        check_unused(self)
        return replace(self, **jax.tree.map(jnp.copy, self.rows)._asdict())


class Settings(NamedTuple):
    """How tokens are chosen, and where to stop; hashable.

    Attributes:
      sampler: greedy by default.
      stop: token ids that end a row.
    """

    sampler: Sampler = Sampler(temperature=0.0)
    stop: tuple[int, ...] = ()


GREEDY = Settings()


def start(
    model: Decoder, policy: Policy, slots: Slots, *, batch: int = 1, seeds: Sequence[int] | int = 0, dtype: Any = None
) -> Progress:
    """B sequences of which nothing has been read yet.

    Args:
      seeds: one per row, or one from which every row's is derived.
      dtype: of keys and values, one of `jaxcompress.storage.DTYPES`; the model's by default. `int8`, `float8_e4m3fn`
        and `int4` store each vector as small codes with a scale of its own.

    Raises:
      ValueError: something that is no decoder or no policy, see `jaxcompress.init_state`, or not one seed for each row.
    """
    check_decoder(model)
    check_policy(policy)
    batch = check_count(batch, "batch")
    several = isinstance(seeds, Sequence | np.ndarray)
    rows = list(seeds) if several else [check_seed(seeds) + row for row in range(batch)]
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} seeds were given for a batch of {batch}")
    vocabulary = model.config.vocab_size
    return Progress(
        state=init_state(model.config, policy, slots, batch=batch, dtype=dtype or model.embedding[...].dtype),
        logits=jnp.zeros((batch, vocabulary), jnp.float32),
        seen=jnp.zeros((batch, vocabulary), bool),
        keys=row_keys([check_seed(seed) for seed in rows]),
        done=jnp.zeros(batch, bool),
        broken=jnp.full(batch, -1, jnp.int32),
        policy=policy,
    )


def prefill(
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    progress: Progress,
    policy: Policy,
    *,
    mode: Mode = "streaming",
    chunk: int = 128,
    segment: int = 512,
    placement: Placement | None = None,
) -> Progress:
    """Reads a batch of prompts of different lengths, in segments: a prompt may be longer than memory.

    What is read may be the first prompt or the next turn of a conversation: a row that had ended is written to again.

    Args:
      prompts: one sequence of token ids for each row.
      progress: where the rows stand; consumed: give `progress.copy()` to go on from here once more.
      policy: the one that `progress` was made for.
      mode: `streaming`, as in decoding; `chunked`, a selection every `chunk` tokens; `oneshot`, one selection from each
        whole prompt, which is read in a single segment.
      segment: tokens per call. A shorter call is filled up to one of few widths, so that a new length does not compile.
      placement: where tokens stand for RoPE; as the policy was published by default. Settled by the first call: later
        ones need not give it, and cannot change it.

    Raises:
      ValueError: what is no prompt (see `jaxcompress.token_ids`), a prompt that `full` cannot hold, another policy or
        placement than before, or a progress that was used before.
      FloatingPointError: logits are not finite.
    """
    progress = taken_up(model, progress, policy, placement)
    rows = prompt_ids(prompts, model.config.vocab_size)
    batch = progress.done.shape[0]
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} prompts were given for a batch of {batch}")
    longest = max(map(len, rows))
    check_mode(policy, mode)
    plan = calls(mode, longest, chunk=chunk, segment=segment)
    check_room(model, policy, progress, longest, prompt=longest)
    reading = _reading(model, (([row[at:stop] for row in rows], width, by) for at, stop, width, by in plan), progress)
    (progress,) = deque(reading, maxlen=1)
    return progress


def write(
    model: Decoder,
    progress: Progress,
    policy: Policy,
    steps: int,
    settings: Settings = GREEDY,
    *,
    placement: Placement | None = None,
) -> tuple[Int[Array, "B steps"], Progress]:
    """Generates up to `steps` tokens in one jitted loop; ends early when every row has stopped.

    Returns the tokens, -1 after a row's stop token (which is included), and where the sequences stand then. Calling it
    twice for n tokens gives the same tokens as once for 2n. A row that has stopped stays so until it reads something.

    Args:
      progress: consumed (see `Progress`).
      policy, placement: those that `progress` has; placement need not be given.

    Raises:
      ValueError: `full` has no room for so many tokens, another policy or placement than before, a progress that was
        used before, or settings that are none.
      FloatingPointError: logits are not finite.
    """
    progress = taken_up(model, progress, policy, placement)
    steps = check_count(steps, "steps")
    check_settings(model, settings)
    check_room(model, policy, progress, steps)
    tokens, progress = _written(model, progress, steps, steps, settings)
    raise_if_broken(progress)
    return tokens if tokens.shape[1] == steps else tokens[:, :steps], progress


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    policy: Policy,
    slots: Slots,
    *,
    steps: int,
    settings: Settings = GREEDY,
    seeds: Sequence[int] | int = 0,
    burst: int | None = None,
    dtype: Any = None,
    **reading: Any,
) -> Iterator[Int[np.ndarray, "B burst"]]:
    """Reads prompts and writes on; yields tokens in bursts, so that text can be shown as it comes.

    What was given is checked at once; the model runs when the first burst is asked for.

    Args:
      steps: tokens to write.
      settings: how tokens are chosen and where to stop.
      burst: tokens per yield, all by default. The next burst is already being computed while one is consumed.
      dtype: of the state (see `start`).
      reading: how prompts are read: `mode`, `chunk`, `segment`, `placement` (see `prefill`).

    Raises:
      TypeError: an argument of another name.
      ValueError: as `start`, `prefill` and `write`.
      FloatingPointError: logits are not finite.

    Example:
      >>> for tokens in generate(model, [prompt], tova(), slots=128, steps=200, burst=8):
      ...     print(tokenizer.decode(tokens[0][tokens[0] >= 0]), end="", flush=True)
    """
    check_decoder(model)
    _check_names(reading)
    rows = prompt_ids(prompts, model.config.vocab_size)
    steps = check_count(steps, "steps")
    burst = steps if burst is None else check_count(burst, "burst")
    check_settings(model, settings)
    longest, mode = max(map(len, rows)), reading.get("mode", "streaming")
    check_mode(policy, mode)
    check_placement(reading.get("placement"))
    calls(mode, longest, chunk=reading.get("chunk", 1), segment=reading.get("segment", 1))
    progress = start(model, policy, slots, batch=len(rows), seeds=seeds, dtype=dtype)
    check_room(model, policy, progress, longest + steps, prompt=longest)

    def run(progress: Progress) -> Iterator[np.ndarray]:
        progress = prefill(model, rows, progress, policy, **reading)
        yield from continue_(model, progress, policy, steps=steps, settings=settings, burst=burst)

    return run(progress)


def continue_(
    model: Decoder,
    progress: Progress,
    policy: Policy,
    *,
    steps: int,
    settings: Settings = GREEDY,
    burst: int | None = None,
    placement: Placement | None = None,
) -> Iterator[Int[np.ndarray, "B burst"]]:
    """The writing half of `generate`.

    Args:
      progress: consumed when the first burst is asked for (see `Progress`); where the sequences stand in the end is not
        told, `write` tells it.

    Raises:
      ValueError, FloatingPointError: as `write`.
    """
    progress = taken_up(model, progress, policy, placement)
    steps = check_count(steps, "steps")
    size = min(steps if burst is None else check_count(burst, "burst"), steps)
    check_settings(model, settings)
    check_room(model, policy, progress, steps)
    return _bursts(model, progress, steps, size, settings)


def _bursts(
    model: Decoder, progress: Progress, steps: int, size: int, settings: Settings
) -> Iterator[Int[np.ndarray, "B burst"]]:
    check_unused(progress)
    pending: list[tuple[Array, int]] = []
    for at in range(0, steps, size):
        now = min(size, steps - at)
        tokens, progress = _written(model, progress, now, size, settings)
        pending.append((tokens, now))
        if len(pending) > 1:
            done = _first(pending)
            yield done
            if np.isin(done[:, -1], [-1, *settings.stop]).all():
                return raise_if_broken(progress)
    while pending:
        yield _first(pending)
    raise_if_broken(progress)


def _first(pending: list[tuple[Array, int]]) -> np.ndarray:
    tokens, now = pending.pop(0)
    return np.asarray(tokens)[:, :now]


def read_on(
    model: Decoder,
    pieces: Iterable[np.ndarray],
    progress: Progress,
    policy: Policy,
    *,
    chunk: int = 1,
    segment: int = 512,
    placement: Placement | None = None,
) -> Iterator[tuple[int, Progress]]:
    """Reads one unbounded sequence of tokens (B = 1) as it arrives; yields how many have been read, and the progress.

    The progress yielded is consumed by the next step: use it before going on (a copy of it, to keep it), or after the
    last. Segments are given to the device `LOOK_AHEAD` at a time, so that what is yielded may still be being computed.

    Args:
      pieces: token ids [T] each; some may be empty.
      progress: consumed (see `Progress`).
      policy, placement: see `prefill`.
      chunk: tokens between two selections; 1 is streaming.
      segment: tokens per call; made a whole number of chunks.

    Raises:
      ValueError: there was no token at all, and see `prefill`.
      FloatingPointError: logits are not finite.
    """
    progress = taken_up(model, progress, policy, placement)
    if progress.done.shape[0] != 1:
        raise ValueError(f"read_on reads one sequence, the progress has {progress.done.shape[0]} rows")
    mode: Mode = "streaming" if chunk == 1 else "chunked"
    check_mode(policy, mode)
    calls(mode, 1, chunk=chunk, segment=segment)
    return _read_on(model, pieces, progress, policy, mode, chunk, max(segment // chunk, 1) * chunk)


def _read_on(
    model: Decoder, pieces: Iterable[Any], progress: Progress, policy: Policy, mode: Mode, chunk: int, segment: int
) -> Iterator[tuple[int, Progress]]:
    check_unused(progress)
    counts = deque[int]()
    total, state = 0, progress.state
    held = None if policy.forgets else _held(model, progress)

    def segments() -> Iterator[tuple[list[TokenIds], int, int]]:
        nonlocal total
        rest = np.zeros(0, np.int32)
        for number, piece in enumerate(pieces):
            rest = np.concatenate([rest, token_ids(piece, model.config.vocab_size, f"piece {number}")])
            while len(rest) >= segment:
                yield call(rest[:segment])
                rest = rest[segment:]
        if len(rest):
            yield call(rest)
        elif not total:
            raise ValueError("the text is empty; there is nothing to read")

    def call(ids: TokenIds) -> tuple[list[TokenIds], int, int]:
        nonlocal total
        total += len(ids)
        counts.append(total)
        check_fits(model.config, policy, state, total, held=held)  # looks at shapes alone
        ((_, _, width, by),) = calls(mode, len(ids), chunk=chunk, segment=segment)
        return [ids], width, by

    for reached in _reading(model, segments(), progress):
        yield counts.popleft(), reached


def _reading(
    model: Decoder, inputs: Iterable[tuple[Sequence[TokenIds], int, int]], progress: Progress
) -> Iterator[Progress]:
    """Reads segments one after the other; yields the progress after each, of which the next call takes the memory.

    Args:
      inputs: of each call the ids of every row, the width to fill them up to, and tokens between two selections.

    Raises:
      FloatingPointError: logits are not finite; raised before the last progress is yielded, or up to `LOOK_AHEAD`
        segments later.
    """
    ahead = deque[Array]()
    for ids, width, chunk in inputs:
        tokens, valid = np.zeros((len(ids), width), np.int32), np.zeros((len(ids), width), bool)
        for row, mine in enumerate(ids):
            tokens[row, : len(mine)], valid[row, : len(mine)] = mine, True
        check_unused(progress)
        rows, broken = _read(
            model, tokens, valid, progress.rows, policy=progress.policy, chunk=chunk, placement=progress.placement
        )
        progress = replace(progress, **rows._asdict())
        ahead.append(broken)
        if len(ahead) > LOOK_AHEAD:
            _raise_if(ahead.popleft())
        yield progress
    for broken in ahead:
        _raise_if(broken)


def check_room(model: Decoder, policy: Policy, progress: Progress, tokens: int, *, prompt: int | None = None) -> None:
    """Raises ValueError if a policy that cannot make room would overflow.

    Args:
      tokens: that will be read or written.
      prompt: how many of them a fresh state reads at once.
    """
    if not policy.forgets:
        held = _held(model, progress)
        check_fits(model.config, policy, progress.state, tokens, prompt=prompt, held=held)


def _held(model: Decoder, progress: Progress) -> list[int] | None:
    """How many tokens each layer holds, in the row that holds most; None of a fresh state."""
    if not int(progress.state[0].seen.max()):
        return None
    pool = lambda part: 1 if part.owner is None else model.config.num_kv_heads
    most = [
        [-(-part.occupancy().max(axis=(1, 2)) // pool(part)) for part in parts] for _, parts in runs(progress.state)
    ]
    return [int(n) for run in most for n in np.max(run, axis=0)]


def taken_up(model: Decoder, progress: Progress, policy: Policy, placement: Placement | None) -> Progress:
    """The gate of every call that goes on from a progress: what it was made with belongs to it.

    Raises:
      ValueError: something that is no decoder, progress or policy; another model or policy than the progress was made
        for; another placement than that of the tokens it has read; or a progress that was used before.
      FloatingPointError: its logits are not finite.
    """
    check_decoder(model)
    if not isinstance(progress, Progress):
        raise ValueError(f"a Progress is expected, as start and prefill return it, not {_told(progress)}")
    check_policy(policy)
    check_unused(progress)
    if policy != progress.policy:
        mine = progress.policy.name
        other = "for another one of this name" if policy.name == mine else policy.name
        raise ValueError(
            f"the progress was made for policy {mine}, not {other}: what it holds was chosen by that policy, with its "
            "numbers; go on with progress.policy, or read anew from start(model, policy, slots)"
        )
    if progress.logits.shape[1] != model.config.vocab_size:
        raise ValueError(
            f"the progress was made for another model: it has {progress.logits.shape[1]} tokens to choose from, this "
            f"model {model.config.vocab_size}"
        )
    raise_if_broken(progress)
    check_placement(placement)
    before = progress.placement
    if placement in (None, before):
        return progress
    published = {mine.placement for mine in policy.layers or (policy,)}
    if before is None and published == {placement}:
        return progress
    if int(progress.state[0].seen.max()):
        told = before or " and ".join(sorted(published))
        raise ValueError(
            f"the tokens in the state stand at {told} positions, not {placement}: their keys are kept for that; leave "
            f"placement out, or read anew with placement={placement!r}"
        )
    return replace(progress, placement=placement)


def check_unused(progress: Progress) -> None:
    """Raises ValueError if the memory of a progress was taken over."""
    if any(x.is_deleted() for x in jax.tree.leaves(progress.rows) if isinstance(x, jax.Array)):
        raise ValueError(
            "this progress was used before: prefill, read_on, write and continue_ take over its memory and return a "
            "new one. Go on with that, or give progress.copy() where the same point is needed again"
        )


def check_decoder(model: Any) -> None:
    """Raises ValueError if something is no decoder; says where it has one."""
    if isinstance(model, Decoder):
        return
    hint = next((f"; give its .{name}" for name in ("model", "decoder") if hasattr(model, name)), "")
    raise ValueError(f"the first argument must be a Decoder, not {_told(model)}{hint}")


def check_placement(placement: Any) -> None:
    """Raises ValueError if tokens cannot stand in a way of that name."""
    if placement is not None and placement not in get_args(Placement):
        raise ValueError(f"unknown placement {placement!r}; known: {', '.join(get_args(Placement))}")


def check_settings(model: Decoder, settings: Any) -> None:
    """Raises ValueError if settings are none, or end at something that is no token id."""
    if not isinstance(settings, Settings):
        raise ValueError(f"settings must be Settings(sampler=..., stop=...), not {_told(settings)}")
    if not callable(settings.sampler):
        raise ValueError(f"Settings.sampler must be a Sampler, not {_told(settings.sampler)}")
    if not isinstance(settings.stop, tuple):
        raise ValueError(
            f"Settings.stop must be a tuple of token ids, such as tuple(tokenizer.eos_ids), not "
            f"{_told(settings.stop)}; text to stop at belongs to StopStrings"
        )
    token_ids(list(settings.stop), model.config.vocab_size, "Settings.stop")


def check_count(given: Any, what: str) -> int:
    """A number of things, at least 1.

    Raises:
      ValueError: anything else.
    """
    try:
        count = 0 if isinstance(given, bool) else index(given)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{what} must be a whole number, at least 1, not {_told(given)}")
    return count


def check_seed(given: Any) -> int:
    """A whole number.

    Raises:
      ValueError: anything else.
    """
    try:
        return index(given)
    except TypeError:
        raise ValueError(f"seeds must be a whole number, or one for each row, not {_told(given)}") from None


def _check_names(reading: dict[str, Any]) -> None:
    known = ("mode", "chunk", "segment", "placement")
    for name in reading:
        if name in Settings._fields:
            raise TypeError(f"generate has no argument {name!r}; it belongs to settings: settings=Settings({name}=...)")
        if name in {field.name for field in fields(Sampler)}:
            raise TypeError(
                f"generate has no argument {name!r}; it belongs to settings: settings=Settings(Sampler({name}=...))"
            )
        if name not in known:
            raise TypeError(f"generate has no argument {name!r}; how prompts are read: {', '.join(known)}")


def _told(given: Any) -> str:
    """Something in a message, with its kind where that is not plain."""
    if isinstance(given, str | int | float | bool | None):
        return repr(given)
    return f"{type(given).__name__} {given!r:.40}" if isinstance(given, list | tuple) else type(given).__name__


@partial(jax.jit, static_argnames=("chunk", "placement"), donate_argnames="rows")
def _read(
    model: Decoder,
    tokens: Array,
    valid: Array,
    rows: Rows,
    *,
    policy: Policy,
    chunk: int,
    placement: Placement | None,
) -> tuple[Rows, Array]:
    """The rows after these tokens, and the broken positions again, which the next call does not consume."""
    done = read(model, tokens, rows.state, policy, valid=valid, chunk=chunk, placement=placement)
    logits = model.logits(last_hidden(done, valid))[:, 0]
    here = valid.any(axis=1)
    seen = remember(rows.seen, tokens, valid)
    logits = jnp.where(here[:, None], logits, rows.logits)
    broken = first_broken(rows.broken, logits, done.state)
    return Rows(done.state, logits, seen, rows.keys, rows.done & ~here, broken), broken + 0


def _written(model: Decoder, progress: Progress, steps: int, room: int, settings: Settings) -> tuple[Array, Progress]:
    """Up to `steps` tokens, in an array with room for more, and what is left of the progress."""
    tokens, rows = _write(
        model, progress.rows, steps, policy=progress.policy, room=padded(room, WRITE_AT_MOST), settings=settings,
        placement=progress.placement,
    )  # fmt: skip
    return tokens, replace(progress, **rows._asdict())


@partial(jax.jit, static_argnames=("room", "settings", "placement"), donate_argnames="rows")
def _write(
    model: Decoder,
    rows: Rows,
    steps: Int[Array, ""] | int,
    *,
    policy: Policy,
    room: int,
    settings: Settings,
    placement: Placement | None,
) -> tuple[Array, Rows]:
    batch = rows.done.shape[0]
    stop = jnp.array(settings.stop, jnp.int32)

    def body(loop: tuple[Array, Array, Rows]) -> tuple[Array, Array, Rows]:
        step, out, now = loop
        keys = jax.vmap(jax.random.fold_in)(now.keys, now.state[0].seen)
        token = settings.sampler(keys, now.logits, now.seen)
        out = out.at[:, step].set(jnp.where(now.done, -1, token))
        done = read(model, token[:, None], now.state, policy, valid=~now.done[:, None], placement=placement)
        logits = model.logits(done.hidden)[:, 0]
        seen = remember(now.seen, token[:, None], ~now.done[:, None])
        stopped = now.done | (token[:, None] == stop).any(axis=1)
        broken = first_broken(now.broken, logits, done.state)
        return step + 1, out, Rows(done.state, logits, seen, now.keys, stopped, broken)

    def going(loop: tuple[Array, Array, Rows]) -> Array:
        step, _, now = loop
        return (step < steps) & ~now.done.all()

    out = jnp.full((batch, room), -1, jnp.int32)
    _, out, rows = jax.lax.while_loop(going, body, (jnp.int32(0), out, rows))
    return out, rows


def first_broken(broken: Array, logits: Array, state: State) -> Array:
    """`Progress.broken` after new logits."""
    finite = jnp.isfinite(logits).all(axis=-1)
    return jnp.where((broken < 0) & ~finite, state[0].seen - 1, broken)


def raise_if_broken(progress: Progress) -> None:
    """Raises FloatingPointError if logits were not finite."""
    _raise_if(progress.broken)


def _raise_if(broken: Array) -> None:
    positions = np.asarray(broken)
    if (positions >= 0).any():
        row = int((positions >= 0).argmax())
        raise FloatingPointError(f"non-finite logits, first in row {row} by position {positions[row]}")
