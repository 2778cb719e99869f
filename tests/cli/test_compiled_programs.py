"""Compiled programs on disk: a bounded folder, whose oldest files go."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest

from jaxcompress.cli import runtime
from jaxcompress.inputs.newest_files import bytes_of, keep_newest


def test_the_files_used_last_stay(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "older", "oldest"]):
        (tmp_path / name).write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (1000 - age, 500))
    keep_newest(tmp_path, 300)
    assert bytes_of(tmp_path) == 300
    keep_newest(tmp_path, 250)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "older"}
    keep_newest(tmp_path, 0)
    assert bytes_of(tmp_path) == 0
    keep_newest(tmp_path / "missing", 0)
    assert bytes_of(tmp_path / "missing") == 0


@pytest.mark.parametrize("variable", [None, "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"])
def test_the_bound_is_for_the_folder_of_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    """Where JAX's own variables say the place or the bound, the user decides."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    asked, set_to = [], {}
    monkeypatch.setattr(runtime, "keep_newest", lambda *given: asked.append(given))
    monkeypatch.setattr(jax.config, "update", set_to.__setitem__)
    runtime.prepare()
    assert asked == ([(runtime.CACHE, runtime.CACHE_BYTES)] if variable is None else [])
    assert ("jax_compilation_cache_dir" in set_to) == (variable != "JAX_COMPILATION_CACHE_DIR")
