"""Reading prompts of any length and writing on, in a fixed number of slots."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxcompress.generation.sampling import Sampler, remember, row_keys
from jaxcompress.models.bounded import Mode, Slots, check_fits, check_mode, cut, init_state, last_hidden, read
from jaxcompress.models.decoder import Decoder
from jaxcompress.policies.base import Placement, Policy
from jaxcompress.state import State, runs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """Where B sequences stand between two tokens; everything needed to go on.

    Attributes:
      state: the bounded state after the last token.
      logits: [B, V] float32, for the next token.
      seen: [B, V] bool, tokens that prompt or output contain (for the repetition penalty).
      keys: [B] random keys, one per row, so that a row's tokens do not depend on its neighbours.
      done: [B] bool, rows that have produced a stop token.
      broken: [B] int32, position after which logits were first not finite, -1 while they are.
    """

    state: State
    logits: Float[Array, "B V"]
    seen: Bool[Array, "B V"]
    keys: Key[Array, " B"]
    done: Bool[Array, " B"]
    broken: Int[Array, " B"]


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
    """
    rows = [seeds + row for row in range(batch)] if isinstance(seeds, int) else list(seeds)
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} seeds were given for a batch of {batch}")
    vocabulary = model.config.vocab_size
    return Progress(
        state=init_state(model.config, policy, slots, batch=batch, dtype=dtype or model.embedding[...].dtype),
        logits=jnp.zeros((batch, vocabulary), jnp.float32),
        seen=jnp.zeros((batch, vocabulary), bool),
        keys=row_keys(rows),
        done=jnp.zeros(batch, bool),
        broken=jnp.full(batch, -1, jnp.int32),
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

    In mode `oneshot` every prompt is read in a single segment.

    Raises:
      ValueError: an empty prompt, token ids outside the vocabulary, a prompt that `full` cannot hold.
      FloatingPointError: logits are not finite.
    """
    rows = [np.asarray(prompt, np.int64).reshape(-1) for prompt in prompts]
    batch = progress.done.shape[0]
    if len(rows) != batch:
        raise ValueError(f"{len(rows)} prompts were given for a batch of {batch}")
    for row, prompt in enumerate(rows):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty; give at least one token (a BOS token will do)")
        check_tokens(prompt, model.config.vocab_size, f"prompt {row}")
    longest = max(map(len, rows))
    check_mode(policy, mode)
    check_room(model, policy, progress, longest, prompt=longest)
    segment, by = cut(mode, longest, chunk=chunk, segment=segment)
    width = -(-longest // segment) * segment
    tokens, valid = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
    for row, prompt in enumerate(rows):
        tokens[row, : len(prompt)], valid[row, : len(prompt)] = prompt, True
    for at in range(0, width, segment):
        piece = slice(at, at + segment)
        progress = _read(
            model, tokens[:, piece], valid[:, piece], progress, policy=policy, chunk=by, placement=placement
        )
    raise_if_broken(progress)
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
    twice for n tokens gives the same tokens as once for 2n.

    Raises:
      ValueError: `full` has no room for so many tokens.
    """
    check_room(model, policy, progress, steps)
    return _write(model, progress, steps, policy=policy, room=steps, settings=settings, placement=placement)


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

    Args:
      steps: tokens to write.
      burst: tokens per yield, all by default. The next burst is already being computed while one is consumed.
      dtype: of the state (see `start`).
      reading: how prompts are read: `mode`, `chunk`, `segment`, `placement` (see `prefill`).

    Example:
      >>> for tokens in generate(model, [prompt], tova(), slots=128, steps=200, burst=8):
      ...     print(tokenizer.decode(tokens[0][tokens[0] >= 0]), end="", flush=True)
    """
    placement = reading.get("placement")
    if not len(prompts):
        raise ValueError("no prompts were given")
    progress = start(model, policy, slots, batch=len(prompts), seeds=seeds, dtype=dtype)
    longest = max(map(len, prompts))
    check_room(model, policy, progress, longest + steps, prompt=longest)
    progress = prefill(model, prompts, progress, policy, **reading)
    yield from continue_(model, progress, policy, steps=steps, settings=settings, burst=burst, placement=placement)


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
    """The writing half of `generate`."""
    check_room(model, policy, progress, steps)
    size = min(burst or steps, steps)
    pending: list[Array] = []
    for at in range(0, steps, size):
        now = min(size, steps - at)
        tokens, progress = _write(
            model, progress, now, policy=policy, room=size, settings=settings, placement=placement
        )
        pending.append(tokens[:, :now])
        if len(pending) > 1:
            burst_done = np.asarray(pending.pop(0))
            yield burst_done
            if np.isin(burst_done[:, -1], [-1, *settings.stop]).all():
                return raise_if_broken(progress)
    for tokens in pending:
        yield np.asarray(tokens)
    raise_if_broken(progress)


def check_tokens(tokens: np.ndarray, vocabulary: int, what: str) -> None:
    """Raises ValueError if ids lie outside the vocabulary, naming the first."""
    outside = (tokens < 0) | (tokens >= vocabulary)
    if outside.any():
        at = int(outside.argmax())
        raise ValueError(f"{what}: token id {tokens[at]} at index {at} is outside the vocabulary 0..{vocabulary - 1}")


def check_room(model: Decoder, policy: Policy, progress: Progress, tokens: int, *, prompt: int | None = None) -> None:
    """Raises ValueError if a policy that cannot make room would overflow.

    Args:
      tokens: that will be read or written.
      prompt: how many of them a fresh state reads at once.
    """
    if policy.forgets:
        return
    held = None
    if int(progress.state[0].seen.max()):
        pool = lambda part: 1 if part.owner is None else model.config.num_kv_heads
        most = [
            [-(-part.occupancy().max(axis=(1, 2)) // pool(part)) for part in parts] for _, parts in runs(progress.state)
        ]
        held = [int(n) for run in most for n in np.max(run, axis=0)]
    check_fits(model.config, policy, progress.state, tokens, prompt=prompt, held=held)


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

    The progress yielded is consumed by the next step: use it before going on, or after the last.

    Args:
      chunk: tokens between two selections; 1 is streaming.
      segment: tokens per call; made a whole number of chunks.

    Raises:
      ValueError: there was no token at all.
    """
    how: dict[str, Any] = dict(
        mode="streaming" if chunk == 1 else "chunked", chunk=chunk, segment=segment, placement=placement
    )
    rest, count = np.zeros(0, np.int64), 0
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        whole = len(rest) // segment * segment
        for at in range(0, whole, segment):
            progress = prefill(model, [rest[at : at + segment]], progress, policy, **how)
            count += segment
            yield count, progress
        rest = rest[whole:]
    if len(rest):
        progress = prefill(model, [rest], progress, policy, **how)
        yield count + len(rest), progress
    elif not count:
        raise ValueError("the text is empty; there is nothing to read")


@partial(jax.jit, static_argnames=("chunk", "placement"), donate_argnames="progress")
def _read(
    model: Decoder,
    tokens: Array,
    valid: Array,
    progress: Progress,
    *,
    policy: Policy,
    chunk: int,
    placement: Placement | None,
) -> Progress:
    done = read(model, tokens, progress.state, policy, valid=valid, chunk=chunk, placement=placement)
    logits = model.logits(last_hidden(done, valid))[:, 0]
    here = valid.any(axis=1)
    seen = remember(progress.seen, tokens, valid)
    logits = jnp.where(here[:, None], logits, progress.logits)
    broken = first_broken(progress.broken, logits, done.state)
    return Progress(done.state, logits, seen, progress.keys, progress.done, broken)


@partial(jax.jit, static_argnames=("room", "settings", "placement"), donate_argnames="progress")
def _write(
    model: Decoder,
    progress: Progress,
    steps: Int[Array, ""] | int,
    *,
    policy: Policy,
    room: int,
    settings: Settings,
    placement: Placement | None,
) -> tuple[Array, Progress]:
    batch = progress.done.shape[0]
    stop = jnp.array(settings.stop, jnp.int32)

    def body(loop: tuple[Array, Array, Progress]) -> tuple[Array, Array, Progress]:
        step, out, now = loop
        keys = jax.vmap(jax.random.fold_in)(now.keys, now.state[0].seen)
        token = settings.sampler(keys, now.logits, now.seen)
        out = out.at[:, step].set(jnp.where(now.done, -1, token))
        done = read(model, token[:, None], now.state, policy, valid=~now.done[:, None], placement=placement)
        logits = model.logits(done.hidden)[:, 0]
        seen = remember(now.seen, token[:, None], ~now.done[:, None])
        stopped = now.done | (token[:, None] == stop).any(axis=1)
        broken = first_broken(now.broken, logits, done.state)
        return step + 1, out, Progress(done.state, logits, seen, now.keys, stopped, broken)

    def going(loop: tuple[Array, Array, Progress]) -> Array:
        step, _, now = loop
        return (step < steps) & ~now.done.all()

    out = jnp.full((batch, room), -1, jnp.int32)
    _, out, progress = jax.lax.while_loop(going, body, (jnp.int32(0), out, progress))
    return out, progress


def first_broken(broken: Array, logits: Array, state: State) -> Array:
    """`Progress.broken` after new logits."""
    finite = jnp.isfinite(logits).all(axis=-1)
    return jnp.where((broken < 0) & ~finite, state[0].seen - 1, broken)


def raise_if_broken(progress: Progress) -> None:
    """Raises FloatingPointError if logits were not finite."""
    broken = np.asarray(progress.broken)
    if (broken >= 0).any():
        row = int((broken >= 0).argmax())
        raise FloatingPointError(f"non-finite logits, first in row {row} by position {broken[row]}")
