"""What an error means for the person at the command line: an exit code, and one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from jaxcompress.cli.runtime import Incomplete


def judged(error: Exception) -> tuple[int, str]:
    """The exit code of an error, and the line that tells it."""
    if os.environ.get("JAXCOMPRESS_TRACEBACK"):
        traceback.print_exception(error)
    code, said = _judged(error)
    return code, " ".join(filter(None, map(str.strip, said.splitlines())))


def _judged(error: Exception) -> tuple[int, str]:
    said = str(error) or type(error).__name__
    if isinstance(error, Incomplete):
        return 4, said
    if isinstance(error, FloatingPointError):
        return 1, said
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:  # the latter is XLA's, by whatever name
        first = said.strip().splitlines()[0]
        return 2, f"out of memory ({first}); ask for fewer --slots, --rows or tokens, or a smaller --dtype"
    if isinstance(error, ValueError | OSError | ImportError):
        return 2, said
    *_, last = frames = traceback.extract_tb(error.__traceback__)
    if (own := _in_own_policy(frames)) is not None:
        return 2, f"{own.filename}, line {own.lineno}: {type(error).__name__}: {said}; {own.name} of your policy failed"
    where = f"{os.path.basename(last.filename)}, line {last.lineno}"
    return 3, (
        f"a fault of jaxcompress: {type(error).__name__}: {said} ({where}); please report it, with "
        "what JAXCOMPRESS_TRACEBACK=1 shows"
    )


def _in_own_policy(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary | None:
    """The last frame in a policy of the user's own, FILE.py:NAME."""
    own = sys.modules.get("jaxcompress.policies.own")  # absent if none was asked for
    return None if own is None else next((one for one in reversed(frames) if own.is_own_file(one.filename)), None)
