"""Pictures of every sort, and what is no picture."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxcompress._json import read_object
from jaxcompress.checkpoints import llava_config, load_tower
from jaxcompress.generation.pictures import open_picture, process
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
    for given in (grey, grey[..., None], saved(tmp_path, Image.fromarray(grey))):
        np.testing.assert_array_equal(open_picture(given), expected)
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
    for given in (pixels, saved(tmp_path, Image.fromarray(pixels))):
        opened = np.asarray(open_picture(given))
        assert (opened[0] == 0).all()
        assert (opened[1] == 255).all()
    assert open_picture(saved(tmp_path, Image.new("P", (2, 2)), "p.gif")).mode == "RGB"
    assert open_picture(Image.new("CMYK", (2, 2))).mode == "RGB"


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


def test_messages_say_which_picture() -> None:
    with pytest.raises(ValueError, match="picture 1 is 3 x 0 pixels"):
        process([ramp(4, 4), np.zeros((0, 3), np.uint8)], clip_processor(), one_crop())
    with pytest.raises(ValueError, match=r"makes images of \[3, 32, 32\], the tower sees \[3, 28, 28\]"):
        process([ramp(4, 4)], clip_processor(32), one_crop())
    assert process([], clip_processor(), one_crop()).pixels.shape == (0, 3, 28, 28)


@needs_assets
def test_deit_tiny_classifies_photographs() -> None:
    import jax

    assert ASSETS is not None
    loaded = load_tower(Path(ASSETS) / "weights" / "deit_tiny")
    photos = Path(ASSETS) / "vision" / "photos"
    done = process([photos / "chelsea.png", photos / "coffee.png"], loaded.processor(), loaded.config)
    chances = jax.jit(lambda model, x: jax.nn.softmax(model.logits(model(x))))(loaded.model, done.pixels)
    for row, (name, chance) in enumerate((("Egyptian cat", 0.31), ("espresso", 0.88))):
        best = int(chances[row].argmax())
        assert name in loaded.settings["id2label"][str(best)]
        assert abs(float(chances[row, best]) - chance) < 0.01
