"""Right answers against visual tokens kept: stages of MustDrop, designed scores, chance, even spread, position bias.

    python experiments/vision_tables.py --out rows.jsonl
    python experiments/vision_tables.py --out rows.jsonl --table table.md      # only draws what the file holds

The embedded vision-language model is asked about held-out drawings as it is served: `prefill_encoded` reads picture and
question into a KV state, and `decode` writes the answer under the method's own policy. A cell is one method and number
of tokens; `random` has one for each seed.

The tables of two papers: MustDrop (Liu et al. 2024, tables 1 and 5: each stage alone and together), and the position
paper (Liu et al. 2025, section 4: chance and an even spread beside designed scores; where kept tokens stand).
`random_against_designed.py`, `position_bias.py` and `uniformity.py` draw the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from command import arguments
from paper_tables import OfRows, Plan, markdown, of_experiment, run, spread

from jaxcompress.checkpoints import load_embedded_vision
from jaxcompress.evaluation.results import Cell, Figure, Row
from jaxcompress.evaluation.visual import ANSWER, Examiner, exam
from jaxcompress.models.fingerprint import fingerprint
from jaxcompress.vision import Method, get_method
from jaxcompress.vision.encoders import top_patches
from jaxcompress.vision.mustdrop import decoding, mustdrop
from jaxcompress.vision.uniformity import end_bias, gap, position_bias, spatial_evenness

EXPERIMENT, RIGHT, WORD = "vision_tables", "right answers, %", "right first words, %"
LEFT, FLOPS, KIB = "visual tokens per layer of the decoder", "MFLOPs of the decoder", "KiB of a row"
SPACE = {"gap": "gap, patches", "even": "evenness", "bias": "position bias", "end": "end bias"}

_KEEPS_ALL = Method._field_defaults["decode_policy"]
STAGES: dict[str, Callable[[int], Method]] = {
    "mustdrop-encode": lambda n: get_method("mustdrop-encode", n),
    "mustdrop-prefill": lambda n: get_method("mustdrop-prefill", n),
    "mustdrop-decode": lambda n: decoding(),
    "mustdrop, first two stages": lambda n: mustdrop(n)._replace(decode_policy=_KEEPS_ALL),
    "mustdrop": mustdrop,
}
"""MustDrop's stages alone and together. The third alone starts from all tokens, whatever the number."""


@dataclass(frozen=True, kw_only=True)
class Arguments(OfRows):
    """Adds rows to the file for each method and number of tokens, and prints the table."""

    methods: tuple[str, ...] = (
        "random", "stride", "grid", "pool", "tome", "fastervlm", "visionzip", "fastv", "sparsevlm+", *STAGES,
    )  # fmt: skip
    """Names of `jaxcompress.vision`, and the stages of MustDrop; all tokens are measured too."""
    tokens: tuple[int, ...] = (64, 36, 16)
    """Visual tokens left in the end, of 144."""
    pictures: int = 48
    """Pictures, with eight questions about each."""
    seeds: int = 3
    """Draws of `random`."""


QUICK = Arguments(quick=True, methods=("random", "mustdrop-decode"), tokens=(16,), pictures=2, seeds=1)


def chance(seed: int) -> Callable[..., jax.Array]:
    """Random scores [B, N] of patches, others for each picture."""

    def score(model: Any, patches: Any, attention: Any) -> jax.Array:
        rows, key = jnp.arange(patches.size.shape[0]), jax.random.key(seed)
        draw = lambda row: jax.random.uniform(jax.random.fold_in(key, row), (model.config.tower.num_patches,))
        return jax.vmap(draw)(rows)

    return score


def method_of(cell: Cell) -> Method:
    assert isinstance(cell.slots, int)
    n = cell.slots
    if cell.policy == "full":
        return get_method("full")
    if cell.policy == "random":
        return Method("random", top_patches(chance(cell.seed), n), lambda config: n)
    return STAGES[cell.policy](n) if cell.policy in STAGES else get_method(cell.policy, n)


