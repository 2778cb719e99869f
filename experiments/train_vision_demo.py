"""Trains the small vision-language model that ships with the package, from a seed, on pictures drawn on the way.

    python experiments/train_vision_demo.py --out runs/vision

The tower is trained first, without questions. Two heads, thrown away afterwards, predict what each patch shows, from
its own feature, and what occurs in the picture, from the class token, whose attention many methods rely on. Then the
tower is frozen, as in LLaVA, and projector and decoder learn to answer. Sixteen questions about each picture are
answered at once: every question sees the picture and itself, as if it were asked alone.

The run can be stopped and started again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from command import Command, arguments
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxcompress.checkpoints import save_llava
from jaxcompress.embedded.drawings import COLOURS, DIGITS, SHAPES, SIDE, draw, patch_labels, present, questions, words
from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.models.tower_config import TowerConfig
from jaxcompress.training import Checkpoints, MetricsFile, fit, init_train_state, make_step, token_losses
from jaxcompress.training.optimizer import muon_for_decoder, warmup_stable_decay

SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
PAD, BOS, EOS, IMAGE = range(len(SPECIAL))
PATCH, ASKED, LONGEST = 8, 16, 8  # pixels of a patch's side; questions about a picture; words of a question
MEAN, STD = 0.5, 0.25  # of pixels, for the image processor
SHOWN = len(SHAPES) + len(DIGITS)
CONFIG = LlavaConfig(
    tower=TowerConfig(
        hidden_size=96, intermediate_size=384, num_layers=4, num_heads=3, image_size=SIDE, patch_size=PATCH,
        norm_eps=1e-5, activation="quick_gelu", patch_bias=False, pre_norm=True,
    ),
    decoder=DecoderConfig(
        vocab_size=48, hidden_size=128, intermediate_size=320, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
        rope=RopeConfig(theta=10000.0), qk_norm=True, tied=True, max_position=512,
    ),
    image_token=IMAGE,
    feature_layers=3,
)  # fmt: skip


@dataclass(frozen=True)
class Arguments(Command):
    """Trains the embedded vision-language model; writes checkpoints, a log and the model under `out`."""

    out: Path = Path("runs/vision")
    steps: tuple[int, int] = (600, 800)
    """For the tower, and for the rest."""
    rows: int = 32
    """Pictures in a batch."""
    peak: float = 4e-3
    """Highest learning rate."""
    seed: int = 0
    save_every: int = 100


QUICK = Arguments(quick=True, out=Path("runs/quick/vision"), steps=(1, 1), rows=2)


class Pictures(NamedTuple):
    """A batch. `fit` and `make_step` use its `weights`.

    Attributes:
      pixels: [B, 3, SIDE, SIDE] uint8.
      tokens: [B, ASKED, LONGEST + 1], question, answer, padding.
      targets, weights: of these shapes: what comes next, and how much it counts.
      names, colours: [B, patches], what each patch shows.
      present: [B, n], what occurs.
    """

    pixels: Any
    tokens: Any
    targets: Any
    weights: Any
    names: Any
    colours: Any
    present: Any


class Stream:
    """An endless stream of batches of new pictures. Its position is one number."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.at = rows, seed, 0
        self.ids = {word: i for i, word in enumerate([*SPECIAL, *words()])}

    def __next__(self) -> Pictures:
        rng = np.random.default_rng((self.seed, self.at))
        rows = [self._row(self.at * self.rows + row, rng) for row in range(self.rows)]
        self.at += 1
        return Pictures(*(np.stack(column) for column in zip(*rows, strict=True)))

    def get_state(self) -> int:
        return self.at

    def set_state(self, at: int) -> None:
        self.at = at

    def _row(self, number: int, rng: np.random.Generator) -> Pictures:
        drawing = draw(number)
        tokens = np.full((ASKED, LONGEST + 1), PAD, np.int32)
        targets, weights = tokens.copy(), np.zeros(tokens.shape, np.float32)
        for row, question in enumerate(questions(drawing, rng, ASKED)):
            ids = [self.ids[word] for word in f"{question.text} {question.answer}".split()]
            n = len(ids)
            tokens[row, :n] = ids
            targets[row, n - 2], targets[row, n - 1] = ids[-1], EOS
            weights[row, n - 2], weights[row, n - 1] = 1.0, 0.1
        labels = patch_labels(drawing, PATCH)
        return Pictures(drawing.pixels.transpose(2, 0, 1), tokens, targets, weights, *labels, present(drawing))


class Heads(nnx.Module):
    """The heads that train the tower and are then thrown away."""

    def __init__(self, *, rngs: nnx.Rngs):
        linear = lambda m: nnx.Linear(CONFIG.tower.hidden_size, m, rngs=rngs)
        self.name, self.colour, self.present = linear(SHOWN + 1), linear(len(COLOURS) + 1), linear(SHOWN * len(COLOURS))


