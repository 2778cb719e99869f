"""Which versions fit together, and what importing the package costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxcompress
from jaxcompress import _versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    ("jax", "flax"),
    [("0.8.1", "0.12.6"), ("0.10.2", "0.12.6"), ("0.11.2", "0.12.12"), ("0.12.0", "0.13.0"), ("1.0.0", "1.0.0")],
)
def test_pairs_that_fit(jax: str, flax: str) -> None:
    _versions.check(jax, flax)


def test_development_versions_are_compared_by_their_numbers() -> None:
    _versions.check("0.11.2.dev20260101", "0.12.12.post1")


def test_the_version_is_the_same_everywhere() -> None:
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert PROJECT["version"] == jaxcompress.__version__ == cited[1]


@pytest.mark.parametrize("package", ["jax", "flax"])
def test_the_oldest_allowed_are_the_oldest_that_can_be_installed(package: str) -> None:
    bounds = dict(one.split(">=") for one in PROJECT["dependencies"] if one.startswith(("jax>", "flax>")))
    _versions.check(**bounds)
    major, minor, patch = map(int, bounds[package].split("."))
    below = f"{major}.{minor}.{patch - 1}" if patch else f"{major}.{minor - 1}.99"
    with pytest.raises(ImportError, match=f"needs {package} {re.escape(bounds[package])} or later"):
        _versions.check(**bounds | {package: below})


def test_what_is_installed_fits() -> None:
    _versions.check()


@pytest.mark.parametrize(
    ("jax", "flax", "says"),
    [
        ("0.11.2", "0.12.8", r"jax 0\.11 needs flax 0\.12\.10.*Run: pip install -U flax"),
        ("0.7.2", "0.12.8", r"needs jax 0\.8\.1 or later.*Run: pip install -U jax flax"),
        ("0.4.38", "0.10.2", r"needs jax 0\.8\.1 or later.*Run: pip install -U jax flax"),
        ("0.10.2", "0.12.5", r"needs flax 0\.12\.6 or later.*Run: pip install -U flax"),
        ("0.10.2", "0.9.0", r"needs flax 0\.12\.6 or later.*Run: pip install -U flax"),
    ],
)
def test_pairs_that_do_not_fit_say_what_to_install(jax: str, flax: str, says: str) -> None:
    with pytest.raises(ImportError, match=says) as caught:
        _versions.check(jax, flax)
    assert f"here are jax {jax} and flax {flax}" in str(caught.value)


@pytest.mark.parametrize("module", ["jaxcompress", "jaxcompress.__main__", "jaxcompress.cli"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('jax', 'flax', 'numpy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
