"""The command line: a thin face over the library. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from jaxcompress import __version__
from jaxcompress.cli.arguments import check_numbers, check_text
from jaxcompress.cli.board import Board
from jaxcompress.cli.chat import Chat
from jaxcompress.cli.compare import Compare
from jaxcompress.cli.compress_corpus import CompressCorpus
from jaxcompress.cli.compress_prompt import CompressPrompt
from jaxcompress.cli.demo import Demo
from jaxcompress.cli.failures import judged
from jaxcompress.cli.generate import Generate
from jaxcompress.cli.info import Info
from jaxcompress.cli.mesh import ProfileFlag
from jaxcompress.cli.parser import parsed
from jaxcompress.cli.paths import check_paths
from jaxcompress.cli.perplexity import Perplexity
from jaxcompress.cli.retention import Retention
from jaxcompress.cli.ruler import Ruler
from jaxcompress.cli.runtime import tell, told_warnings
from jaxcompress.cli.serve import Serve
from jaxcompress.cli.trace import Trace
from jaxcompress.cli.train import Train, train_defaults
from jaxcompress.cli.vision_demo import VisionDemo

DESCRIPTION = """Transformers that live in a fixed amount of memory.

Exit codes: 0 done; 1 numbers went wrong (non-finite weights or logits); 2 bad input, or more than fits into memory;
3 a fault of jaxcompress itself (set JAXCOMPRESS_TRACEBACK=1 to see where); 4 some cells of a sweep failed, the others
are done; 130 interrupted.

jaxcompress --version prints the version.

Example: jaxcompress generate --prompt 'Return a copy of' --policy tova --slots 128"""

COMMANDS = {
    "demo": Demo,
    "chat": Chat,
    "compare": Compare,
    "compress-prompt": CompressPrompt,
    "compress-corpus": CompressCorpus,
    "generate": Generate,
    "perplexity": Perplexity,
    "trace": Trace,
    "retention": Retention,
    "ruler": Ruler,
    "board": Board,
    "serve": Serve,
    "train": Train,
    "info": Info,
    "vision-demo": VisionDemo,
}


def command_of(arguments: Sequence[str]) -> Any:
    """The command that a command line asks for, ready to `run`.

    Raises:
      ValueError: arguments that no command takes.
      OSError: a file of settings cannot be read.
      SystemExit: help was asked for, and printed.
    """
    check_text(arguments)
    defaults = dict(train=train_defaults(arguments[1:])) if arguments[:1] == ["train"] else {}
    command = parsed(COMMANDS, arguments, description=DESCRIPTION, defaults=defaults)
    check_numbers(command)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code. A failure is told in one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments == ["--version"]:
            print(f"jaxcompress {__version__}")
        else:
            _run(command_of(arguments))
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        _silence()
        return 0
    except KeyboardInterrupt:
        print("\njaxcompress: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        code, said = judged(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _silence()
        tell(said)
        return code
    return 0


def _run(command: Any) -> None:
    check_paths(command)
    with told_warnings(), _profiled(command):
        command.run()


def _profiled(command: object) -> AbstractContextManager[None]:
    """Writes a trace of a command that was asked for one."""
    return command.profiled() if isinstance(command, ProfileFlag) else nullcontext()


def _silence() -> None:
    """Discards what is left to print."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
