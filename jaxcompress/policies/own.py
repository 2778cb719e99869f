"""A policy of one's own, by the file or module in which it stands: `mine.py:Far`.

The file is run. What stands after the last colon is a class of policies by its label, which is the class's name if it
has none, with settings as in any name (`mine.py:Far-reach8`); or a variable that holds a policy. Paths may contain any
letters: only the last colon counts, and no modifier contains one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax

from jaxcompress.policies.labels import read, spellings
from jaxcompress.policies.policy import Policy
from jaxcompress.state.values import Value

_PREFIX = "_own_policy_"


def is_own_file(path: str) -> bool:
    """Whether a policy was taken from this file."""
    own = (module for name, module in sys.modules.items() if name.startswith(_PREFIX))
    return path in {module.__file__ for module in own}


def own_policy(place: str, text: str) -> Policy:
    """A policy of a Python file or module.

    Args:
      place: the path of a file that ends in .py, or a module that can be imported, such as `lab.policies`.
      text: the name of a class with its settings, or of a policy.

    Raises:
      ValueError: there is no such file or module, it cannot be run, or it has no such policy; or settings that the
        class does not have or needs.
    """
    module = _of_file(Path(place).expanduser()) if place.endswith(".py") else _of_name(place)
    classes = {name: one for name, one in vars(module).items() if isinstance(one, type) and issubclass(one, Policy)}
    decorated = {name: one for name, one in classes.items() if "__dataclass_fields__" in vars(one)}
    made = {name: one for name, one in vars(module).items() if isinstance(one, Policy)}
    name = text.partition("-")[0]
    if text in made:
        return made[text]
    for one in decorated.values():
        if (policy := read(one, text)) is not None:
            return policy
    if name in decorated:
        raise ValueError(f"{place}:{name} goes by its label, {' or '.join(spellings(decorated[name]))}")
    if name in classes:
        raise ValueError(f"{place}:{name} is not decorated: write @policy in the line above `class {name}`")
    here = [one for one in decorated.values() if one.__module__ == module.__name__]
    known = ", ".join((*(spelling for one in here for spelling in spellings(one)), *made)) or "none"
    if hasattr(module, name):
        raise ValueError(f"{place}:{text} is no policy but {getattr(module, name)!r:.60}; the policies in it: {known}")
    raise ValueError(f"{place} has no policy {text!r}; the policies in it: {known}")


def check_place(place: str) -> None:
    """Raises ValueError if a place that ends in .py is no file. Modules are looked for when they are imported."""
    path = Path(place).expanduser()
    if place.endswith(".py") and not path.is_file():
        raise ValueError(f"there is no file {path} to take a policy from")


def own_source(place: str) -> bytes:
    """The code of a file or module, which need not be there: then nothing."""
    path = Path(place).expanduser()
    if not place.endswith(".py"):
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            return b""
        path = Path("" if found is None or found.origin is None else found.origin)
    return path.read_bytes() if path.is_file() else b""


def own_code(policy: Policy) -> bytes:
    """What stands for the code of a policy's classes, where it is not the package's; empty if it all is.

    The name of a policy does not say this. Code that cannot be read, such as that of a class typed into a session,
    stands for nothing but this call.
    """
    known = {"jaxcompress", *sys.stdlib_module_names}
    classes = {cls for one in _parts(policy) for cls in type(one).__mro__ if cls.__module__.split(".")[0] not in known}
    digest = hashlib.sha256()
    for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)):
        digest.update(f"{cls.__module__} {cls.__qualname__}\n".encode())
        if not cls.__module__.startswith(_PREFIX):  # that name holds a hash of the source that was run
            place = getattr(sys.modules.get(cls.__module__), "__file__", None) or cls.__module__
            digest.update(hashlib.sha256(own_source(place) or secrets.token_bytes(32)).digest())
    return digest.digest() if classes else b""


def _parts(one: Value) -> Iterator[Value]:
    """A value and all values inside it."""
    yield one
    for inner in jax.tree.leaves(one, is_leaf=lambda x: x is not one and isinstance(x, Value)):
        if isinstance(inner, Value):
            yield from _parts(inner)


def _of_file(path: Path) -> ModuleType:
    """The module of a file. The same content is run once, so that policies of it are equal whenever they are made."""
    check_place(str(path))
    source = path.read_bytes()
    name = f"{_PREFIX}{path.stem}_{hashlib.sha256(str(path.resolve()).encode() + source).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    module.__file__ = str(path.resolve())
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source, module.__file__, "exec"), vars(module))
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return module


def _of_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ValueError(
            f"the module {name!r} cannot be imported: {type(error).__name__}: {error}; give a file by its path with .py"
        ) from error
