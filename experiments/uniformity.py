"""Uniformity in space and time: how evenly methods keep tokens, and how many answers are right.

    python experiments/uniformity.py --out docs/images/uniformity.png

Left, every method at every budget: the mean distance from a patch to the nearest kept one, and right answers. Right, a
video of a drawing whose ground grows lighter and whose things all appear in its middle frame: how a budget for the
whole video is shared among its frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from command import Command, arguments
from matplotlib.figure import Figure

from jaxcompress.checkpoints import load_embedded_vision
from jaxcompress.embedded.drawings import draw
from jaxcompress.evaluation.visual import Examiner, exam
from jaxcompress.generation.pictures import process
from jaxcompress.vision import get_method
from jaxcompress.vision.uniformity import gap, spatial_evenness, temporal_evenness


@dataclass(frozen=True)
class Arguments(Command):
    """Draws uniformity in space against accuracy, and shares of a budget over the frames of a video."""

    out: Path = Path("docs/images/uniformity.png")
    tokens: tuple[int, ...] = (36, 16)
    methods: tuple[str, ...] = ("random", "grid", "fastervlm", "visionzip", "fastv", "mustdrop")
    pictures: int = 48
    frames: int = 8
    videos: int = 12


QUICK = Arguments(
    quick=True,
    out=Path("runs/quick/uniformity.png"),
    tokens=(16,),
    methods=("random", "fastervlm"),
    pictures=2,
    frames=4,
    videos=2,
)


def space(args: Arguments) -> list[tuple[str, int, float, float, float]]:
    loaded = load_embedded_vision()
    tokenizer = loaded.tokenizer
    grid = (loaded.config.tower.grid, loaded.config.tower.grid)
    examiner = Examiner(loaded.model, exam(loaded.model, tokenizer, loaded.processor, pictures=args.pictures), runs=1)
    out = []
    print(f"{'method':14}{'kept':>5}{'gap':>7}{'evenness':>10}{'right':>8}")
    for n in args.tokens:
        for name in args.methods:
            got = examiner(get_method(name, n))
            kept = jnp.asarray(got.kept)
            apart, even = float(gap(kept, grid).mean()), float(spatial_evenness(kept, grid).mean())
            out.append((name, n, apart, even, got.word_accuracy))
            print(f"{name:14}{n:5}{apart:7.2f}{even:10.3f}{got.word_accuracy:8.1%}", flush=True)
    return out


def video(args: Arguments) -> dict[str, np.ndarray]:
    """Kept patches of each frame, mean over videos, for each method that divides a budget of 16 per frame."""
    loaded = load_embedded_vision()
    model, n, total = loaded.model, 16 * args.frames, loaded.config.tower.num_patches

    @jax.jit
    def scores(model, pixels):
        _, attention = model.tower.run_layers(model.tower.embed(pixels), range(model.config.feature_layers))
        return attention.rows(jnp.zeros((pixels.shape[0], 1), jnp.int32))[:, :, 0, 1:].mean(1)

    masks: dict[str, list[np.ndarray]] = {"random": [], "class attention": [], "class attention, each frame": []}
    rng = np.random.default_rng(0)
    for number in range(args.videos):
        drawing = draw(number, held_out=True)
        empty = np.where(drawing.owner[..., None] >= 0, np.median(drawing.pixels, axis=(0, 1)), drawing.pixels)
        light = np.linspace(-20, 20, args.frames)[:, None, None, None]
        frames = (
            np.where(np.arange(args.frames)[:, None, None, None] >= args.frames // 2, drawing.pixels, empty) + light
        )
        pixels = process(list(frames.clip(0, 255).astype(np.uint8)), loaded.processor, loaded.config).pixels
        score = np.asarray(scores(model, pixels))
        best = lambda x, k: x.argsort(-1).argsort(-1) >= x.shape[-1] - k
        masks["class attention"].append(best(score.reshape(-1), n).reshape(args.frames, total))
        masks["class attention, each frame"].append(best(score, 16))
        masks["random"].append(best(rng.random(args.frames * total), n).reshape(args.frames, total))
    for name, kept in masks.items():
        print(f"{name:30} temporal evenness {float(temporal_evenness(jnp.asarray(np.stack(kept))).mean()):.3f}")
    return {name: np.stack(kept).sum(-1).mean(0) for name, kept in masks.items()}


def main(args: Arguments) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    points, shares = space(args), video(args)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.5, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in dict.fromkeys(point[0] for point in points):
            mine = [point for point in points if point[0] == name]
            left.plot([p[2] for p in mine], [p[4] for p in mine], "o-", markersize=4, linewidth=0.8, label=name)
            for _, n, apart, _, right_answers in mine:
                left.annotate(str(n), (apart, right_answers), textcoords="offset points", xytext=(3, 3), fontsize=7)
        left.set(xlabel="mean distance to the nearest kept patch, in patches", ylabel="right answers")
        for name, share in shares.items():
            right.plot(np.arange(1, args.frames + 1), share, "o-", markersize=4, label=name)
        right.axhline(16, color="k", linestyle="--", linewidth=1, label="even")
        right.set(xlabel="frame; things appear in the middle", ylabel="patches kept")
        for axes in (left, right):
            axes.legend(frameon=False)
            axes.grid(alpha=0.25)
        figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main(arguments(QUICK))
