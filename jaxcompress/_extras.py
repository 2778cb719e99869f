"""Optional dependencies: which packages belong to which extra, and one message for a package that is missing.

`pip install jaxcompress` installs what inference needs. Every other package is imported inside `extra`:

    with extra("train"):
        import optax
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Extra(NamedTuple):
    """An extra of pyproject.toml.

    Attributes:
      purpose: what it is for; begins the message.
      modules: the top-level modules that its packages install.
    """

    purpose: str
    modules: tuple[str, ...]


EXTRAS = {
    "train": Extra("training", ("optax", "orbax", "grain", "tqdm")),
    "vision": Extra("reading pictures", ("PIL",)),
    "plots": Extra("drawing figures", ("matplotlib",)),
    "cli": Extra("the command line", ("tyro", "tqdm")),
    "gguf": Extra("reading GGUF files", ("gguf",)),
    "int8": Extra("holding weights in int8", ("qwix",)),
    "data": Extra("reading a dataset of the Hugging Face hub", ("datasets",)),
    "tensorboard": Extra("logging for TensorBoard", ("tensorboardX",)),
    "lm-eval": Extra("evaluating with lm-evaluation-harness", ("lm_eval",)),
    "serve": Extra("the server", ("starlette", "uvicorn", "prometheus_client")),
    "teacher": Extra("asking a teacher at an endpoint", ("openai",)),
    "parquet": Extra("reading and writing Parquet", ("pyarrow",)),
    "langchain": Extra("the document compressor of LangChain", ("langchain_core",)),
    "llama-index": Extra("the node postprocessor of LlamaIndex", ("llama_index",)),
    "ray": Extra("compressing a corpus on several machines", ("ray",)),
}


FRAMEWORKS = frozenset({"langchain", "llama-index", "ray"})
"""Extras that the extra `all` does not have: who wants one has its framework already, and it is large."""


class MissingExtra(ImportError):
    """A package of an extra is not installed."""


@contextmanager
def extra(name: str, purpose: str = "") -> Iterator[None]:
    """Surrounds imports of an extra's packages.

    Args:
      name: a key of `EXTRAS`.
      purpose: begins the message in place of the purpose there.

    Raises:
      MissingExtra: one of the packages is not installed; says what to install. Other errors are passed on.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS[name].modules:
            raise
        raise MissingExtra(
            f"{purpose or EXTRAS[name].purpose} needs {package}, which is not installed. "
            f'Run: pip install "jaxcompress[{name}]"',
            name=package,
        ) from None
