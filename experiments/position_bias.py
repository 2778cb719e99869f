"""Which places attention favours whatever they show: kept tokens by place, over pictures and shuffled orders.

    python experiments/position_bias.py --out docs/images/position_bias.png
    python experiments/position_bias.py --tower DEIT_FOLDER --photos FOLDER --out deit.png

Above, the embedded vision-language model on held-out drawings. Below, the same pictures with their patches in a random
order, another for each picture. A place then says nothing about its content, so any pattern that remains is the model's
own (Liu et al. 2025, section 4 and appendix B). For the decoder, the sequence is shuffled after the tower has read the
intact picture. For the tower, the picture itself is shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from command import Command, arguments

from jaxcompress.checkpoints import load_embedded_vision, load_tower
from jaxcompress.evaluation.dropped import draw_heat
from jaxcompress.evaluation.visual import Examiner, exam
from jaxcompress.generation.pictures import process
from jaxcompress.models.vit import VisionTower
from jaxcompress.vision import Encoded, Method, get_method
from jaxcompress.vision.encoders import all_patches, top_patches
from jaxcompress.vision.uniformity import end_bias, gap, heat, position_bias


@dataclass(frozen=True)
class Arguments(Command):
    """Draws heat maps of kept tokens by place; prints how far they are from even."""

    out: Path = Path("docs/images/position_bias.png")
    kept: int = 36
    """Visual tokens kept."""
    pictures: int = 192
    tower: Path | None = None
    """A ViT or DeiT checkpoint: measure the attention of its class token instead."""
    photos: Path | None = None
    """A folder of pictures for the tower."""
    shuffles: int = 16
    """Random orders of each photograph."""


QUICK = Arguments(quick=True, out=Path("runs/quick/position_bias.png"), pictures=2)


def shuffled_pixels(pixels: np.ndarray, patch: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures [B, C, side, side] with their patches in a random order, another for each."""
    b, c, side, _ = pixels.shape
    n = side // patch
    cells = pixels.reshape(b, c, n, patch, n, patch).transpose(0, 2, 4, 1, 3, 5).reshape(b, n * n, c, patch, patch)
    order = rng.random((b, n * n)).argsort(1)
    mixed = np.take_along_axis(cells, order[..., None, None, None], axis=1)
    return mixed.reshape(b, n, n, c, patch, patch).transpose(0, 3, 1, 4, 2, 5).reshape(pixels.shape)


def shuffled_order(model: Any, pixels: jax.Array) -> Encoded:
    """All visual tokens in a random order, another for each picture."""
    given = all_patches(model, pixels)
    draw = lambda row: jax.random.permutation(jax.random.fold_in(jax.random.key(0), row), given.place.shape[1])
    order = jax.vmap(draw)(jnp.arange(given.place.shape[0]))
    return given._replace(visual=jnp.take_along_axis(given.visual, order[..., None], axis=1))


def anew(model: Any, patches: Any, attention: Any) -> jax.Array:
    """Random scores, different for each picture."""
    draw = lambda row: jax.random.uniform(jax.random.fold_in(jax.random.key(0), row), (model.config.tower.num_patches,))
    return jax.vmap(draw)(jnp.arange(patches.size.shape[0]))


def by_tower(tower: VisionTower, pixels: Any, n: int, layer: int) -> jax.Array:
    """The n patches [B, N] that the class token attends to most in a layer."""

    @jax.jit
    def run(tower: VisionTower, pixels: jax.Array) -> jax.Array:
        patches, attention = tower.run_layers(tower.embed(pixels), range(layer + 1))
        row = attention.rows(jnp.zeros((pixels.shape[0], 1), jnp.int32))[:, :, 0, tower.config.special :].mean(1)
        index = jax.lax.top_k(row, n)[1]
        return jnp.zeros(row.shape, bool).at[jnp.arange(row.shape[0])[:, None], index].set(True)

    return jnp.concatenate([run(tower, pixels[at : at + 16]) for at in range(0, len(pixels), 16)])


def tell(name: str, kept: jax.Array, grid: tuple[int, int]) -> np.ndarray:
    measures = f"position bias {float(position_bias(kept)):.3f}  towards the end {float(end_bias(kept).mean()):+.3f}"
    print(f"{name:42} {measures}  gap {float(gap(kept, grid).mean()):.2f}", flush=True)
    return np.asarray(heat(kept, grid))


def embedded(args: Arguments) -> dict[str, np.ndarray]:
    loaded = load_embedded_vision()
    tokenizer = loaded.tokenizer
    model, tower = loaded.model, loaded.config.tower
    grid = (tower.grid, tower.grid)
    asked = exam(model, tokenizer, loaded.processor, pictures=args.pictures, each=2)
    mixed = asked._replace(pixels=shuffled_pixels(asked.pixels, tower.patch_size, np.random.default_rng(0)))
    straight, shuffled = (Examiner(model, one, runs=1) for one in (asked, mixed))
    word = get_method("fastv", args.kept)
    cases = {
        "random": (Method("random", top_patches(anew, args.kept), lambda config: args.kept), straight),
        "class token": (get_method("fastervlm", args.kept), straight),
        "class token, patches shuffled": (get_method("fastervlm", args.kept), shuffled),
        "last word": (word, straight),
        "last word, order shuffled": (word._replace(encode=shuffled_order), straight),
    }
    out = {}
    for name, (method, examiner) in cases.items():
        kept = jnp.asarray(examiner(method).kept)
        out[name] = tell(name, kept, grid)
    return out


def photographs(args: Arguments) -> dict[str, np.ndarray]:
    assert args.tower is not None
    if args.photos is None:
        raise ValueError("give a folder of pictures with --photos")
    loaded = load_tower(args.tower)
    tower, grid = loaded.model, (loaded.config.grid, loaded.config.grid)
    files = sorted(file for file in args.photos.iterdir() if file.suffix in (".png", ".jpg", ".jpeg"))
    pixels = process(files, loaded.processor, loaded.config).pixels
    rng, out = np.random.default_rng(0), {}
    mixed = np.concatenate([shuffled_pixels(pixels, loaded.config.patch_size, rng) for _ in range(args.shuffles)])
    random = rng.random((len(mixed), loaded.config.num_patches)).argsort(1).argsort(1) < args.kept
    out["random"] = tell("random, as many as shuffled", jnp.asarray(random), grid)
    for layer in (0, loaded.config.num_layers // 2, loaded.config.num_layers - 2):
        for name, given in ((f"layer {layer}", pixels), (f"layer {layer}, shuffled", mixed)):
            out[name] = tell(name, by_tower(tower, given, args.kept, layer), grid)
    return out


def main(args: Arguments) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    maps = embedded(args) if args.tower is None else photographs(args)
    what = "drawings" if args.tower is None else "photographs"
    draw_heat(maps, args.out, f"How often each place is among the {args.kept} kept, over {what}")


if __name__ == "__main__":
    main(arguments(QUICK))
