"""How tests run: two CPU devices, shape annotations checked, examples that repeat."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

# Most of the time of a test goes into compiling what runs once: code that is compiled in a third of the time will do.
# Before JAX is imported; what is set in the environment counts.
os.environ["XLA_FLAGS"] = " ".join([
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # two processes of tests have both cores
    # From 0.12 on jaxlib does not know this one, and ends the process for it.
    "--xla_cpu_use_fusion_emitters=false" if [*map(int, version("jaxlib").split(".")[:2])] < [0, 12] else "",
    os.environ.get("XLA_FLAGS", ""),
])  # fmt: skip

import hypothesis
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)

# Compiled functions are kept between runs: most of the time of a first run goes into compiling.
_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
jax.config.update("jax_compilation_cache_dir", str(Path(_cache) / "jaxcompress" / "tests"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Traced programs are millions of small objects; looking through all of them for garbage takes a tenth of the time.
gc.set_threshold(200_000, 20, 20)


def _the_first_time_only(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """A function that another one makes at each call is checked when it is made first: a check takes long to make."""
    made: set[Any] = set()

    def once(*args: Any, **fields: Any) -> Callable[[Any], Any]:
        checked = jaxtyped(*args, **fields)

        def of(function: Any) -> Any:
            code = getattr(function, "__code__", function)
            if code in made and "<locals>" in function.__qualname__:
                return function
            made.add(code)
            return checked(function)

        return of

    return once


# Shape annotations are checked here and nowhere else. Before any module of the package is imported.
jaxtyping.jaxtyped = _the_first_time_only(jaxtyping.jaxtyped)
install_import_hook("jaxcompress", "beartype.beartype")

from jaxcompress.state.kv_state import KVState  # noqa: E402  after the hook
from jaxcompress.state.storage import Quantised  # noqa: E402


def _check_those_that_the_package_builds(kind: type) -> None:
    """Not those that jax rebuilds from leaves: their leaves may be anything, or have axes in front."""
    checked: Any = kind.__init__
    plain = checked.__wrapped__

    def init(self: Any, *args: Any, **fields: Any) -> None:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        ours = caller == "dataclasses" or caller.startswith("jaxcompress.")  # dataclasses: `replace`
        arrays = isinstance(args[0] if args else next(iter(fields.values())), jax.Array)
        (checked if ours and arrays else plain)(self, *args, **fields)

    kind.__init__ = init


_check_those_that_the_package_builds(KVState)
_check_those_that_the_package_builds(Quantised)

# The same examples at every run, so that a failure can be seen again; HYPOTHESIS_PROFILE=search draws new ones.
_shared = dict(deadline=None, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("repeat", max_examples=15, derandomize=True, **_shared)
hypothesis.settings.register_profile("search", max_examples=200, **_shared)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture
def as_users_call_it() -> Iterator[None]:
    """Annotations are not checked, as outside of tests: wrong arguments meet what the functions themselves say."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


UNTIL = float(os.environ.get("TESTS_UNTIL", "inf"))  # seconds since 1970; `.ci/run` gives its slow tests so long
FROM = int(os.environ.get("TESTS_FROM", 0))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with another test for each number FROM: those for which no time is left are not always the same."""
    first = FROM % max(1, len(items))
    items[:] = items[first:] + items[:first]


def pytest_runtest_setup() -> None:
    """No test begins after the time UNTIL."""
    if time.time() > UNTIL:
        pytest.skip("no time is left")


MOST_MAPPINGS = 30_000  # of memory; Linux allows a process 65,530, and each compiled function takes some 200
_tests = count(1)


def pytest_runtest_teardown() -> None:
    """Compiled functions are let go before a process that ran hundreds of tests has no mappings left for more."""
    if next(_tests) % 5:  # to count them takes milliseconds
        return
    try:
        many = Path("/proc/self/maps").read_bytes().count(b"\n") > MOST_MAPPINGS
    except OSError:  # not Linux
        return
    if many:
        jax.clear_caches()
