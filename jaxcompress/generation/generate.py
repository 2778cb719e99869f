"""Text generation from prompts of any length in a fixed number of slots: `generate`, `prefill` and `decode`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from jaxcompress.distributed.processes import on_host
from jaxcompress.distributed.rules import ShardingRules
from jaxcompress.generation.config import GREEDY, GenerationConfig, check_config
from jaxcompress.generation.decode_state import (
    DecodeArrays,
    DecodeState,
    check_begun,
    check_room,
    check_unused,
    check_usable,
    first_broken,
    init_decode_state,
    most_held,
    raise_if_any,
    raise_if_broken,
)
from jaxcompress.generation.sampling import remember
from jaxcompress.inputs.scalars import whole
from jaxcompress.inputs.token_ids import TokenIds, prompt_ids, token_ids
from jaxcompress.models.checks import check_fits, check_mode, warn_of_positions
from jaxcompress.models.decoder import Decoder, check_decoder, last_hidden, read
from jaxcompress.models.init_state import Slots
from jaxcompress.models.modes import Mode, ReadCall, calls, padded
from jaxcompress.policies.policy import Policy
from jaxcompress.state.placement import Placement

LOOK_AHEAD = 2
"""The number of segments that may be queued on the device before the result of the first one is checked."""

LARGEST_BUFFER = 512
"""The output array has one of a few lengths up to this, and a multiple of it beyond, so that few programs are
compiled."""


class ReadOptions(TypedDict, total=False):
    """How prompts are read; see `prefill` and `init_decode_state`."""

    mode: Mode
    chunk: int
    segment: int
    placement: Placement | None
    dtype: DTypeLike
    sharding: ShardingRules | None


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    policy: Policy,
    slots: Slots,
    *,
    max_new_tokens: int,
    config: GenerationConfig = GREEDY,
    seeds: Sequence[int] | int = 0,
    stream_every: int | None = None,
    **options: Unpack[ReadOptions],
) -> Iterator[Int[np.ndarray, "B stream_every"]]:
    """Reads prompts and generates tokens; yields them in groups, so that text can be shown early.

    Arguments are checked at the call; the model first runs when the first group is requested.

    Args:
      prompts: one sequence of token ids for each row.
      slots: capacity of the state, see `jaxcompress.init_state`.
      config: the sampling method and the stop tokens.
      seeds: one per row, or one from which the seeds of all rows are derived.
      stream_every: tokens per yield, all by default. The next group is computed while one is consumed.
      options: `mode`, `chunk`, `segment` (see `prefill`); `placement`, `dtype`, `sharding` (see
        `init_decode_state`).

    Raises:
      TypeError: an argument has an unknown name.
      ValueError: as for `init_decode_state`, `prefill` and `decode`.
      FloatingPointError: logits are not finite.

    Examples:
      >>> text = TextStream(tokenizer, after=prompt)
      >>> for tokens in generate(model, [prompt], TOVA(), slots=128, max_new_tokens=200, stream_every=8):
      ...     print(text.push(tokens[0]), end="", flush=True)
      >>> print(text.finish())
    """
    check_decoder(model)
    _check_names(options)
    rows = prompt_ids(prompts, model.config.vocab_size)
    max_new_tokens = whole(max_new_tokens, "max_new_tokens", least=1)
    every = max_new_tokens if stream_every is None else whole(stream_every, "stream_every", least=1)
    check_config(model, config)
    reading: Any = {name: given for name, given in options.items() if name in ("mode", "chunk", "segment")}
    longest = max(map(len, rows))
    check_reading(policy, options, longest)
    state = init_decode_state(
        model, policy, slots, batch=len(rows), seeds=seeds,
        dtype=options.get("dtype"), placement=options.get("placement"), sharding=options.get("sharding"),
    )  # fmt: skip
    check_room(model, state, longest + max_new_tokens, prompt=longest)

    def run() -> Iterator[np.ndarray]:
        read = prefill(model, rows, state, **reading)
        yield from decode_stream(model, read, max_new_tokens, config, stream_every=every)

    return run()


def _check_names(options: Any) -> None:
    known = ReadOptions.__annotations__
    for name in options:
        if name in {field.name for field in fields(GenerationConfig)}:
            raise TypeError(
                f"generate has no argument {name!r}; it belongs to config: config=GenerationConfig({name}=...)"
            )
        if name not in known:
            raise TypeError(f"generate has no argument {name!r}; how prompts are read: {', '.join(known)}")


def check_reading(policy: Policy, options: ReadOptions, tokens: int = 1) -> None:
    """Raises ValueError if a text of so many tokens cannot be read as `mode`, `chunk` and `segment` say."""
    mode = options.get("mode", "streaming")
    check_mode(policy, mode)
    calls(mode, tokens, chunk=options.get("chunk", 1), segment=options.get("segment", 1))


def prefill(
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    state: DecodeState,
    *,
    mode: Mode = "streaming",
    chunk: int = 128,
    segment: int = 512,
) -> DecodeState:
    """Reads a batch of prompts of different lengths, in segments: a prompt may be longer than memory.

    The prompts may be the first ones or the next turn of a conversation. A row that had ended becomes active again.

    Args:
      prompts: one sequence of token ids for each row.
      state: donated (see `DecodeState`); pass `state.copy()` to read other prompts from the same state too.
      mode: `streaming`, as in decoding; `chunked`, a selection every `chunk` tokens; `oneshot`, one selection from each
        whole prompt, which is read in a single segment.
      segment: tokens per call. A shorter call is padded to one of a few widths, so that a new length needs no
        compilation.

    Raises:
      ValueError: a prompt is invalid (see `jaxcompress.inputs.token_ids`) or too long for `full`, or the state was used
        before or belongs to another model.
      FloatingPointError: logits are not finite.
    """
    return deque(prefill_calls(model, prompts, state, mode=mode, chunk=chunk, segment=segment), maxlen=1).pop()


def prefill_calls(
    model: Decoder,
    prompts: Sequence[Sequence[int] | np.ndarray],
    state: DecodeState,
    *,
    mode: Mode = "streaming",
    chunk: int = 128,
    segment: int = 512,
) -> Iterator[DecodeState]:
    """As `prefill`, one call after another; yields the state after each.

    Arguments are checked at once. The next step donates the yielded state, and checks the states before it: whoever
    keeps each state has a usable one, or one that is known to be broken, wherever the reading ends.
    """
    check_usable(model, state)
    rows = prompt_ids(prompts, model.config.vocab_size)
    batch = state.done.shape[0]
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} prompts were given for a batch of {batch}")
    longest = max(map(len, rows))
    check_mode(state.policy, mode)
    plan = calls(mode, longest, chunk=chunk, segment=segment)
    check_room(model, state, longest, prompt=longest)
    _warn_ahead(model, state, longest)
    return _prefill_calls(model, rows, state, plan)


def _prefill_calls(
    model: Decoder, rows: Sequence[np.ndarray], state: DecodeState, plan: Sequence[ReadCall]
) -> Iterator[DecodeState]:
    check_unused(state)
    ahead = deque[Array]()
    for at, stop, width, by in plan:
        tokens, valid = _filled([row[at:stop] for row in rows], width)
        arrays, broken = _read_segment(
            model, tokens, valid, state.arrays, state.policy, chunk=by, placement=state.placement
        )
        state = replace(state, **arrays._asdict())
        yield state
        _check_ahead(ahead, broken)
    _check_ahead(ahead)


def prefill_stream(
    model: Decoder,
    pieces: Iterable[np.ndarray],
    state: DecodeState,
    *,
    chunk: int = 1,
    segment: int = 512,
) -> Iterator[tuple[int, DecodeState]]:
    """Reads one unbounded sequence of tokens (B = 1) as it arrives; yields the number of tokens read, and the state.

    The next step donates the yielded state: use or copy it before the next iteration. The last state stays usable. Up
    to `LOOK_AHEAD` segments are queued on the device, so a yielded state may still be computing.

    Args:
      pieces: token ids [T] each; some may be empty.
      state: donated (see `DecodeState`).
      chunk: tokens between two selections; 1 is streaming.
      segment: tokens per call, rounded to a whole number of chunks.

    Raises:
      ValueError: there was no token; other cases as for `prefill`.
      FloatingPointError: logits are not finite.
    """
    check_usable(model, state)
    if state.done.shape[0] != 1:
        raise ValueError(f"prefill_stream reads one sequence, the state has {state.done.shape[0]} rows")
    mode: Mode = "streaming" if chunk == 1 else "chunked"
    check_mode(state.policy, mode)
    calls(mode, 1, chunk=chunk, segment=segment)
    return _prefill_stream(model, pieces, state, mode, chunk, max(segment // chunk, 1) * chunk)


def _prefill_stream(
    model: Decoder, pieces: Iterable[Any], state: DecodeState, mode: Mode, chunk: int, segment: int
) -> Iterator[tuple[int, DecodeState]]:
    check_unused(state)
    total, policy, kv, ahead = 0, state.policy, state.kv, deque[Array]()
    held = None if policy.forgets else most_held(model, state)
    begun = int(kv[0].seen.max())
    for ids in _segments(pieces, model.config.vocab_size, segment):
        total += len(ids)
        check_fits(model.config, policy, kv, total, held=held)  # checks shapes only
        end = begun + total
        warn_of_positions(model.config, policy, state.placement, end, begin=end - len(ids))
        ((_, _, width, by),) = calls(mode, len(ids), chunk=chunk, segment=segment)
        check_unused(state)
        tokens, valid = _filled([ids], width)
        arrays, broken = _read_segment(model, tokens, valid, state.arrays, policy, chunk=by, placement=state.placement)
        state = replace(state, **arrays._asdict())
        _check_ahead(ahead, broken)
        yield total, state
    if not total:
        raise ValueError("the text is empty; there is nothing to read")
    _check_ahead(ahead)


def _segments(pieces: Iterable[Any], vocab_size: int, segment: int) -> Iterator[TokenIds]:
    """The token ids of all pieces in segments of equal length; the last one may be shorter."""
    rest = np.zeros(0, np.int32)
    for number, piece in enumerate(pieces):
        rest = np.concatenate([rest, token_ids(piece, vocab_size, f"piece {number}")])
        while len(rest) >= segment:
            yield rest[:segment]
            rest = rest[segment:]
    if len(rest):
        yield rest


def _warn_ahead(model: Decoder, state: DecodeState, tokens: int) -> None:
    """Warns if so many more tokens leave the positions that the model was trained for."""
    begin = int(state.kv[0].seen.max())
    warn_of_positions(model.config, state.policy, state.placement, begin + tokens, begin=begin)


def _filled(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, width] with padding at the end of each row, and a mask of the real tokens."""
    tokens, valid = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
    return tokens, valid