def answers(projector: Any, decoder: Any, features: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits [B, ASKED, LONGEST + 1, V] of every question after its picture."""
    b, config = tokens.shape[0], CONFIG.decoder
    picture = jnp.concatenate([decoder.embed(jnp.full((b, 1), BOS)), projector(features[:, 1:])], axis=1)
    x = jnp.concatenate([picture, decoder.embed(tokens.reshape(b, -1))], axis=1)
    seen, each = picture.shape[1], tokens.shape[2]
    nth = np.arange(x.shape[1]) - seen
    positions = jnp.broadcast_to(np.where(nth < 0, nth + seen, seen + nth % each), x.shape[:2])
    own = np.tril(np.ones((each, each), bool))
    mask = jnp.asarray(np.concatenate([np.ones((each, seen), bool), own], axis=1))

    def attend(q, k, v, positions, layer, index, carry, xs):
        q, k = (rotate(y, positions[..., None], config.rope) for y in (q, k))
        first = jax.nn.dot_product_attention(q[:, :seen], k[:, :seen], v[:, :seen], is_causal=True)
        one = lambda y: y[:, seen:].reshape(b * ASKED, each, *y.shape[2:])
        before = lambda y: jnp.repeat(y[:, :seen], ASKED, axis=0)
        both = lambda y: jnp.concatenate([before(y), one(y)], axis=1)
        rest = jax.nn.dot_product_attention(one(q), both(k), both(v), mask=mask[None, None])
        return jnp.concatenate([first, rest.reshape(b, -1, *rest.shape[2:])], axis=1), carry, xs

    x = decoder.run_layers(x, positions, attend)[0][:, seen:]
    return decoder.logits(decoder.norm(x)).reshape(*tokens.shape, -1)


def tower_objective(params: Any, batch: Pictures, step: Any, key: Any) -> tuple[Mapping[str, Any], Any]:
    """The loss of predicting what each patch shows and what occurs in the picture."""

    def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        tower, heads = params["tower"], params["heads"]
        patches = tower.embed((batch.pixels / 255.0 - MEAN) / STD)
        features, _ = tower.run_layers(patches, range(CONFIG.feature_layers))
        last, _ = tower.run_layers(features, range(CONFIG.feature_layers, CONFIG.tower.num_layers))
        x = features.hidden[:, 1:]
        # Most patches show the ground. All the others together count as much as all of it.
        there = batch.names > 0
        weight = jnp.where(there, there.size / there.sum(), 1.0) / there.size
        name, colour = token_losses(heads.name(x), batch.names), token_losses(heads.colour(x), batch.colours)
        dense = ((name + colour) * weight).sum()
        occurs = optax.sigmoid_binary_cross_entropy(heads.present(tower.pooled(last)), batch.present).mean()
        right = ((heads.name(x).argmax(-1) == batch.names) & there).sum() / there.sum()
        return dense + 4 * occurs, dict(dense=dense, occurs=occurs, right=right)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return {"loss": value, **metrics}, gradient


def answer_objective(tower: Any) -> Any:
    """The loss of predicting answers and their ends; the tower is not trained."""

    def objective(params: Any, batch: Pictures, step: Any, key: Any) -> tuple[Mapping[str, Any], Any]:
        pixels = (batch.pixels / 255.0 - MEAN) / STD
        features = tower.run_layers(tower.embed(pixels), range(CONFIG.feature_layers))[0].hidden

        def loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            logits = answers(params["projector"], params["decoder"], features, batch.tokens)
            first = batch.weights == 1.0
            right = ((logits.argmax(-1) == batch.targets) & first).sum() / first.sum()
            return (token_losses(logits, batch.targets) * batch.weights).sum() / batch.weights.sum(), dict(right=right)

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return {"loss": value, **metrics}, gradient

    return objective


def train(name: str, params: Any, objective: Any, steps: int, args: Arguments) -> Any:
    """Runs one of the two parts of the training; continues where it was stopped."""
    optimizer = muon_for_decoder(warmup_stable_decay(args.peak, steps, warmup=50, decay=0.5))
    state, data = init_train_state(params, optimizer, seed=args.seed), Stream(args.rows, args.seed)

    def show(number: int, numbers: Mapping[str, Any]) -> None:
        if number % 20 == 0:
            told = {key: round(value, 4) for key, value in numbers.items() if value is not None}
            print(json.dumps(dict(part=name, step=number, **told)), flush=True)

    with Checkpoints(args.out / name) as checkpoints, MetricsFile(args.out / f"{name}.jsonl") as log:
        if checkpoints.latest is not None:
            state, at = checkpoints.restore(state)
            data.set_state(at)
        how: dict[str, Any] = dict(steps=steps, checkpoints=checkpoints, save_every=args.save_every, log=[log, show])
        return fit(state, make_step(objective, optimizer), data, **how).params


def main(args: Arguments) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    rngs = nnx.Rngs(args.seed)
    model = Llava(CONFIG, rngs=rngs)
    print(f"{sum(x.size for x in jax.tree.leaves(model)):,} weights", flush=True)
    tower = train("tower", {"tower": model.tower, "heads": Heads(rngs=rngs)}, tower_objective, args.steps[0], args)[
        "tower"
    ]
    rest = {"projector": model.projector, "decoder": model.decoder}
    rest = train("answers", rest, answer_objective(tower), args.steps[1], args)
    model.tower, model.projector, model.decoder = tower, rest["projector"], rest["decoder"]
    export(model, args.out / "model")


def export(model: Llava, folder: Path) -> None:
    """Writes the Hugging Face folder that ships: bfloat16 weights, tokenizer and image processor."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words()])}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    square = {"height": SIDE, "width": SIDE}
    processor = dict(
        image_processor_type="CLIPImageProcessor", do_resize=True, size=square, do_center_crop=True, crop_size=square,
        do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[MEAN] * 3, image_std=[STD] * 3,
        do_convert_rgb=True, resample=3,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as files:
        tokenizer.save(f"{files}/tokenizer.json", pretty=False)
        config = dict(tokenizer_class="PreTrainedTokenizerFast", **special)
        Path(files, "tokenizer_config.json").write_text(json.dumps(config))
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
        saved = save_llava(half, folder, processor=processor, tokenizer_from=files)
    print(f"{saved}: {sum(file.stat().st_size for file in saved.iterdir()) / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main(arguments(QUICK))
