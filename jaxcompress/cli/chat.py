"""jaxcompress chat"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxcompress.cli.conversation import Conversation
from jaxcompress.cli.failures import judged
from jaxcompress.cli.flags import (
    ModeFlags,
    PlacementFlag,
    PolicyFlags,
    SamplingFlags,
    StateDtypeFlag,
    TemplateFlags,
    WeightFlags,
)
from jaxcompress.cli.runtime import chosen_policy, open_weights, tell
from jaxcompress.inputs.text import decoded, standard_input

if TYPE_CHECKING:
    from jaxcompress.generation.generate import ReadOptions

DEFAULT = "smollm2"


@dataclass(frozen=True, kw_only=True)
class Chat(
    TemplateFlags, StateDtypeFlag, PlacementFlag, ModeFlags, SamplingFlags, PolicyFlags, WeightFlags,
):  # fmt: skip
    """Talks with a chat model in a state of fixed size: the conversation may be of any length.

    Lines that begin with a slash are commands; /help lists them. Ctrl-C stops an answer, Ctrl-D ends. Where standard
    input is no terminal, each line is a message, and the answers are printed one after another.

    Example: jaxcompress chat --policy tova --slots 512 --system 'Answer in one sentence.'
    """

    model: str | None = None
    """Folder in Hugging Face's format, a name on its hub, a GGUF file, or smollm2, which is taken if not given. The
    model needs a chat template."""
    slots: tuple[int, ...] = (512,)
    """Capacity of each layer: one number for all layers, or one per layer."""
    max_new_tokens: int = 512
    """Tokens of an answer, at most."""

    def run(self) -> None:
        self.check_sampling()
        self.check_placement(self.policy)
        chunk, arguments = self.chunk_tokens(), self.template_arguments()
        loaded = open_weights(DEFAULT if self.model is None else self.model, self.dtype)
        from jaxcompress import generation

        options: ReadOptions = {"mode": self.mode, "chunk": chunk}
        if self.placement is not None:
            options["placement"] = self.placement
        if self.state_dtype is not None:
            options["dtype"] = self.state_dtype
        chat = generation.Chat(
            loaded, chosen_policy(self.policy, loaded.model, loaded.folder), self.capacity, system=self.system,
            arguments=arguments,
            max_new_tokens=self.max_new_tokens, config=self.sampling(), seed=self.seed, **options,
        )  # fmt: skip
        conversation = Conversation(chat)
        if sys.stdin is not None and sys.stdin.isatty():
            _talk(conversation)
        else:
            for line in _lines():
                conversation.take(line)
                if line.strip() and not line.startswith("/"):
                    print(flush=True)  # answers may have several paragraphs
                if conversation.ended:
                    break


def _talk(conversation: Conversation) -> None:
    """Takes lines from a terminal, until Ctrl-D or /quit. What goes wrong is told, and the next line taken."""
    with suppress(ImportError):  # not everywhere
        import readline  # noqa: F401  editing of lines
    tell(f"{conversation.described()}; /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends")
    while not conversation.ended:
        try:
            line = input(f"{conversation.prompt()} > ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        try:
            conversation.take(line)
        except KeyboardInterrupt:  # what was written so far stays in the state
            print()
            tell("stopped; the answer counts as far as it was written")
        except Exception as error:  # a policy of one's own, too; what was said is not lost for it
            tell(judged(error)[1])


def _lines() -> Iterator[str]:
    """The lines of standard input, each as soon as it is complete."""
    rest = ""
    for text in decoded(iter(standard_input().readline, b""), "standard input"):
        *lines, rest = (rest + text).split("\n")
        yield from (line.rstrip("\r") for line in lines)
    if rest:
        yield rest