def _check_ahead(ahead: deque[Array], broken: Array | None = None) -> None:
    """Checks segments that the device has finished; checking the newest one would wait for the device.

    Args:
      ahead: `DecodeState.broken` after each unchecked segment.
      broken: `DecodeState.broken` after the newest segment; None if there are no more segments, so that all are
        checked.

    Raises:
      FloatingPointError: logits are not finite.
    """
    if broken is not None:
        ahead.append(broken)
    while len(ahead) > (0 if broken is None else LOOK_AHEAD):
        raise_if_any(ahead.popleft())


@partial(jax.jit, static_argnames=("chunk", "placement"), donate_argnames="arrays")
def _read_segment(
    model: Decoder,
    tokens: Array,
    valid: Array,
    arrays: DecodeArrays,
    policy: Policy,
    *,
    chunk: int,
    placement: Placement | None,
) -> tuple[DecodeArrays, Array]:
    """The arrays after these tokens, and a second copy of the broken positions, which the next call does not donate."""
    after = read(model, tokens, arrays.kv, policy, valid=valid, chunk=chunk, placement=placement)
    logits = model.logits(last_hidden(after, valid))[:, 0]
    here = valid.any(axis=1)
    appeared = remember(arrays.appeared, tokens, valid)
    logits = jnp.where(here[:, None], logits, arrays.logits)
    broken = first_broken(arrays.broken, logits, after.state)
    return DecodeArrays(after.state, logits, appeared, arrays.keys, arrays.done & ~here, broken), broken + 0


