"""Prepares pictures from files and arrays for vision towers: 8-bit RGB, then the checkpoint's image processor."""

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
"""Limit on the ratio of sides. A processor that resizes by the shorter side would make a longer strip enormous."""
MOST_TIMES_AS_LARGE = 8
"""Limit on the side that a processor resizes to before it crops, as a multiple of the tower's image side."""

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
"""The operation that sets a picture upright, by EXIF orientation; 1 is upright."""
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_EIGHT_OF_SIXTEEN = ((np.arange(65536) + 128) // 257).tolist()
_STRAIGHT = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
"""For modes that Pillow cannot composite: the equivalent mode with straight alpha."""


class Processed(NamedTuple):
    """Pictures in the form that a tower takes.

    Attributes:
      pixels: [crops, channels, side, side], crops of all pictures one after the other.
      sizes: (height, width) of each picture before processing, upright.
    """

    pixels: Float[np.ndarray, "crops channels side side"]
    sizes: tuple[tuple[int, int], ...]


def open_picture(picture: Picture | Any, name: str | None = None) -> Image.Image:
    """A picture as upright 8-bit RGB, as an image viewer shows it.

    A picture whose EXIF orientation is turned or mirrored is set upright, and the result has no EXIF orientation. Grey
    becomes three equal channels, 16 bits are scaled to 8, and transparent areas are composited on white. A processor
    alone would show turned pictures sideways, clip 16 bits, and show the colour under transparent areas. An animation
    gives its first frame; a Pillow image gives its current frame. Every picture in this library goes through this
    function.

    Args:
      name: name of the picture in messages; by default its path, or `the picture`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the input is not an image, is damaged or has no pixels; its shape or numbers are invalid for an image;
        one side is more than 200 times the other; or it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`. Sizes are
        checked before decoding.
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
        except Exception as error:  # of any type: Pillow's readers trust the file's header
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
    except Exception as error:  # of any type: damage shows only on decoding
        raise ValueError(f"{name} is damaged: {error}") from error
    if upright.mode == "F":
        return _from_array(np.asarray(upright), name)
    try:
        return _rgb(upright)
    except Exception as error:
        raise ValueError(f"{name} is of mode {image.mode}, of which Pillow makes no RGB: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """The decoded picture, turned by its EXIF orientation. Unreadable EXIF data are ignored."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of any type, as above
        orientation = None
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB without an EXIF orientation, which would turn it again."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(_EIGHT_OF_SIXTEEN, "L")  # clips values outside 16 bits
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
        if not ((array >= 0) & (array <= 1)).all():  # also false for NaN
            raise ValueError(f"{name} has floats outside 0..1: {array.min():.4g} to {array.max():.4g}")
        scaled = array * array.dtype.type(255) if array.dtype != np.float16 else array.astype(np.float32) * 255
        array = np.rint(scaled, out=scaled).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype != np.uint8:
        raise ValueError(f"{name} is of {array.dtype.name}; expected uint8, uint16 or floats in 0..1")
    return _rgb(Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array)))


def _is_picture(given: Any) -> bool:
    """Whether this is an array of one picture, whose rows would be taken for pictures."""
    if not isinstance(given, np.ndarray | jax.Array):
        return False
    return given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (1, 3, 4))


def _check_sides(width: int, height: int, name: str) -> None:
    if not width or not height:
        raise ValueError(f"{name} is {width} x {height} pixels: there is nothing to see")
    if max(width, height) > MOST_TIMES_AS_WIDE * min(width, height):
        raise ValueError(
            f"{name} is {width} x {height} pixels; a side may be at most {MOST_TIMES_AS_WIDE} times the other: "
            "crop it, or cut it into pieces"
        )


def process(pictures: Sequence[Picture], processor: Any, config: LlavaConfig | TowerConfig) -> Processed:
    """Runs pictures through a checkpoint's image processor.

    Args:
      processor: image processor of transformers (`LoadedTower.processor`, `LoadedLlava.processor`).
      config: config of the model; gives the number of crops that LLaVA-NeXT sees of a picture.

    Raises:
      ValueError: see `open_picture`; messages name the picture by its number. Other causes: the processor fails,
        resizes to far more than the tower's image side, or returns non-finite numbers or images of the wrong size or
        number.
    """
    if isinstance(pictures, str | Path | Image.Image) or _is_picture(pictures):
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
        with np.errstate(all="ignore"):  # non-finite values are found below
            pixels = np.asarray(processor(images=[image], return_tensors="np")["pixel_values"], np.float32)
    except Exception as error:  # of any type: a processor does not check its settings
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
    """Checks the processor's settings before it runs, since a wrong setting could resize a picture to a huge size."""
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
