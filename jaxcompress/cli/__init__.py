"""The command line: a thin face over the library. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from jaxcompress.cli.compare import Compare
from jaxcompress.cli.compress_prompt import CompressPrompt
from jaxcompress.cli.demo import Demo
from jaxcompress.cli.generate import Generate
from jaxcompress.cli.info import Info
from jaxcompress.cli.perplexity import Perplexity
from jaxcompress.cli.retention import Retention
from jaxcompress.cli.trace import Trace
from jaxcompress.cli.train import Train, with_settings

DESCRIPTION = """Transformers that live in a fixed amount of memory.

Exit codes: 0 done; 1 numbers went wrong (non-finite weights or logits); 2 bad input; 130 interrupted.

Example: jaxcompress generate --prompt 'def main(' --policy tova --slots 128"""

COMMANDS = {
    "demo": Demo,
    "compare": Compare,
    "compress-prompt": CompressPrompt,
    "generate": Generate,
    "perplexity": Perplexity,
    "trace": Trace,
    "retention": Retention,
    "train": Train,
    "info": Info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="jaxcompress",
            description=DESCRIPTION,
            args=with_settings(arguments) if arguments[:1] == ["train"] else arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere, without complaint
        return 0
    except KeyboardInterrupt:
        print("\njaxcompress: interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"jaxcompress: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"jaxcompress: {error}", file=sys.stderr)
        return 2
    return 0
