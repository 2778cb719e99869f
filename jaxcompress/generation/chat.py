"""A conversation of any length in one bounded state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from operator import index
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from jaxcompress.checkpoints._loaded import Loaded
from jaxcompress.distributed.rules import ShardingRules
from jaxcompress.generation.config import GREEDY, GenerationConfig, check_config
from jaxcompress.generation.decode_state import DecodeState, init_decode_state, most_held
from jaxcompress.generation.generate import ReadOptions, check_reading, decode_stream, prefill_calls
from jaxcompress.generation.interrupts import uninterrupted
from jaxcompress.generation.sampling import check_seed
from jaxcompress.generation.state_file import Record, read_record, record_of, state_of, write_record
from jaxcompress.generation.text import TextUntil
from jaxcompress.generation.turns import (
    ROLE_OF_MODEL,
    Message,
    begun,
    check_arguments,
    closing_token,
    of_user,
    turn_text,
    without_stop,
)
from jaxcompress.inputs.described import described
from jaxcompress.inputs.scalars import whole
from jaxcompress.inputs.token_ids import TokenIds, token_ids
from jaxcompress.inputs.tokenizer import Tokenizer
from jaxcompress.models.decoder import check_decoder
from jaxcompress.models.init_state import Slots
from jaxcompress.models.modes import FEWEST
from jaxcompress.policies.policy import Policy

GROUP = 8
"""Tokens that are written before their text is shown."""

_CONTEXT = 16  # tokens before a text that decide how it is encoded; a few suffice


def _check_loaded(loaded: Any) -> None:
    if not isinstance(loaded, Loaded):
        raise ValueError(
            f"a chat needs a model with its tokenizer, as jaxcompress.load gives them, not {described(loaded)}"
        )


class Chat:
    """A conversation with a chat model, of any length, in a state of fixed size.

        chat = Chat(load("smollm2"), get_policy("tova"), slots=512)
        print(chat.send("What is a cache?"))
        for piece in chat.stream("And a small one?"):
            print(piece, end="", flush=True)
        chat.save("tomorrow.chat")

    Every message is read after what was read and written before, in calls of one width, so that no new length of a
    message needs a compilation. An answer that is interrupted (Ctrl-C, or a loop over `stream` that is left) counts as
    far as it was written; where the message was still being read, the rest of it is read with the next one.

    Attributes:
      loaded: the model and its tokenizer.
      policy, slots: as given.
      config: the sampling method, with the stop tokens of the model and the template.
      max_new_tokens: tokens of an answer, at most.
      arguments: arguments of the chat template.
    """

    def __init__(
        self,
        loaded: Loaded[Any, Any, Tokenizer],
        policy: Policy,
        slots: Slots,
        *,
        system: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        max_new_tokens: int = 512,
        config: GenerationConfig = GREEDY,
        seed: int = 0,
        **options: Unpack[ReadOptions],
    ) -> None:
        """Starts a conversation, of which nothing is read yet.

        Args:
          loaded: what `jaxcompress.load` gives, with a chat template.
          slots: capacity of the state, see `jaxcompress.init_state`.
          system: system message.
          arguments: of the chat template, by name, such as `enable_thinking` or `tools`.
          max_new_tokens: tokens of an answer, at most.
          seed: of everything that is drawn.
          options: `mode`, `chunk`, `segment` (see `prefill`); `placement`, `dtype`, `sharding` (see
            `init_decode_state`). The one row of a chat is on every device, its heads are spread as the rules say.

        Raises:
          TypeError: an option has an unknown name.
          ValueError: there is no chat template, or it refuses the system message, or does not write answers as they
            are; arguments without names; the policy does not work in the mode; other cases as for `init_decode_state`
            and `prefill`.
        """
        _check_loaded(loaded)
        check_decoder(loaded.model)
        if unknown := sorted(set(options) - set(ReadOptions.__annotations__)):
            raise TypeError(f"Chat has no argument {unknown[0]!r}; options: {', '.join(ReadOptions.__annotations__)}")
        check_reading(policy, options)
        self.loaded, self.policy, self.slots = loaded, policy, slots
        self.max_new_tokens = whole(max_new_tokens, "max_new_tokens", least=1)
        check_arguments(arguments := {} if arguments is None else arguments)
        self.arguments = dict(arguments)
        check_config(loaded.model, config)
        closing = closing_token(loaded.tokenizer, system, self.arguments)
        ends = (*config.stop_token_ids, *loaded.tokenizer.eos_ids, *(() if closing is None else (closing,)))
        self.config = replace(config, stop_token_ids=tuple(dict.fromkeys(map(int, ends))))
        self._system, self._seed, self._options = system, check_seed(seed), options
        self._state = init_decode_state(
            loaded.model, policy, slots, seeds=self._seed, dtype=options.get("dtype"),
            placement=options.get("placement"), sharding=_one_row(options.get("sharding")),
        )  # fmt: skip
        self._said = begun(system)
        self._ids: list[int] = []
        self._answer: _Answer | None = None

    @property
    def messages(self) -> list[Message]:
        """All that was said, as the chat template takes it: `[{"role": "user", "content": "Hello"}, ...]`."""
        return [*self._said, *(() if self._answer is None else [self._answer.message])]

    @property
    def tokens(self) -> TokenIds:
        """[T] int32, all tokens of the conversation. The state has read or written them, but for those of a message
        whose reading was interrupted: it reads the rest with the next one."""
        return np.array(self._ids, np.int32)

    @property
    def state(self) -> DecodeState:
        """The state after the tokens that were read and written. The next message donates it: copy it to keep it."""
        return self._state

    @property
    def options(self) -> ReadOptions:
        """How messages are read and the state is stored, as given."""
        return self._options

    @property
    def held(self) -> int:
        """Tokens that the state holds, in the layer that holds most."""
        return max(most_held(self.loaded.model, self._state) or [0])

    @property
    def nbytes(self) -> int:
        """Bytes of the bounded state: the same before the first message and after the last."""
        return sum(part.nbytes for part in self._state.kv)

    def send(self, message: str) -> str:
        """Reads a message and returns the answer. Raises as `stream`."""
        return "".join(self.stream(message))

    def stream(self, message: str) -> Iterator[str]:
        """Reads a message and yields the answer, piece by piece.

        The message is checked at the call; it is read when the first piece is asked for.

        Raises:
          ValueError: the message is empty, the chat template refuses it, or there is no room for it and the policy
            cannot make room.
          FloatingPointError: logits are not finite.
        """
        if not isinstance(message, str) or not message.strip():
            raise ValueError(f"a message is a text that is not empty, not {described(message)}")
        self._close()
        new = of_user(message)
        text = turn_text(self.loaded.tokenizer, self._said, new, self.arguments)
        return self._written(new, self._encode(text), len(self._said))

    def fresh(self, policy: Policy | None = None, slots: Slots | None = None) -> Chat:
        """A conversation in which nothing was said, with the same model and settings, or another policy."""
        return Chat(
            self.loaded, self.policy if policy is None else policy, self.slots if slots is None else slots,
            system=self._system, arguments=self.arguments, max_new_tokens=self.max_new_tokens, config=self.config,
            seed=self._seed, **self._options,
        )  # fmt: skip

    def reread(self, policy: Policy | None = None, slots: Slots | None = None) -> Chat:
        """This conversation under another policy or in other slots: the same tokens, read anew by another state."""
        self._close()
        chat = self.fresh(policy, slots)
        if self._ids:
            chat._read(chat._calls(self.tokens))
        chat._ids = list(self._ids)
        chat._said = list(self._said)
        return chat

    def save(self, path: str | Path) -> None:
        """Writes the conversation into one file: the state, all that was said, and the settings; `load` reads it.

        The file appears complete or not at all (see `jaxcompress.save_state`, of which it is a longer form).

        Raises:
          ValueError: arguments of the template that are not JSON, or a config of a class of your own.
          OSError: the file cannot be written.
        """
        self._close()
        if type(self.config) is not GenerationConfig:
            raise ValueError(f"a conversation is saved with a GenerationConfig, not with {type(self.config).__name__}")
        said = dict(
            messages=[dict(message) for message in self._said], system=self._system, arguments=self.arguments,
            config=asdict(self.config), max_new_tokens=self.max_new_tokens, seed=self._seed,
            slots=_plain_slots(self.slots), options=_plain(self._options),
        )  # fmt: skip
        facts, arrays = record_of(self._state, self.loaded.model)
        try:
            write_record(path, Record({**facts, "conversation": said}, {**arrays, "tokens": self.tokens}))
        except TypeError as error:
            raise ValueError(f"the arguments of the chat template cannot be saved: {error}") from error

    @classmethod
    def load(
        cls,
        path: str | Path,
        loaded: Loaded[Any, Any, Tokenizer],
        policy: Policy | None = None,
        *,
        sharding: ShardingRules | None = None,
    ) -> Chat:
        """Reads a conversation that `save` wrote; it goes on token for token as if it had never stopped.

        Args:
          loaded: the model that it was held with.
          policy: see `jaxcompress.load_state`.
          sharding: where the state goes; the file does not say.

        Raises:
          FileNotFoundError, ValueError: as for `jaxcompress.load_state`; the file holds a state without a conversation.
        """
        record = read_record(path)
        said = record.facts.get("conversation")
        if said is None:
            raise ValueError(f"{path} is a state without a conversation; read it with jaxcompress.load_state")
        _check_loaded(loaded)
        state = state_of(record, path, loaded.model, policy)
        try:
            options: Any = said["options"] | ({} if sharding is None else dict(sharding=sharding))
            given = {**said["config"], "stop_token_ids": tuple(said["config"]["stop_token_ids"])}
            chat = cls(
                loaded, state.policy, said["slots"], system=said["system"], arguments=said["arguments"],
                max_new_tokens=said["max_new_tokens"], config=GenerationConfig(**given), seed=said["seed"],
                **options,
            )  # fmt: skip
            chat._said = [{**message} for message in said["messages"]]
            chat._ids = token_ids(record.arrays["tokens"], loaded.model.config.vocab_size, f"{path}: tokens").tolist()
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged: its description of the conversation is wrong ({error!r:.80})"
            ) from error
        where = _one_row(sharding)
        chat._state = state if where is None else replace(state, **where.put(state.arrays)._asdict())
        return chat

    def _encode(self, text: str) -> TokenIds:
        """The token ids of a text that follows what was read."""
        tokenizer = self.loaded.tokenizer
        if not self._ids:
            return tokenizer.encode(text, add_bos=False)
        if self._ids[-1] in self.config.stop_token_ids:
            text = without_stop(tokenizer, text, self._ids[-1])
        return tokenizer.encode_after(tokenizer.decode(self._ids[-_CONTEXT:], skip_special=False), text)

    def _unread(self) -> TokenIds:
        """The tokens that an interrupt left to read."""
        return self.tokens[int(np.asarray(self._state.kv[0].seen)[0]) :]

    def _calls(self, ids: TokenIds) -> Iterator[DecodeState]:
        """The calls that read tokens, checked and not begun. Raises as `prefill`."""
        mode = self._options.get("mode", "streaming")
        how: Any = {name: x for name, x in self._options.items() if name in ("mode", "chunk", "segment")}
        if mode == "streaming":
            how.setdefault("segment", FEWEST)  # one width for all lengths
        return prefill_calls(self.loaded.model, [ids], self._state, **how)

    def _read(self, calls: Iterator[DecodeState]) -> None:
        """Reads tokens call by call: an interrupt, or an error, leaves the state after the last one."""
        going = True
        while going:
            with uninterrupted():
                after = next(calls, None)
                going, self._state = after is not None, after or self._state

    def _written(self, new: Message, ids: TokenIds, turn: int) -> Iterator[str]:
        """Reads a turn and writes the answer."""
        self._close()
        if len(self._said) != turn:
            raise ValueError("another message was sent before this answer was asked for; send this one again")
        calls = self._calls(np.concatenate([self._unread(), ids]))
        with uninterrupted():
            self._said.append(new)
            self._ids += ids.tolist()
            answer = self._answer = _Answer(TextUntil(self.loaded.tokenizer, (), self.config.stop_token_ids, ids))
        left = self.max_new_tokens
        try:
            self._read(calls)
            while left > 0 and answer is self._answer and not answer.until.stopped:
                with uninterrupted():
                    piece = self._step(answer, min(GROUP, left))
                left -= GROUP
                if piece:
                    yield piece
            if answer is self._answer and (rest := self._close()):
                yield rest
        finally:
            if answer is self._answer:
                self._close()

    def _step(self, answer: _Answer, tokens: int) -> str:
        """Writes some tokens more; returns their text, as far as it is final."""
        stream = decode_stream(self.loaded.model, self._state, tokens, self.config)
        try:
            (group,) = stream
        finally:  # a state whose logits are not finite is kept too: the one before it was donated
            self._state = stream.state
        new = group[0][group[0] >= 0].tolist()
        self._ids += new
        return answer.add(answer.until.push(new))

    def _close(self) -> str:
        """Ends the answer that is being written, if there is one; returns the rest of its text."""
        answer = self._answer
        if answer is None:
            return ""
        with uninterrupted():
            rest = answer.add(answer.until.finish())
            self._said.append(answer.message)
            self._answer = None
        return rest


class _Answer:
    """An answer as it grows."""

    def __init__(self, until: TextUntil) -> None:
        self.until = until
        self._pieces: list[str] = []

    def add(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece

    @property
    def message(self) -> Message:
        return dict(role=ROLE_OF_MODEL, content="".join(self._pieces))


def _plain(options: Any) -> dict[str, Any]:
    """Options as JSON: a dtype by its name, and nothing of the devices of today."""
    return {
        name: np.dtype(x).name if name == "dtype" and not isinstance(x, str | None) else x
        for name, x in options.items()
        if name != "sharding"
    }


def _plain_slots(slots: Any) -> Any:
    """Slots as JSON: a number, or lists of numbers, which need not be of one depth."""
    given = slots.tolist() if isinstance(slots, np.ndarray) else slots
    return [_plain_slots(one) for one in given] if isinstance(given, list | tuple) else index(given)


def _one_row(sharding: ShardingRules | None) -> ShardingRules | None:
    return None if sharding is None else sharding.one_row
