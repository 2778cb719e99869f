"""A model with a bounded state for lm-evaluation-harness (Gao et al., EleutherAI/lm-evaluation-harness, 0.4.13).

The harness asks for three things: how likely a continuation is after a context, how likely a text is, and what a model
writes. All go through one state of a policy. With `policy=full` the figures are those of the harness's own `hf` model.
`jaxcompress.lm_eval` registers the model under the name jaxcompress.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from jaxcompress._extras import extra
from jaxcompress.checkpoints import load, missing_policy
from jaxcompress.evaluation.perplexity import predict_block
from jaxcompress.generation.config import GenerationConfig
from jaxcompress.generation.decode_state import DecodeState, init_decode_state
from jaxcompress.generation.generate import decode_stream, prefill
from jaxcompress.generation.sampling import check_seed
from jaxcompress.generation.text import TextUntil
from jaxcompress.models.modes import MODES, Mode, calls, padded
from jaxcompress.policies.names import get_policy
from jaxcompress.state.placement import Placement
from jaxcompress.training.loss import token_losses

with extra("lm-eval"):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

GROUP = 16
"""Tokens that are written before stop strings are looked for."""

SEGMENT = 256
"""Tokens per call."""

_MARK = "jaxcompress7c1e"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Scored(NamedTuple):
    """A context and a continuation as token ids, cut to what the model takes, and what it was asked as."""

    asked: Any
    context: tuple[int, ...]
    continuation: tuple[int, ...]


class HarnessModel(TemplateLM):
    """A decoder in a state of fixed size, as lm-evaluation-harness takes models.

    Args:
      pretrained: what `jaxcompress.load` takes: a folder, a name on the hub, a GGUF file, `smollm2`.
      policy: an expression that `jaxcompress.get_policy` reads, or `learned`.
      slots: capacity of each layer; a policy that evicts nothing needs none.
      mode: how contexts are read: `streaming`, `chunked` or `oneshot` (see `jaxcompress.models.modes`). Continuations
        are read, and answers written, token by token.
      chunk: tokens between two selections, in mode chunked.
      placement: positions for RoPE; the policy's own if not given.
      dtype, state_dtype: of the weights and of the state.
      batch_size: rows that are read together.
      max_length: tokens that are read at most, context and continuation together; earlier ones are left out, as the
        harness does. What the model was trained for if not given.
      max_gen_toks: tokens to write, if a task does not say.
      seed: of the draws of answers. The n-th request of a call has seed + n, whatever the batch.
      device, max_batch_size: not used; the harness always gives them (cuda:0 by default). JAX chooses the device.

    Raises:
      ValueError: slots are missing, or an argument has no meaning.
    """

    def __init__(  # fourteen parameters: the keys of --model_args
        self, pretrained: str, policy: str = "full", slots: int | None = None, mode: str = "streaming",
        chunk: int = 128, placement: Placement | None = None, dtype: str = "auto", state_dtype: str | None = None,
        batch_size: int | str = 4, max_length: int | None = None, max_gen_toks: int = 256,
        seed: int = 0, device: str | None = None, max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        self.loaded = load(str(pretrained), dtype=dtype)
        learned = self.loaded.policy if policy.split("/")[0] == "learned" else None
        if learned is None and policy.split("/")[0] == "learned":
            raise ValueError(missing_policy(self.loaded.folder))
        self.policy = get_policy(policy, learned=learned)
        if slots is None and self.policy.evicts:
            raise ValueError(f"policy {policy} evicts: give slots, such as slots=256")
        self.slots = slots
        self.mode: Mode = cast(Mode, mode) if self.policy.evicts else "oneshot"
        self.chunk, self.state_dtype = chunk, state_dtype
        self.placement: Placement | None = placement
        self.batch_size = int(batch_size)
        self.max_length = self.loaded.config.max_position if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        self.seed = check_seed(seed)

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text: the one that begins texts, else the one that ends them."""
        bos = self.loaded.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template; others cannot be chosen."""
        if isinstance(chat_template, str):
            raise ValueError(f"the template of {self.loaded.folder} cannot be chosen by name: {chat_template!r}")
        return self.loaded.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Without a generation prompt, the last message is the beginning of an answer."""
        if add_generation_prompt:
            return self.loaded.tokenizer.apply_chat_template(chat_history)
        *before, last = chat_history
        marked = [*before, {**last, "content": last["content"] + _MARK}]
        text = self.loaded.tokenizer.apply_chat_template(marked, add_generation_prompt=False)
        return text[: text.rindex(_MARK)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokenizer = self.loaded.tokenizer
        begins = any(
            string.startswith(name)
            for name, token in tokenizer.special_tokens().items() if token == self.prefix_token_id
        )  # fmt: skip
        add_bos = not begins if add_special_tokens is None else add_special_tokens
        return tokenizer.encode(string, add_bos=add_bos).tolist()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of `max_length` tokens, as the harness defines it."""
        windows: list[tuple[int, tuple[Any, list[int], list[int]]]] = []
        for number, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(_arguments(request)[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            windows += [(number, (None, *make_disjoint_window(window))) for window in found]
        scores = self._loglikelihood_tokens([window for _, window in windows])
        sums = [0.0] * len(requests)
        for (number, _), (score, _) in zip(windows, scores, strict=True):
            sums[number] += score
        for request, score in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", _arguments(request), score)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is what greedy decoding writes.

        A context is read once for all its continuations.
        """
        asked = [self._cut(*request) for request in requests]
        results: dict[int, tuple[float, bool]] = {}
        groups = _grouped(range(len(asked)), lambda number: asked[number].context)
        order = sorted(groups, key=lambda context: (-len(context), context))
        for contexts in _batches(order, self.batch_size):
            most = max(len(groups[context]) for context in contexts)
            room = max(len(asked[n].context) + len(asked[n].continuation) for c in contexts for n in groups[c])
            state = self._read(contexts, room, range(len(contexts)))  # nothing is drawn
            for turn in range(most):
                numbers = [groups[context][min(turn, len(groups[context]) - 1)] for context in contexts]
                last = turn == most - 1
                scored = self._continued(state if last else state.copy(), [asked[n].continuation for n in numbers])
                results.update(zip(numbers, scored, strict=True))
        for number, one in enumerate(asked):
            if one.asked is not None:
                self.cache_hook.add_partial("loglikelihood", one.asked, results[number])
        return [results[number] for number in range(len(asked))]

    def _cut(self, asked: Any, context: list[int], continuation: list[int]) -> Scored:
        """The last tokens that the model takes. Raises ValueError if no context is left."""
        if not continuation or len(continuation) > self.max_length:
            raise ValueError(f"a continuation has 1 to max_length={self.max_length} tokens, not {len(continuation)}")
        kept = (context + continuation)[-(self.max_length + 1) :]
        return Scored(asked, tuple(kept[: -len(continuation)]), tuple(continuation))

    def _read(self, contexts: Sequence[tuple[int, ...]], room: int, numbers: Sequence[int]) -> DecodeState:
        """The state after contexts [B] of requests of these numbers, with room for so many tokens if nothing is
        evicted."""
        slots = self.slots if self.slots is not None and self.policy.evicts else padded(room, SEGMENT)
        rows = [np.array(context, np.int32) for context in contexts]
        seeds = [self.seed + number for number in numbers]
        missing = self.batch_size - len(rows)
        rows, seeds = rows + rows[-1:] * missing, seeds + seeds[-1:] * missing
        state = init_decode_state(
            self.loaded.model, self.policy, slots, batch=len(rows), seeds=seeds, dtype=self.state_dtype,
            placement=self.placement,
        )  # fmt: skip
        return prefill(self.loaded.model, rows, state, mode=self.mode, chunk=self.chunk, segment=SEGMENT)

    def _continued(
        self, state: DecodeState, continuations: Sequence[tuple[int, ...]]
    ) -> list[tuple[float, bool]]:  # fmt: skip
        """What continuations score after a state, which is donated."""
        rows = [*continuations, *[continuations[-1]] * (self.batch_size - len(continuations))]
        longest = max(map(len, rows))
        tokens, valid = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), longest), bool)
        for row, ids in enumerate(rows):
            tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
        first = token_losses(state.logits[:, None], jnp.asarray(tokens[:, :1]))
        losses = [np.asarray(first, np.float64)]
        right = [np.asarray(state.logits.argmax(-1))[:, None] == tokens[:, :1]]
        kv = state.kv
        mode: Mode = "streaming" if self.policy.evicts and not self.policy.oneshot_only else "oneshot"
        plan = calls(mode, longest - 1, chunk=1, segment=SEGMENT) if longest > 1 else []
        for start, stop, width, by in plan:
            fill = [(0, 0), (0, width - (stop - start))]
            piece, target = (np.pad(tokens[:, at : at + stop - start], fill) for at in (start, start + 1))
            here = np.pad(valid[:, start + 1 : stop + 1], fill)  # the last token of a row predicts nothing
            loss, best, kv = predict_block(
                self.loaded.model, piece, target, here, kv, policy=self.policy, chunk=by, placement=self.placement
            )
            losses.append(np.asarray(loss, np.float64)[:, : stop - start])
            right.append(np.asarray(best)[:, : stop - start])
        loss, best = np.concatenate(losses, axis=1), np.concatenate(right, axis=1)
        if not np.isfinite(loss[valid]).all():
            raise FloatingPointError("non-finite logits; try dtype=float32")
        each = range(len(continuations))
        return [(-float(loss[row][valid[row]].sum()), bool(best[row][valid[row]].all())) for row in each]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes until a stop string, the end of the text or the limit of tokens."""
        results: dict[int, str] = {}
        for numbers in _grouped(range(len(requests)), lambda number: repr(_arguments(requests[number])[1])).values():
            given = normalize_gen_kwargs(_arguments(requests[numbers[0]])[1], self.max_gen_toks)
            rows = {number: self.tok_encode(_arguments(requests[number])[0]) for number in numbers}
            order = sorted(numbers, key=lambda number: -len(rows[number]))
            for batch in _batches(order, self.batch_size):
                written = self._generated([rows[number] for number in batch], batch, dict(given))
                results.update(zip(batch, written, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", _arguments(request), results[number])
        return [results[number] for number in range(len(requests))]

    def _generated(
        self, contexts: Sequence[list[int]], numbers: Sequence[int], given: dict[str, Any]
    ) -> list[str]:  # fmt: skip
        """What follows contexts of requests of these numbers, that are written with the same arguments."""
        most = int(given.pop("max_gen_toks"))
        stop = handle_stop_sequences(given.pop("until", None), eos=None)
        room = self.max_length - most
        if room < 1:
            raise ValueError(f"max_gen_toks={most} leaves no room for a context in max_length={self.max_length}")
        config = _config(given, self.loaded.tokenizer.eos_ids)
        cut = [tuple(context[-room:]) for context in contexts]
        state = self._read(cut, max(map(len, cut)) + most, numbers)
        until = [TextUntil(self.loaded.tokenizer, [s for s in stop if s], config.stop_token_ids, ids) for ids in cut]
        written = [""] * len(contexts)
        for tokens in decode_stream(self.loaded.model, state, most, config, stream_every=GROUP):
            for row, one in enumerate(until):
                written[row] += one.push(tokens[row])
            if all(one.stopped for one in until):
                break
        return [text + one.finish() for text, one in zip(written, until, strict=True)]


def _arguments(request: Instance) -> tuple[Any, ...]:
    """What a request asks about; the harness types it by kind."""
    return cast(Any, request).args


def _config(given: dict[str, Any], stops: tuple[int, ...]) -> GenerationConfig:
    """Sampling as the harness asks for it.

    Raises:
      ValueError: an argument that this library has no counterpart of.
    """
    sampled = bool(given.pop("do_sample", False))
    known = {name: given.pop(name) for name in _SAMPLING if given.get(name) is not None}
    if other := sorted(name for name, value in given.items() if value not in (None, 1, False)):
        raise ValueError(f"generation arguments {', '.join(other)} are not known; known: {', '.join(_SAMPLING)}")
    if not sampled:
        known = {"repetition_penalty": known["repetition_penalty"]} if "repetition_penalty" in known else {}
    return GenerationConfig(**known, stop_token_ids=stops)


def _grouped(numbers: Sequence[int], by: Callable[[int], Hashable]) -> dict[Any, list[int]]:
    groups: dict[Any, list[int]] = {}
    for number in numbers:
        groups.setdefault(by(number), []).append(number)
    return groups


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    yield from (values[start : start + size] for start in range(0, len(values), size))
