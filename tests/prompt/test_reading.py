"""A prompt shortened, then read into a bounded state: two ratios and their product, none of them wishful."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.checkpoints import load_embedded
from jaxcompress.cli import main
from jaxcompress.cli.runtime import open_model
from jaxcompress.generation import decode_stream, generate, init_decode_state
from jaxcompress.policies import TOVA, Full
from jaxcompress.policies.names import get_policy
from jaxcompress.prompt import Compressor, TokenizerCounter
from jaxcompress.prompt.baselines import content_words, evenly_spread
from jaxcompress.prompt.reading import read_shortened, read_shortened_with_picture

TEXT = " ".join(f"Line {n} says that the value of item {n * 7} is not known to the reader." for n in range(12))


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_embedded()


def test_is_reading_what_is_left(loaded: Any) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    state = init_decode_state(model, TOVA(), 32)
    read = read_shortened(model, tokenizer, TEXT, evenly_spread(), state, rate=0.5, after="\nSo")
    count = TokenizerCounter(tokenizer)
    assert read.kept.tokens_after == count(read.kept.text) == int(count(TEXT) * 0.5 + 0.5)
    short = tokenizer.encode(read.kept.text + "\nSo")
    (expected,) = generate(model, [short], TOVA(), 32, max_new_tokens=6)
    (tokens,) = decode_stream(model, read.state, max_new_tokens=6)
    assert tokens.tolist() == expected.tolist()
    report = read.report
    assert report.original_tokens == len(tokenizer.encode(TEXT + "\nSo"))
    assert report.prompt_tokens == len(short)
    assert report.held_tokens == 32
    assert report.ratio == pytest.approx(report.prompt_ratio * report.state_ratio)
    assert report.ratio == pytest.approx(report.original_tokens / 32)
    assert "x in all" in str(report)


def test_a_state_with_room_to_spare_is_no_compression(loaded: Any) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    read = read_shortened(model, tokenizer, TEXT, content_words(), init_decode_state(model, Full(), 512), rate=0.3)
    assert read.report.held_tokens == read.report.prompt_tokens
    assert read.report.state_ratio == 1
    assert read.report.ratio == read.report.prompt_ratio > 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slots"), [("h2o", 24), ("tova-pool/adaptive", 24), ("tova", [8, 16, 24, 32])])
def test_held_is_what_slots_hold(loaded: Any, name: str, slots: Any) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    state = init_decode_state(model, get_policy(name), slots)
    read = read_shortened(model, tokenizer, TEXT, evenly_spread(), state, rate=0.5)
    assert read.report.held_tokens == pytest.approx(np.mean(slots), rel=0.01)


def test_nothing_left(loaded: Any) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    state = init_decode_state(model, TOVA(), 8)
    for text, rate in (("", 0.5), ("Donaudampfschiff", 0.1)):
        with pytest.raises(ValueError, match="nothing is left"):
            read_shortened(model, tokenizer, text, evenly_spread(), state, rate=rate)


@pytest.mark.slow
def test_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    model, tokenizer = open_model(None)
    short = Compressor.load(count=TokenizerCounter(tokenizer)).compress(TEXT, rate=0.5).text
    assert (
        main(["compress-prompt", "--file", str(file), "--rate", "0.5", "--reader", "embedded", "--protect", "none"])
        == 0
    )
    assert capsys.readouterr().out == short + "\n"
    (expected,) = generate(model, [tokenizer.encode(short)], TOVA(), 32, max_new_tokens=4)
    for source in (["--prompt", TEXT], ["--file", str(file)]):
        assert main(["generate", *source, "--shorten", "0.5", "--slots", "32", "--max-new-tokens", "4"]) == 0
        told = capsys.readouterr()
        assert told.out.strip() == tokenizer.decode(expected[0]).strip()
        assert re.search(r"tokens -> \d+ .*32 held .*x in all; recovered \d+% of the content words", told.err)
    assert main(["generate", "--prompt", "Donaudampfschiff", "--shorten", "0.1"]) == 2
    assert "nothing is left to read" in capsys.readouterr().err
    assert main(["generate", "--prompt", TEXT, "--shorten", "1.5"]) == 2
    assert "(0, 1]" in capsys.readouterr().err


@pytest.mark.slow
def test_words_and_visual_tokens_in_one_call() -> None:
    """The report counts both, and the answer is that of the shorter prompt with as many visual tokens."""
    from jaxcompress.checkpoints import load_embedded_vision
    from jaxcompress.generation.visual import prefill_encoded
    from jaxcompress.vision import encode, get_method, slots_per_layer

    loaded = load_embedded_vision()
    model, tokenizer, method = loaded.model, loaded.tokenizer, get_method("prumerge", keep=9)
    side = model.config.tower.image_size
    pixels = np.random.default_rng(0).normal(size=(3, side, side)).astype(np.float32)
    text, after = "what is the colour of the ring left of the red square", " ?"
    slots = slots_per_layer(model.config, method, room=20)
    fresh = lambda: init_decode_state(model.decoder, Full(), slots)
    read = read_shortened_with_picture(
        model, tokenizer, pixels, text, content_words(), method, fresh(), rate=0.5, after=after
    )
    short = tokenizer.encode("<image> " + read.kept.text + after)
    report = read.report
    assert report.original_tokens == len(tokenizer.encode("<image> " + text + after)) - 1 + 144
    assert report.prompt_tokens == report.held_tokens == len(short) - 1 + 9
    assert "content words + prumerge" in str(report)
    encoded = encode(model, jnp.asarray(pixels)[None], method)
    expected = prefill_encoded(model, [short], encoded, fresh(), method)
    (one,), (two,) = (decode_stream(model.decoder, state, max_new_tokens=3) for state in (read.state, expected))
    assert one.tolist() == two.tolist()
    with pytest.raises(ValueError, match="image token"):
        read_shortened_with_picture(
            model, tokenizer, pixels, text, content_words(), method, fresh(), rate=0.5, before="", after=after
        )
