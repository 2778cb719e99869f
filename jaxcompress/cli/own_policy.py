"""A policy from a user's own Python file: FILE.py:NAME."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxcompress.policies import Policy

_SPELLED = re.compile(r"(?P<file>.*\.py):(?P<name>[^/]*)(?P<modifiers>(/.*)?)", re.DOTALL)


def own_policy(spelled: str) -> Policy | None:
    """The policy that FILE.py:NAME names, modifiers applied; None for what is not spelled so.

    NAME is a policy, or a class of policies whose settings all have defaults. The file is run once.

    Raises:
      ValueError: the file fails, or NAME is not in it or is no policy.
      OSError: the file cannot be read.
    """
    from jaxcompress.policies import Policy
    from jaxcompress.policies.names import get_policy

    parts = _SPELLED.fullmatch(spelled)
    if parts is None:
        return None
    file, name = parts["file"], parts["name"]
    module = _module(Path(file).expanduser().resolve())
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Policy):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(f"{name} in {file} needs settings ({error}); give a policy made with them") from error
    if not isinstance(found, Policy):
        what = "there is no such name" if found is None else f"it is a {type(found).__name__}"
        raise ValueError(f"{name!r} in {file} must be a policy or a class of policies; {what}")
    return get_policy(f"learned{parts['modifiers']}", learned=found)


@cache
def _module(path: Path) -> ModuleType:
    """The module of a file, made once, so that its classes are the same at every use."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"policy_file_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's program, and raises what it likes
        raise ValueError(f"{path} fails: {type(error).__name__}: {error}") from error
    return module