def decode(
    model: Decoder, state: DecodeState, max_new_tokens: int, config: GenerationConfig = GREEDY
) -> tuple[Int[Array, "B max_new_tokens"], DecodeState]:
    """Generates up to `max_new_tokens` tokens in one jitted loop; ends early when every row has stopped.

    Returns the tokens, -1 after a row's stop token (which is included), and the state after them. Two calls for n
    tokens give the same tokens as one call for 2n. A stopped row stays stopped until it reads new tokens.

    Args:
      state: donated (see `DecodeState`).

    Raises:
      ValueError: nothing was read yet, `full` has no room for the tokens, the state was used before or belongs to
        another model, or `config` is no configuration.
      FloatingPointError: logits are not finite.
    """
    check_usable(model, state)
    max_new_tokens = whole(max_new_tokens, "max_new_tokens", least=1)
    check_config(model, config)
    check_begun(state)
    check_room(model, state, max_new_tokens)
    _warn_ahead(model, state, max_new_tokens)
    buffer = padded(max_new_tokens, LARGEST_BUFFER)
    tokens, arrays = _decode_loop(
        model, state.arrays, max_new_tokens, state.policy, buffer=buffer, config=config, placement=state.placement
    )
    state = replace(state, **arrays._asdict())
    raise_if_broken(state)
    return tokens if tokens.shape[1] == max_new_tokens else tokens[:, :max_new_tokens], state


