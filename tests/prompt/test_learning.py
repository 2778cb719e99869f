"""Training a classifier of words: which labels count, and that it learns them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.models.encoder import Encoder, EncoderConfig
from jaxcompress.prompt import WORDS, Compressor, keep
from jaxcompress.prompt.dataset import Example
from jaxcompress.prompt.learning import batches, classification, label_losses, rows_of, special_ids, tokenized
from jaxcompress.prompt.surface import words_of
from jaxcompress.training import Checkpoints, fit, init_train_state, make_step

TEXT = "The council will certainly vote on the budget (of 3.5 million) before Monday, unhurriedly."
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # pyright: ignore[reportCallIssue]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    """Its pieces begin with the space before a word."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[wordpiece, unigram])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


def example(text: str, *kept: str) -> Example:
    words = words_of(text)
    return Example(text, words, [text[start:end] in kept for start, end in words])


def test_every_subword_has_the_label_of_its_word(tokenizer: Tokenizer) -> None:
    one = example(TEXT, "council", "unhurriedly", ".")
    ids, labels = tokenized(one, tokenizer)
    encoding = tokenizer.encode(TEXT, add_special_tokens=False)
    assert ids.tolist() == encoding.ids
    counted = 0
    for (start, end), label in zip(encoding.offsets, labels, strict=True):
        inside = [keep for word, keep in zip(one.words, one.labels, strict=True) if word.start <= end - 1 < word.end]
        assert label == (int(inside[0]) if inside else -1), TEXT[start:end]
        counted += label == 1
    assert counted > 5  # of the long word several


def test_rows_hold_everything_once_and_count_nothing_else(tokenizer: Tokenizer) -> None:
    examples = [example(TEXT, "council", "vote"), example("Monday.", "Monday"), example(TEXT, "budget")]
    rows = rows_of(examples, tokenizer, 40)
    opening, closing, pad = special_ids(tokenizer)
    expected = [tokenized(one, tokenizer) for one in examples]
    ids, labels = [], []
    for row in (rows[at] for at in range(len(rows))):
        n = int(row.tokens.valid.sum())
        assert row.tokens.valid.tolist() == [True] * n + [False] * (40 - n)
        assert (row.tokens.ids[0], row.tokens.ids[n - 1]) == (opening, closing)
        assert (row.tokens.ids[n:] == pad).all()
        assert row.weights[[0, n - 1]].tolist() == [0, 0]
        assert not row.weights[n:].any()
        ids += row.tokens.ids[1 : n - 1].tolist()
        labels += np.where(row.weights, row.tokens.labels, -1)[1 : n - 1].tolist()
    assert ids == np.concatenate([one[0] for one in expected]).tolist()
    assert labels == np.concatenate([one[1] for one in expected]).tolist()


def test_what_has_no_rows(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no examples"):
        rows_of([], tokenizer, 16)
    with pytest.raises(ValueError, match="at least 3"):
        rows_of([example("a", "a")], tokenizer, 2)
    with pytest.raises(ValueError, match="neither"):
        rows_of([example("a", "a")], Tokenizer(models.WordLevel()), 16)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="less than one batch"):
        batches(rows_of([example("a", "a")], tokenizer, 16), batch=4, seed=0)


measure = jax.jit(label_losses)


@given(st.integers(0, 7), st.just(3))
def test_loss_is_that_of_two_classes_and_padding_has_none(seed: int, padding: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(2, 6, 2)).astype(np.float32), rng.integers(0, 2, (2, 6))
    weights = (rng.random((2, 6)) < 0.7).astype(np.float32)
    shifted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(shifted, labels[..., None], -1)[..., 0]
    expected = float((losses * weights).sum() / max(weights.sum(), 1e-9))
    right = float(((logits.argmax(-1) == labels) * weights).sum() / max(weights.sum(), 1e-9))
    wide = [(0, 0), (0, padding)]
    padded = np.pad(logits, [*wide, (0, 0)], constant_values=9.0), np.pad(labels, wide), np.pad(weights, wide)
    for arrays in ((logits, labels, weights), padded):
        assert np.allclose(measure(*arrays), (expected, right), atol=1e-5)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(EncoderConfig(90, 32, 64, 1, 2, max_position=64), rngs=nnx.Rngs(0))


