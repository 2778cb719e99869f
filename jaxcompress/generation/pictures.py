"""Pictures from files and arrays, as vision towers see them: 8-bit RGB, then the checkpoint's own image processor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxcompress._extras import extra
from jaxcompress.models.llava import LlavaConfig, crops_of
from jaxcompress.models.tower_config import TowerConfig

with extra("vision"):
    from PIL import ExifTags, Image, UnidentifiedImageError

MOST_TIMES_AS_WIDE = 200
"""Processors that resize by the shorter side would make such a strip enormous."""
MOST_TIMES_AS_LARGE = 8
"""How many times the side that a tower sees a processor may resize to before it cuts."""

Picture = str | Path | Image.Image | np.ndarray | jax.Array
"""A file, a Pillow image, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of uint8, uint16 or floats in 0..1."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets a picture upright, by EXIF's orientation; 1 is upright."""
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_EIGHT_OF_SIXTEEN = ((np.arange(65536) + 128) // 257).tolist()
_STRAIGHT = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
"""The mode with alpha beside the colours, of modes that Pillow cannot lay on another picture."""


class Processed(NamedTuple):
    """Pictures as a tower sees them.

    Attributes:
      pixels: [crops, channels, side, side], of all pictures one after the other.
      sizes: (height, width) of each picture before, upright.
    """

    pixels: Float[np.ndarray, "crops channels side side"]
    sizes: tuple[tuple[int, int], ...]


def open_picture(picture: Picture | Any, name: str | None = None) -> Image.Image:
    """A picture as 8-bit RGB, upright, as an image viewer shows it.

    A photograph that its EXIF data call turned or mirrored is set upright, and the result has no such mark left. Grey
    becomes three equal channels, 16 bits are scaled to 8, and what is transparent is laid on white: a processor alone
    would show the first sideways, clip the second and show whatever colour lies under the third. Of an animation the
    first frame is seen, or where a Pillow image stands. Every picture of this library goes through here.

    Args:
      name: what messages call it; its path, or `the picture`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not an image, damaged, without a pixel, of a shape or numbers that no image has, more than 200 times
        as wide as high (or as high as wide), or with more pixels than `PIL.Image.MAX_IMAGE_PIXELS`. Sizes are checked
        before anything is decoded.
    """
    name = name or (str(picture) if isinstance(picture, str | Path) else "the picture")
    if isinstance(picture, str | Path):
        return _from_file(Path(os.path.expanduser(picture)), name)
    if isinstance(picture, np.ndarray | jax.Array):
        return _from_array(np.asarray(picture), name)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"{name} is of type {type(picture).__name__}; give a file's path, a Pillow image or an array")
    return _from_image(picture, name)


def _from_file(path: Path, name: str) -> Image.Image:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{name} is a folder; give a file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be opened: {error}") from error
    with file, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            raise ValueError(f"{name} is not an image that Pillow can open") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(f"{name} is too large: {error}") from error
        except Exception as error:  # of any type: Pillow's readers trust what a file says of itself
            raise ValueError(f"{name} is damaged: {error}") from error
        return _from_image(image, name)


