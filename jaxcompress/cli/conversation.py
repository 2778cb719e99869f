"""What `jaxcompress chat` does with a line: a message for the model, or a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxcompress.cli.retention import about_told, slots_told
from jaxcompress.cli.runtime import check_writable, chosen_policy, folder_name, tell
from jaxcompress.inputs.whole_file import whole_file

if TYPE_CHECKING:
    import numpy as np

    from jaxcompress.generation import Chat

REREAD = 2048
"""/policy reads a conversation of up to so many tokens anew; a longer one is forgotten."""


class Command(NamedTuple):
    """A line that begins with a slash.

    Attributes:
      takes: how its arguments are written.
      does: for /help.
      run: takes the words after the name.
    """

    takes: str
    does: str
    run: Callable[[Conversation, list[str]], None]


class Conversation:
    """A chat, the commands around it, and what is printed.

    Attributes:
      chat: the conversation as it stands.
      ended: whether /quit was said.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.ended = False

    def take(self, line: str) -> None:
        """Does what a line asks for. Raises what the chat or the command raises."""
        if not line.strip():
            tell("an empty line is no message; write one, or /help")
        elif line.startswith("/"):
            self._command(line)
        else:
            self._answer(line)

    def prompt(self) -> str:
        """What stands before the next line: slots used, and bytes of the state."""
        return f"[{self.chat.held}/{slots_told(self.chat.slots)} slots, {_bytes(self.chat.nbytes)}]"

    def described(self) -> str:
        """The model, the policy and the state in a few words."""
        name = folder_name(self.chat.loaded.folder)
        return f"{name}, {self.chat.policy.name}, {slots_told(self.chat.slots)} slots, {_bytes(self.chat.nbytes)}"

    def _answer(self, message: str) -> None:
        for piece in self.chat.stream(message):
            print(piece, end="", flush=True)
        print(flush=True)

    def _command(self, line: str) -> None:
        name, *words = line[1:].split() or [""]
        if name not in COMMANDS:
            raise ValueError(f"there is no command /{name}; /help lists them, and a message may begin with a space")
        command = COMMANDS[name]
        most = command.takes.count(" ") + 1 if command.takes else 0
        least = 0 if command.takes.startswith("[") else min(most, 1)
        if not least <= len(words) <= most:
            raise ValueError(f"write /{name} {command.takes}".rstrip())
        command.run(self, words)


def _help(conversation: Conversation, words: list[str]) -> None:
    for name, command in COMMANDS.items():
        print(f"{f'/{name} {command.takes}':28}{command.does}")


def _save(conversation: Conversation, words: list[str]) -> None:
    path = Path(words[0]).expanduser()
    check_writable(path)
    conversation.chat.save(path)
    tell(f"saved in {path}, {_bytes(path.stat().st_size)}")


def _load(conversation: Conversation, words: list[str]) -> None:
    now = conversation.chat
    from jaxcompress.generation import Chat
    from jaxcompress.generation.state_file import read_record

    facts = read_record(words[0]).facts
    # A policy of a class of one's own is not in the file; any other is, with the weights that it had.
    own, named = facts.get("expression", "") is None, facts.get("policy")
    if own and named != now.policy.name:
        raise ValueError(
            f"{words[0]} is a conversation under {named}, a policy of your own, which is not in the file; go over to "
            f"it first: /policy FILE.py:{named}"
        )
    conversation.chat = Chat.load(words[0], now.loaded, now.policy if own else None)
    tell(f"{conversation.described()}; {len(conversation.chat.tokens):,} tokens read and written so far")


def _forget(conversation: Conversation, words: list[str]) -> None:
    conversation.chat = conversation.chat.fresh()
    tell("forgotten")


def _policy(conversation: Conversation, words: list[str]) -> None:
    chat = conversation.chat
    slots = chat.slots
    if len(words) > 1:
        if not words[1].isdecimal():
            raise ValueError(f"the number of slots must be a whole number, not {words[1]!r}")
        slots = int(words[1])
    policy, tokens = chosen_policy(words[0], chat.loaded.model, chat.loaded.folder), len(chat.tokens)
    conversation.chat = chat.reread(policy, slots) if tokens <= REREAD else chat.fresh(policy, slots)
    what = "nothing was said yet" if not tokens else f"read {tokens:,} tokens again"
    if tokens > REREAD:
        what = f"forgot {tokens:,} tokens: up to {REREAD:,} are read again"
    tell(f"{conversation.described()}; {what}")


def _retention(conversation: Conversation, words: list[str]) -> None:
    path = Path(words[0] if words else "conversation.html").expanduser()
    check_writable(path)
    if not len(conversation.chat.tokens):
        raise ValueError("nothing was said yet; say something first")
    death, page = retention_page(conversation.chat)
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8")
    total = death.shape[-1]
    tell(f"{path}: of {total:,} tokens, {(death == total).mean():.0%} are held, on average over layers and heads")


def _quit(conversation: Conversation, words: list[str]) -> None:
    conversation.ended = True


COMMANDS = {
    "save": Command("FILE", "write the conversation into a file", _save),
    "load": Command("FILE", "go on with a conversation from a file", _load),
    "forget": Command("", "begin anew", _forget),
    "policy": Command("NAME [SLOTS]", "go on under another policy, which reads the conversation anew", _policy),
    "retention": Command("[FILE]", "write a page that shows which tokens are still held", _retention),
    "help": Command("", "list the commands", _help),
    "quit": Command("", "end", _quit),
}


def retention_page(chat: Chat) -> tuple[np.ndarray, str]:
    """When each token of a conversation was evicted, [L, P, T], and the page that shows it.

    The tokens are read anew, in one go. In mode streaming what is held at the end is what the chat's state holds.
    """
    from jaxcompress.evaluation.lifetimes import token_kinds, token_texts
    from jaxcompress.evaluation.page import page
    from jaxcompress.evaluation.tracing import trace

    ids, tokenizer, options = chat.tokens, chat.loaded.tokenizer, chat.options
    mode = options.get("mode", "streaming")
    death = trace(
        chat.loaded.model, ids[None], chat.policy, chat.slots, prompt=len(ids), mode=mode,
        chunk=options.get("chunk", 128), placement=options.get("placement"), dtype=options.get("dtype"),
    ).death[:, 0]  # fmt: skip
    texts = token_texts(tokenizer, ids)
    layers, sets, total = death.shape
    about: dict[str, Any] = dict(
        policy=chat.policy.name, slots=chat.slots, sets=sets, model=folder_name(chat.loaded.folder), layers=layers,
        text=f"a conversation of {len(chat.messages)} messages", tokens=total, of=total, mode=mode, prompt=None,
    )  # fmt: skip
    title = f"What {chat.policy.name} keeps of a conversation in {slots_told(chat.slots)} slots"
    kinds = token_kinds(texts, marks=[tokenizer.is_special(token) for token in ids])
    return death, page(death, texts, title=title, about=about_told(about), kinds=kinds)


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
