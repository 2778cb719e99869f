"""Pictures of every sort, and what is no picture."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jaxcompress.checkpoints import llava_config, load_tower
from jaxcompress.checkpoints._processor import image_processor
from jaxcompress.generation.pictures import open_picture, process
from jaxcompress.inputs.json import read_object
from jaxcompress.models.llava import LlavaConfig

ASSETS = os.environ.get("JAXCOMPRESS_ASSETS")
needs_assets = pytest.mark.skipif(not ASSETS, reason="JAXCOMPRESS_ASSETS is not set: real weights and photographs")


def next_config(**changes: Any) -> LlavaConfig:
    settings = read_object(Path(__file__).parents[1] / "fixtures" / "vision_models" / "llava_next" / "config.json")
    return replace(llava_config(settings), **changes)


def ramp(*shape: int) -> np.ndarray:
    return (np.arange(np.prod(shape)).reshape(shape) * 7 % 256).astype(np.uint8)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png") -> Path:
    image.save(tmp_path / name)
    return tmp_path / name


def test_rgb_stays_as_it_is(tmp_path: Path) -> None:
    pixels = ramp(5, 8, 3)
    np.testing.assert_array_equal(open_picture(pixels), pixels)
    np.testing.assert_array_equal(open_picture(saved(tmp_path, Image.fromarray(pixels))), pixels)
    np.testing.assert_array_equal(open_picture(Image.fromarray(pixels)), pixels)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    grey = ramp(4, 6)
    expected = np.repeat(grey[..., None], 3, axis=2)
    for picture in (grey, grey[..., None], saved(tmp_path, Image.fromarray(grey))):
        np.testing.assert_array_equal(open_picture(picture), expected)
    np.testing.assert_array_equal(np.asarray(open_picture(grey > 100))[..., 1], (grey > 100) * 255)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = (ramp(4, 6).astype(np.uint16) * 257).astype(np.uint16)
    expected = np.repeat(ramp(4, 6)[..., None], 3, axis=2)
    np.testing.assert_array_equal(open_picture(deep), expected)
    np.testing.assert_array_equal(open_picture(saved(tmp_path, Image.fromarray(deep))), expected)
    np.testing.assert_array_equal(open_picture(ramp(4, 6) / np.float32(255)), expected)


def test_what_is_transparent_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[0, :, 3] = 255
    for picture in (pixels, saved(tmp_path, Image.fromarray(pixels))):
        opened = np.asarray(open_picture(picture))
        assert (opened[0] == 0).all()
        assert (opened[1] == 255).all()
    assert open_picture(saved(tmp_path, Image.new("P", (2, 2)), "p.gif")).mode == "RGB"
    assert open_picture(Image.new("CMYK", (2, 2))).mode == "RGB"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_stand_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    """As an image viewer shows them, whatever opened them; and only once."""
    image = Image.fromarray(np.repeat(np.repeat(ramp(2, 3, 3), 16, axis=0), 16, axis=1))
    exif = image.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    more: dict[str, Any] = dict(save_all=True, append_images=[image]) if suffix == "mpo" else {}
    image.save(path, exif=exif, **more)
    with Image.open(path) as lazy:
        expected = np.asarray(ImageOps.exif_transpose(lazy).convert("RGB"))
    opened = open_picture(path)
    assert opened.size == ((48, 32) if orientation < 5 else (32, 48))
    np.testing.assert_array_equal(opened, expected)
    with Image.open(path) as lazy:
        np.testing.assert_array_equal(open_picture(lazy), expected)
    np.testing.assert_array_equal(open_picture(opened), expected)
    if suffix == "jpg":
        done = process([path], clip_processor(), one_crop())
        assert done.sizes == ((opened.height, opened.width),)
        np.testing.assert_array_equal(done.pixels, process([opened], clip_processor(), one_crop()).pixels)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(ramp(4, 6, 3))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(open_picture(tmp_path / "a.png"), image)
    image.save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")  # which leads nowhere
    np.testing.assert_array_equal(open_picture(tmp_path / "a.png"), image)


MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La",
         "I;16", "I;16L", "I;16B", "I;16N")  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    opened = open_picture(Image.new(mode, (3, 2)))
    assert (opened.mode, opened.size, opened.info) == ("RGB", (3, 2), {})
    if mode not in ("YCbCr", "LAB"):  # whose zeros are green and nearly black
        white = "a" in mode or "A" in mode or mode == "CMYK"  # nothing is seen, or no ink
        assert np.asarray(opened)[0, 0].tolist() == [255 * white] * 3


def test_half_transparent_colours_are_mixed_with_white() -> None:
    pixels = ramp(8, 8, 4)
    share = pixels[..., 3:] / 255
    expected = np.rint(pixels[..., :3] * share + 255 * (1 - share))
    np.testing.assert_array_equal(open_picture(pixels), expected)


def test_sixteen_bits_in_any_order_of_bytes() -> None:
    deep = (ramp(4, 6).astype(np.uint16) * 257 + 100).astype(np.uint16)
    expected = np.repeat(np.rint(deep / 257)[..., None], 3, axis=2)
    for picture in (deep, deep.astype(">u2"), Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        np.testing.assert_array_equal(open_picture(picture), expected)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    more: dict[str, Any] = dict(lossless=True) if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **more)
    np.testing.assert_array_equal(open_picture(tmp_path / f"a.{suffix}"), frames[0])
    with Image.open(tmp_path / f"a.{suffix}") as moving:
        moving.seek(1)
        np.testing.assert_array_equal(open_picture(moving), frames[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1)])
def test_the_smallest_and_longest(size: tuple[int, int]) -> None:
    assert open_picture(Image.new("RGB", size)).size == size
    assert process([Image.new("RGB", size)], clip_processor(), one_crop()).pixels.shape == (1, 3, 28, 28)


def _whole(format: str) -> bytes:
    out, image = io.BytesIO(), Image.fromarray(ramp(9, 12, 3))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(out, format, **({} if format in ("GIF", "BMP", "PPM", "ICO", "TGA") else dict(exif=exif)))
    return out.getvalue()


WHOLE = [_whole(format) for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA")]
changes = st.lists(st.tuples(st.integers(0, 2000), st.binary(max_size=4)), max_size=4)


@given(st.sampled_from(WHOLE), st.integers(0, 2000), changes)
def test_any_bytes_are_a_picture_or_a_clear_error(whole: bytes, end: int, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(whole[:end])
    for at, new in changes:
        at %= len(data) + 1
        data[at : at + len(new)] = new
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"jaxcompress-any-bytes-{os.getpid()}"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what it reads
        try:
            told = open_picture(path).mode
        except ValueError as error:
            told = str(error)
    path.unlink()
    assert told == "RGB" or str(path) in told


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("these are words")
    with pytest.raises(ValueError, match=r"text.png is not an image"):
        open_picture(tmp_path / "text.png")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole, "PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[:400])
    with pytest.raises(ValueError, match=r"half.png is damaged"):
        open_picture(tmp_path / "half.png")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        open_picture(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is a folder"):
        open_picture(tmp_path)
    with pytest.raises(ValueError, match=r"the picture is 4 x 0 pixels"):
        open_picture(np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"0 x 4 pixels"):
        open_picture(Image.new("RGB", (0, 4)))
    with pytest.raises(ValueError, match=r"the picture is of type bytes; give a file's path"):
        open_picture(b"GIF89a")
    with pytest.raises(ValueError, match="cannot be opened"):
        open_picture("\0")
    with pytest.raises(ValueError, match=r"shape \[2, 3, 5\]"):
        open_picture(np.zeros((2, 3, 5), np.uint8))
    with pytest.raises(ValueError, match=r"outside 0..1: -1 to 1"):
        open_picture(np.array([[-1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"outside 0..1: nan"):
        open_picture(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="int64"):
        open_picture(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match=r"20000 x 99 pixels; a side may be at most 200 times"):
        open_picture(np.zeros((99, 20000), np.uint8))


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    with pytest.raises(ValueError, match="too large"):
        open_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ValueError, match="too large"):
        open_picture(path)


def test_what_is_too_large_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few kB that says it has 10,000 x 10,000 pixels."""
    path = saved(tmp_path, Image.new("1", (10_000, 10_000)), "a.tif")
    tracemalloc.start()
    with pytest.raises(ValueError, match="too large"):
        open_picture(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        lazy = Image.open(path)
    with lazy, pytest.raises(ValueError, match=r"too large: 10000 x 10000 pixels are more than \d+"):
        open_picture(lazy)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_picture(saved(tmp_path, Image.new("L", (20, 20)))).size == (20, 20)


def clip_processor(side: int = 28):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def next_processor():
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    pinpoints = [list(point) for point in next_config().pinpoints]
    size = dict(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints, **size)


def one_crop() -> LlavaConfig:
    return next_config(pinpoints=(), newline=False)


def test_a_panorama_of_20000_pixels() -> None:
    """LLaVA-1.5's processor shows its middle; LLaVA-NeXT's the whole, squeezed, and tiles that are nearly all bar."""
    strip = np.zeros((100, 20000, 3), np.uint8)
    strip[:, 9950:10050] = 255
    done = process([strip], clip_processor(), one_crop())
    assert done.pixels.shape == (1, 3, 28, 28)
    assert done.sizes == ((100, 20000),)
    assert done.pixels[0, 0].min() > 1.5  # white, and nothing of the black beside it
    assert process([strip], next_processor(), next_config()).pixels.shape == (3, 3, 28, 28)


def test_crops_of_several_pictures_follow_one_another() -> None:
    done = process([ramp(40, 55, 3), ramp(50, 20, 3)], next_processor(), next_config())
    assert done.sizes == ((40, 55), (50, 20))
    assert done.pixels.shape == (5 + 3, 3, 28, 28)
    alone = process([ramp(50, 20, 3)], next_processor(), next_config())
    np.testing.assert_array_equal(done.pixels[5:], alone.pixels)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3)])