def _from_image(image: Image.Image, name: str) -> Image.Image:
    (width, height), most = image.size, Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise ValueError(
            f"{name} is too large: {width} x {height} pixels are more than {most}; make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    _check_sides(width, height, name)
    try:
        upright = _upright(image)
    except Exception as error:  # of any type: what is damaged shows only when it is decoded
        raise ValueError(f"{name} is damaged: {error}") from error
    if upright.mode == "F":
        return _from_array(np.asarray(upright), name)
    try:
        return _rgb(upright)
    except Exception as error:
        raise ValueError(f"{name} is of mode {image.mode}, of which Pillow makes no RGB: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """The decoded picture as its EXIF data want it shown; data that cannot be read say nothing."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of any type, as above
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB without marks that would turn it again."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(_EIGHT_OF_SIXTEEN, "L")  # which clips what is outside 16 bits
    if straight := _STRAIGHT.get(image.mode, "RGBA" if "transparency" in image.info else None):
        image = image.convert(straight)
    if image.mode in ("LA", "RGBA"):
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    image = image.convert("RGB")
    image.info = {}
    return image


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(f"{name} has shape {list(array.shape)}; expected [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    _check_sides(array.shape[1], array.shape[0], name)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == np.uint16:
        array = ((array + np.uint32(128)) // np.uint32(257)).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        if not ((array >= 0) & (array <= 1)).all():  # false for NaN, too
            raise ValueError(f"{name} has floats outside 0..1: {array.min():.4g} to {array.max():.4g}")
        scaled = array * array.dtype.type(255) if array.dtype != np.float16 else array.astype(np.float32) * 255
        array = np.rint(scaled, out=scaled).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} is of {array.dtype.name}; expected uint8, uint16 or floats in 0..1")
    return _rgb(Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array)))


def _check_sides(width: int, height: int, name: str) -> None:
    if not width or not height:
        raise ValueError(f"{name} is {width} x {height} pixels: there is nothing to see")
    if max(width, height) > MOST_TIMES_AS_WIDE * min(width, height):
        raise ValueError(
            f"{name} is {width} x {height} pixels; a side may be at most {MOST_TIMES_AS_WIDE} times the other: "
            "crop it, or cut it into pieces"
        )


def process(pictures: Sequence[Picture], processor: Any, config: LlavaConfig | TowerConfig) -> Processed:
    """Pictures through a checkpoint's image processor.

    Args:
      processor: of transformers (`LoadedTower.processor`, `LoadedLlava.processor`).
      config: of the model: how many crops LLaVA-NeXT sees of a picture.

    Raises:
      ValueError: see `open_picture`; the picture is named by its number. The processor fails, resizes to far more than
        the tower sees, makes numbers that are not finite, or images of another size or number than the model sees.
    """
    if isinstance(pictures, str | Path | Image.Image):
        raise ValueError(f"pictures are a list of pictures, not {type(pictures).__name__}; write [picture]")
    tower = config if isinstance(config, TowerConfig) else config.tower
    _check_processor(processor, tower, config)
    named = lambda i, p: str(p) if isinstance(p, str | Path) else f"picture {i}"
    side = (tower.channels, tower.image_size, tower.image_size)
    crops, sizes = [np.zeros((0, *side), np.float32)], []
    for number, picture in enumerate(pictures):
        name = named(number, picture)
        image = open_picture(picture, name)
        size = image.height, image.width
        pixels = _processed(processor, image, name)
        if pixels.shape[1:] != side:
            raise ValueError(
                f"the image processor makes images of {list(pixels.shape[1:])}, the tower sees {list(side)}"
            )
        expected = crops_of(config, size) if isinstance(config, LlavaConfig) else 1
        if len(pixels) != expected:
            raise ValueError(f"the image processor makes {len(pixels)} crops of {name}, the model sees {expected}")
        crops.append(pixels)
        sizes.append(size)
    return Processed(np.concatenate(crops), tuple(sizes))


def _processed(processor: Any, image: Image.Image, name: str) -> Float[np.ndarray, "crops C H W"]:
    try:
        with np.errstate(all="ignore"):  # what is not finite is found below
            pixels = np.asarray(processor(images=[image], return_tensors="np")["pixel_values"], np.float32)
    except Exception as error:  # of any type: a processor trusts its settings
        raise ValueError(f"the image processor cannot take {name}: {error!r}; see preprocessor_config.json") from error
    if pixels.ndim not in (4, 5):
        raise ValueError(f"the image processor makes images of shape {list(pixels.shape)}, not [crops, C, H, W]")
    if not np.isfinite(pixels).all():
        raise ValueError(
            f"the image processor makes numbers of {name} that are not finite; see image_mean, image_std and "
            "rescale_factor in preprocessor_config.json"
        )
    return pixels.reshape(-1, *pixels.shape[-3:])


def _check_processor(processor: Any, tower: TowerConfig, config: LlavaConfig | TowerConfig) -> None:
    """Before a picture is made enormous: a processor resizes first and is wrong after."""
    most = MOST_TIMES_AS_LARGE * tower.image_size
    for setting in ("size", "crop_size", "pad_size"):
        given = getattr(processor, setting, None)
        given = given if isinstance(given, Mapping | int | None) else vars(given)  # transformers' SizeDict
        for side in [given.get(key) for key in _SIDES] if isinstance(given, Mapping) else [given]:
            if side is not None and not (isinstance(side, int) and 0 < side <= most):
                raise ValueError(
                    f"the image processor's {setting} has a side of {side}; the tower sees {tower.image_size}, so "
                    f"give 1 to {most} in preprocessor_config.json"
                )
    tiles = getattr(processor, "image_grid_pinpoints", None)
    if isinstance(config, LlavaConfig) and config.pinpoints and tiles is not None:
        theirs = [tuple(point) for point in tiles]
        if sorted(theirs) != sorted(config.pinpoints):
            raise ValueError(
                f"the image processor cuts tiles at {theirs}, the model at {list(config.pinpoints)}: "
                "image_grid_pinpoints in preprocessor_config.json and config.json must be the same"
            )