def texts(n: int) -> list[Example]:
    """ "council" and "budget" stay, and nothing else."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(n):
        words = rng.choice(["the", "council", "vote", "budget", "on", "."], 12).tolist()
        labels = [word in ("council", "budget") for word in words]
        text = " ".join(words)
        examples.append(Example(text, words_of(text), labels))
    return examples


@pytest.fixture(scope="module")
def trained(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A few steps, stopped half-way and taken up again."""
    tokenizer = wordpiece()
    rows = rows_of(texts(300), tokenizer, 64)
    optimizer = optax.adam(1e-2)
    step = make_step(classification(), optimizer)
    folder = tmp_path_factory.mktemp("run")
    losses: list[float] = []
    log = [lambda number, numbers: losses.append(numbers["loss"])]
    for steps in (20, 50):
        data = batches(rows, batch=8, seed=0)
        with Checkpoints(folder) as checkpoints:
            state = init_train_state(encoder, optimizer)
            if checkpoints.latest:
                state, where = checkpoints.restore(state)
                data.set_state(where)
            state = fit(state, step, data, steps=steps, checkpoints=checkpoints, log=log, bar=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return Compressor(state.params, EncoderTokenizer(folder)), losses


def test_learns_with_the_trainer(trained: Any) -> None:
    scorer, losses = trained
    assert len(losses) == 50
    assert np.mean(losses[-5:]) < 0.1 < 0.3 < np.mean(losses[:5])
    assert keep(scorer("on the budget the vote council on"), WORDS, tokens=2).text == "budget council"


def test_long_texts_are_read_in_rows_of_sentences(trained: Any) -> None:
    scorer, _ = trained
    sentences = [f"{one.text}." for one in texts(9)]
    text = " ".join(sentences)
    found = scorer(text)
    assert (found.scores > 0.5).tolist() == [word in ("council", "budget") for word in found.words]
    unbroken = " ".join(one.text for one in texts(9))
    assert (scorer(unbroken).scores > 0.5).sum() == sum(sum(one.labels) for one in texts(9))


def test_texts_with_nothing_known(trained: Any) -> None:
    for nothing in ("", " "):
        assert trained[0](nothing).words == []
    assert np.isfinite(trained[0]("会议 👍🏽 unknown").scores).all()


def test_hidden_words(encoder: Encoder) -> None:
    batch = jax.tree.map(lambda x: jnp.asarray(x)[None], rows_of(texts(3), wordpiece(), 40)[0])
    objective = lambda masked: classification(mask=4, masked=masked)(encoder, batch, 0, jax.random.key(0))[0]["loss"]
    hidden, none = jax.jit(jax.vmap(objective))(jnp.array([0.5, 0.0]))
    plain = label_losses(encoder(batch.tokens.ids, batch.tokens.valid), batch.tokens.labels, batch.weights)[0]
    assert np.isclose(none, plain, atol=1e-6)
    assert abs(float(none) - float(hidden)) > 1e-4


def test_mixed_sources_keep_their_shares() -> None:
    tokenizer = wordpiece()
    one, other = (rows_of([example(word, word)] * 40, tokenizer, 12) for word in ("vote", "budget"))
    data = batches(one, other, batch=8, seed=0, shares=(0.75, 0.25))
    first = tokenizer.token_to_id("vote")
    drawn = np.concatenate([next(data).tokens.ids[:, 1] for _ in range(10)])
    ids = tokenizer.encode("vote", add_special_tokens=False).ids[0]
    assert 0.6 < np.mean(drawn == (first if first is not None else ids)) < 0.9
    with pytest.raises(ValueError, match="1 shares were given for 2"):
        batches(one, other, batch=8, seed=0, shares=(1.0,))


def test_rows_are_saved_nowhere(tmp_path: Path) -> None:
    """Rows are made anew from examples: the same each time."""
    tokenizer = wordpiece()
    one, other = (rows_of(texts(20), tokenizer, 40) for _ in range(2))
    assert len(one) == len(other)
    for at in range(len(one)):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one[at], other[at]))
