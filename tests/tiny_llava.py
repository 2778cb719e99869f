"""LLaVA models with random weights of PyTorch's, two pictures, and what PyTorch's models say about them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.checkpoints import Loaded, load_llava
from jaxcompress.generation.visual import ImageFeatures, encode_images

FIXTURES = Path(__file__).parent / "fixtures" / "vision_models"


@cache
def loaded(name: str) -> Loaded:
    return load_llava(FIXTURES / name, dtype="float32")


@cache
def io(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "io.npz") as file:
        return dict(file)


@cache
def pictures(name: str) -> tuple[np.ndarray, list[list[Any]] | None]:
    """Crops of both pictures one after the other, and the pictures' sizes where they matter."""
    given = io(name)
    crops = [row[:n] for row, n in zip(given["pixels"].astype(np.float32), given["crops"], strict=True)]
    sizes = [[tuple(map(int, size))] for size in given["sizes"]] if loaded(name).config.pinpoints else None
    return np.concatenate(crops), sizes


@cache
def seen(name: str, row: int | None = None) -> ImageFeatures:
    """Both pictures, in a batch of two rows, or one alone."""
    crops, sizes = pictures(name)
    if row is not None:
        at = np.cumsum([0, *io(name)["crops"]])
        crops, sizes = crops[at[row] : at[row + 1]], None if sizes is None else sizes[row : row + 1]
    return encode_images(loaded(name).model, crops, sizes)


def short_prompts(name: str) -> list[list[int]]:
    """With one image token for each picture."""
    token, out = loaded(name).config.image_token, []
    for row in range(2):
        ids = io(name)[f"tokens_{row}"][0].tolist()
        first = ids.index(token)
        out.append([*ids[: first + 1], *(i for i in ids[first:] if i != token)])
    return out