def test_an_array_of_one_picture_is_no_list(shape: tuple[int, ...], as_users_call_it: None) -> None:
    """Its rows could be taken for grey pictures."""
    one: Any = np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match=r"a list of pictures, not ndarray; write \[picture\]"):
        process(one, clip_processor(), one_crop())
    assert process([one], clip_processor(), one_crop()).sizes == ((28, 28),)


def test_messages_say_which_picture() -> None:
    with pytest.raises(ValueError, match="picture 1 is 3 x 0 pixels"):
        process([ramp(4, 4), np.zeros((0, 3), np.uint8)], clip_processor(), one_crop())
    with pytest.raises(ValueError, match=r"makes images of \[3, 32, 32\], the tower sees \[3, 28, 28\]"):
        process([ramp(4, 4)], clip_processor(32), one_crop())
    assert process([], clip_processor(), one_crop()).pixels.shape == (0, 3, 28, 28)


SETTINGS = ("size", "crop_size", "pad_size", "rescale_factor", "image_mean", "image_std", "resample", "do_resize",
            "do_center_crop", "do_rescale", "do_normalize", "image_processor_type")  # fmt: skip
settings = st.dictionaries(
    st.sampled_from(SETTINGS),
    st.none() | st.booleans() | st.integers(-1, 10**9) | st.floats() | st.just("x") | st.lists(st.floats(), max_size=3)
    | st.dictionaries(st.sampled_from(["height", "width", "shortest_edge", "longest_edge"]), st.integers(-1, 10**7)),
    max_size=2,
)  # fmt: skip


