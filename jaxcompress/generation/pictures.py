"""Pictures from files and arrays, as vision towers see them: 8-bit RGB, then the checkpoint's own image processor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError

from jaxcompress.models.llava import LlavaConfig, crops_of
from jaxcompress.models.vit import TowerConfig

MOST_TIMES_AS_WIDE = 200
"""Processors that resize by the shorter side would make such a strip enormous."""

Picture = str | Path | Image.Image | np.ndarray
"""A file, a Pillow image, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16 or floats in 0..1."""


class Processed(NamedTuple):
    """Pictures as a tower sees them.

    Attributes:
      pixels: [crops, channels, side, side], of all pictures one after the other.
      sizes: (height, width) of each picture before.
    """

    pixels: Float[np.ndarray, "crops channels side side"]
    sizes: tuple[tuple[int, int], ...]


def open_picture(picture: Picture, name: str | None = None) -> Image.Image:
    """A picture as 8-bit RGB.

    Grey becomes three equal channels, 16 bits are scaled to 8, and what is transparent is laid on white: a processor
    alone would clip the first and show whatever colour lies under the second.

    Args:
      name: what messages call it; its path, or `the picture`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not an image, damaged, without a pixel, of a shape or numbers that no image has, more than 200 times
        as wide as high (or as high as wide), or larger than Pillow opens.
    """
    name = name or (str(picture) if isinstance(picture, str | Path) else "the picture")
    image = _from_array(picture, name) if isinstance(picture, np.ndarray) else picture
    if isinstance(image, str | Path):
        image = _from_file(Path(image).expanduser(), name)
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{name} is {width} x {height} pixels: there is nothing to see")
    if max(width, height) > MOST_TIMES_AS_WIDE * min(width, height):
        raise ValueError(
            f"{name} is {width} x {height} pixels; a side may be at most {MOST_TIMES_AS_WIDE} times the other: "
            "crop it, or cut it into pieces"
        )
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image, np.float64).clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode == "F":
        return open_picture(np.asarray(image), name)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _from_file(path: Path, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.copy()
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that Pillow can open") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} is too large: {error}") from error
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (OSError, SyntaxError) as error:
        if path.is_dir():
            raise ValueError(f"{name} is a folder; give a file") from None
        raise ValueError(f"{name} is damaged: {error}") from error


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"{name} has shape {list(array.shape)}; expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if not array.size:
        raise ValueError(f"{name} is {array.shape[1]} x {array.shape[0]} pixels: there is nothing to see")
    if array.dtype == np.uint16:
        array = np.rint(array / 257).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not ((array >= 0) & (array <= 1)).all():  # false for NaN, too
            raise ValueError(f"{name} has floats outside 0..1: {array.min():.4g} to {array.max():.4g}")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} is of {array.dtype.name}; expected uint8, uint16 or floats in 0..1")
    return Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)


def process(pictures: Sequence[Picture], processor: Any, config: LlavaConfig | TowerConfig) -> Processed:
    """Pictures through a checkpoint's image processor.

    Args:
      processor: of transformers (`LoadedTower.processor()`, `LoadedLlava.processor()`).
      config: of the model: how many crops LLaVA-NeXT sees of a picture.

    Raises:
      ValueError: see `open_picture`; the picture is named by its number. The processor makes images of another size
        than the tower sees.
    """
    tower = config if isinstance(config, TowerConfig) else config.tower
    named = lambda i, p: str(p) if isinstance(p, str | Path) else f"picture {i}"
    opened = [open_picture(picture, named(i, picture)) for i, picture in enumerate(pictures)]
    side = (tower.channels, tower.image_size, tower.image_size)
    crops, sizes = [np.zeros((0, *side), np.float32)], tuple((image.height, image.width) for image in opened)
    for image, size in zip(opened, sizes, strict=True):
        pixels = np.asarray(processor(images=[image], return_tensors="np")["pixel_values"], np.float32)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        if pixels.shape[1:] != side:
            raise ValueError(
                f"the image processor makes images of {list(pixels.shape[1:])}, the tower sees {list(side)}"
            )
        crops.append(pixels[: crops_of(config, size)] if isinstance(config, LlavaConfig) else pixels)
    return Processed(np.concatenate(crops), sizes)
