"""Perplexity of many policies at many capacities on one text, as in the usual table of a paper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
from jax.typing import DTypeLike

from jaxcompress.distributed.rules import ShardingRules
from jaxcompress.evaluation.perplexity import once_slots, perplexity
from jaxcompress.inputs.scalars import whole
from jaxcompress.inputs.token_ids import token_rows
from jaxcompress.models.checks import check_mode
from jaxcompress.models.decoder import Decoder
from jaxcompress.models.modes import Mode
from jaxcompress.policies import Policy
from jaxcompress.state.placement import Placement


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      nats: mean loss per token; `perplexity` is its exponential.
      tokens: number of predicted tokens.
      state_bytes: bytes of the state of all rows of text together.
      left_out: tokens of the text that were not predicted (see `Perplexity`).
    """

    policy: str
    slots: int
    mode: str
    nats: float
    perplexity: float
    tokens: int
    tokens_per_second: float
    state_bytes: int
    left_out: int


class ReadOptions(TypedDict, total=False):
    """Keywords of `perplexity` that set how texts are read and which tokens are counted."""

    mode: Mode
    chunk: int
    prompt: int | None
    skip: int
    segment: int
    placement: Placement | None
    dtype: DTypeLike | None
    sharding: ShardingRules | None
    text: int | None


def rows_of_text(tokens: np.ndarray, context: int, rows: int | None = None, bos: int | None = None) -> np.ndarray:
    """Cuts a long text into independent rows of `context` tokens, evenly spread over it if `rows` limits their number.

    Tokens that fill no row are omitted. Pass the length of the text to `perplexity` or `sweep`, so that their result
    states how many tokens were omitted.

    Raises:
      ValueError: the text is shorter than one row.
    """
    width = context - (bos is not None)
    count = len(tokens) // width
    if not count:
        raise ValueError(f"the text has {len(tokens)} tokens, less than one row of {width}; give a smaller context")
    chosen = np.arange(count) if rows is None else np.linspace(0, count - 1, min(rows, count)).round().astype(int)
    cut = np.stack([tokens[i * width : (i + 1) * width] for i in chosen])
    return cut if bos is None else np.pad(cut, [(0, 0), (1, 0)], constant_values=bos)


def sweep(
    model: Decoder,
    tokens: np.ndarray,
    policies: Sequence[Policy],
    slots: Sequence[int],
    *,
    progress: Callable[[int], None] = lambda tokens: None,
    **options: Unpack[ReadOptions],
) -> Iterator[Row]:
    """Perplexity of every policy at every capacity.

    Arguments are checked at the call. Each row is measured when it is requested. A policy that keeps everything is
    measured once, with room for the whole context; one that selects only once, from a prompt, with as many slots as it
    fills. Capacities below the minimum of any other policy are skipped.

    Args:
      tokens: [B, T], rows of independent text.
      slots: capacities, the same for every layer.
      progress: called with the number of tokens read, per segment.
      options: keywords of `perplexity`: `mode`, `chunk`, `prompt`, `segment`, `placement`, `text`, ...

    Raises:
      TypeError: `perplexity` does not have such a keyword.
      ValueError: as for `perplexity`.
    """
    tokens = token_rows(tokens, model.config.vocab_size)
    slots = [whole(capacity, "slots", least=1) for capacity in slots]
    signature(perplexity).bind(model, tokens, None, None, **options)
    mode = options.get("mode", "streaming")
    for policy in policies:
        check_mode(policy, mode)

    def run() -> Iterator[Row]:
        for policy in policies:
            for capacity in capacities(policy, slots, tokens.shape[1], options.get("prompt")):
                yield measured(model, tokens, policy, capacity, progress=progress, **options)

    return run()


def measured(
    model: Decoder,
    tokens: np.ndarray,
    policy: Policy,
    slots: int,
    *,
    progress: Callable[[int], None] = lambda tokens: None,
    **options: Unpack[ReadOptions],
) -> Row:
    """One line of the table; arguments and errors are those of `perplexity`."""
    result = perplexity(model, tokens, policy, slots, progress=progress, **options)
    mode = options.get("mode", "streaming")
    return Row(policy.name, slots, mode, result.nats, result.perplexity, *result[1:])


def capacities(policy: Policy, slots: Sequence[int], total: int, prompt: int | None = None) -> list[int]:
    """The capacities at which `sweep` measures a policy in rows of `total` tokens, of those that are asked for."""
    return [capacity for capacity in _own(policy, total, prompt) or sorted(slots) if capacity >= policy.needs]


def _own(policy: Policy, total: int, prompt: int | None) -> list[int]:
    """The only capacity that a policy can have in rows of `total` tokens; [] if it has a choice."""
    layers = policy.layers or (policy,)
    if all(one.schedule.when == "once" for one in layers):
        return [max(once_slots(one, total - 1, prompt) for one in layers)]
    return [] if policy.evicts else [total]