def plan(args: Arguments) -> Plan:
    loaded = load_embedded_vision()
    model, tower = loaded.model, loaded.config.tower
    grid = tower.grid, tower.grid
    asked = exam(model, loaded.tokenizer, loaded.processor, pictures=args.pictures)
    examiner, print_of_model = Examiner(model, asked), fingerprint(model.decoder)
    cells = (
        Cell(
            experiment=EXPERIMENT, task="drawings", model="embedded vision", model_hash=print_of_model, policy=name,
            slots=n, context=tower.num_patches, dtype="float32", seed=seed, settings=dict(pictures=args.pictures),
        )
        for name in ("full", *args.methods)
        for n in (args.tokens if name != "full" else (tower.num_patches,))
        for seed in range(args.seeds if name == "random" else 1)
    )  # fmt: skip

    def figures(cell: Cell) -> Iterator[Figure]:
        got = examiner(method_of(cell))
        kept, rows = jnp.asarray(got.kept), len(asked.answers)
        facts: dict[str, Any] = dict(tokens=ANSWER * rows, samples=rows, state_bytes=got.kv_bytes)
        for metric, share in ((RIGHT, got.accuracy), (WORD, got.word_accuracy)):
            error = 100 * (share * (1 - share) / rows) ** 0.5
            yield Figure(metric=metric, value=100 * share, spread=error, details=got.by_kind, **facts)
        yield Figure(metric=LEFT, value=got.left, **facts)
        yield Figure(metric=FLOPS, value=got.flops / 1e6, lower_is_better=True, **facts)
        yield Figure(metric=KIB, value=got.kv_bytes / 1024, lower_is_better=True, **facts)
        space = dict(gap=gap(kept, grid), even=spatial_evenness(kept, grid), bias=position_bias(kept),
                     end=end_bias(kept))  # fmt: skip
        for name, value in space.items():
            yield Figure(metric=SPACE[name], value=float(value.mean()), **facts)

    return cells, figures


def line(row: Row) -> str:
    cell, figure = row.cell, row.figure
    return f"{cell.policy:28} {cell.slots!s:>4} {cell.seed:3} {figure.metric:40} {figure.value:9.3f}"


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: a line for each method and number of tokens; of `random` the mean over seeds."""
    rows = of_experiment(rows, EXPERIMENT)
    lines: dict[tuple[str, Any], dict[str, list[Figure]]] = {}
    for row in rows:
        mine = lines.setdefault((row.cell.policy, row.cell.slots), {})
        mine.setdefault(row.figure.metric, []).append(row.figure)
    if not lines:
        return ["no rows"]

    def right(found: list[Figure]) -> str:
        return (
            f"{found[0].value:.1f} ± {found[0].spread:.1f}"
            if len(found) == 1
            else spread([one.value for one in found], ".1f")
        )

    def entries(found: dict[str, list[Figure]]) -> Iterator[str]:
        yield from (right(found[metric]) for metric in (RIGHT, WORD))
        for metric, form in ((LEFT, ".1f"), (FLOPS, ",.0f"), (KIB, ",.0f"), *((one, ".2f") for one in SPACE.values())):
            yield spread([found[metric][0].value], form)

    first = next(iter(lines.values()))[RIGHT][0]
    names = sorted(lines, key=lambda key: -key[1])
    return [
        f"Embedded vision-language model, {first.samples:,} questions. Right answers with their standard error; that "
        "of `random` is over draws. Gap, evenness and biases are of the patches that the last layer holds when the "
        "answer is written; the position bias of `random`, which draws anew for each picture, is what chance gives.",
        "",
        *markdown(
            ["method", "tokens left", RIGHT, WORD, LEFT, FLOPS, KIB, *SPACE.values()],
            ([f"`{name}`", f"{n}", *entries(lines[name, n])] for name, n in names),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    args = arguments(QUICK)
    run(args, lambda: plan(args), table, line, experiment=EXPERIMENT)