@given(settings)
def test_any_settings_of_a_processor_are_taken_or_refused(tmp_path_factory: Any, changed: dict[str, Any]) -> None:
    """Nothing is made larger than some times what the tower sees, and no number is NaN."""
    from jaxcompress.embedded import vision_folder

    folder = tmp_path_factory.mktemp("settings")
    base = read_object(vision_folder() / "preprocessor_config.json")
    config = llava_config(read_object(vision_folder() / "config.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps({**base, **changed}))
    try:
        pixels = process([ramp(20, 30, 3)], image_processor(folder), config).pixels
        assert pixels.shape == (1, 3, 96, 96)
        assert np.isfinite(pixels).all()
    except ValueError:
        pass


def test_settings_that_belong_to_another_model() -> None:
    with pytest.raises(ValueError, match="size has a side of 999999; the tower sees 28, so give 1 to 224"):
        process([ramp(4, 4)], clip_processor(999999), one_crop())
    with pytest.raises(ValueError, match="makes 1 crops of picture 0, the model sees 3"):
        process([ramp(100, 30)], clip_processor(), next_config())
    with pytest.raises(ValueError, match="must be the same"):
        process([ramp(4, 4)], next_processor(), next_config(pinpoints=((28, 56),)))
    dark = clip_processor()
    dark.image_std = [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="numbers of picture 0 that are not finite; see image_mean"):
        process([ramp(4, 4)], dark, one_crop())
    with pytest.raises(ValueError, match="pictures are a list of pictures, not str"):
        process("a.png", dark, one_crop())


@needs_assets
def test_deit_tiny_classifies_photographs() -> None:
    import jax

    assert ASSETS is not None
    loaded = load_tower(Path(ASSETS) / "weights" / "deit_tiny")
    photos = Path(ASSETS) / "vision" / "photos"
    done = process([photos / "chelsea.png", photos / "coffee.png"], loaded.processor, loaded.config)
    chances = jax.jit(lambda model, x: jax.nn.softmax(model.logits(model(x))))(loaded.model, done.pixels)
    for row, (name, chance) in enumerate((("Egyptian cat", 0.31), ("espresso", 0.88))):
        best = int(chances[row].argmax())
        assert name in loaded.settings["id2label"][str(best)]
        assert abs(float(chances[row, best]) - chance) < 0.01