def decode_stream(
    model: Decoder,
    state: DecodeState,
    max_new_tokens: int,
    config: GenerationConfig = GREEDY,
    *,
    stream_every: int | None = None,
) -> DecodeStream:
    """As `decode`, but returns tokens in groups; each next group is computed while one is consumed.

    Args:
      state: donated when the first group is requested (see `DecodeState`); `DecodeStream.state` is the state to
        continue from.
      stream_every: tokens in a group; all by default.

    Raises:
      ValueError, FloatingPointError: as `decode`.
    """
    check_usable(model, state)
    max_new_tokens = whole(max_new_tokens, "max_new_tokens", least=1)
    every = max_new_tokens if stream_every is None else whole(stream_every, "stream_every", least=1)
    check_config(model, config)
    check_begun(state)
    check_room(model, state, max_new_tokens)
    _warn_ahead(model, state, max_new_tokens)
    return DecodeStream(model, state, max_new_tokens, config, min(every, max_new_tokens))


class DecodeStream(Iterator[Int[np.ndarray, "B stream_every"]]):
    """Groups of tokens, [B, stream_every] each; -1 after a row's stop token.

    Attributes:
      state: the state after all computed tokens. Until the stream ends, this is one group ahead of the groups returned,
        since the next group is computed in advance.
    """

    def __init__(
        self, model: Decoder, state: DecodeState, max_new_tokens: int, config: GenerationConfig, stream_every: int
    ) -> None:
        self.state = state
        self._model, self._config = model, config
        self._left, self._every = max_new_tokens, stream_every
        self._buffer = padded(stream_every, LARGEST_BUFFER)
        self._pending = deque[tuple[Array, int]]()

    def __next__(self) -> Int[np.ndarray, "B stream_every"]:
        if not self._left and not self._pending:
            raise_if_broken(self.state)
            raise StopIteration
        while self._left and len(self._pending) < 2:
            n = min(self._every, self._left)
            check_unused(self.state)
            tokens, arrays = _decode_loop(
                self._model, self.state.arrays, n, self.state.policy,
                buffer=self._buffer, config=self._config, placement=self.state.placement,
            )  # fmt: skip
            self.state = replace(self.state, **arrays._asdict())
            self._pending.append((tokens, n))
            self._left -= n
        tokens, n = self._pending.popleft()
        group = on_host(tokens)[:, :n]
        if np.isin(group[:, -1], [-1, *self._config.stop_token_ids]).all():
            self._left = 0
            self._pending.clear()
        return group


@partial(jax.jit, static_argnames=("buffer", "config", "placement"), donate_argnames="arrays")
def _decode_loop(
    model: Decoder,
    arrays: DecodeArrays,
    max_new_tokens: Int[Array, ""] | int,
    policy: Policy,
    *,
    buffer: int,
    config: GenerationConfig,
    placement: Placement | None,
) -> tuple[Array, DecodeArrays]:
    stop = jnp.array(config.stop_token_ids, jnp.int32)

    def body(loop: tuple[Array, Array, DecodeArrays]) -> tuple[Array, Array, DecodeArrays]:
        step, out, now = loop
        keys = jax.vmap(jax.random.fold_in)(now.keys, now.kv[0].seen)
        token = config.sample(keys, now.logits, now.appeared)
        out = out.at[:, step].set(jnp.where(now.done, -1, token))
        after = read(model, token[:, None], now.kv, policy, valid=~now.done[:, None], placement=placement)
        logits = model.logits(after.hidden)[:, 0]
        appeared = remember(now.appeared, token[:, None], ~now.done[:, None])
        done = now.done | (token[:, None] == stop).any(axis=1)
        broken = first_broken(now.broken, logits, after.state)
        return step + 1, out, DecodeArrays(after.state, logits, appeared, now.keys, done, broken)

    def going(loop: tuple[Array, Array, DecodeArrays]) -> Any:
        step, _, now = loop
        return (step < max_new_tokens) & ~now.done.all()

    out = jnp.full((arrays.done.shape[0], buffer), -1, jnp.int32)
    _, out, arrays = jax.lax.while_loop(going, body, (jnp.int32(0), out, arrays))
    return out, arrays
