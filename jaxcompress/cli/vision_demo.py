"""jaxcompress vision-demo"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcompress.cli.flags import JsonFlag, at_least

if TYPE_CHECKING:
    from jaxcompress.evaluation.visual import Exam, Examiner
    from jaxcompress.vision.method import Method

Kept = dict[tuple[str, int], Any]
"""(method, tokens left) -> the patches kept, [R, N] bool."""


@dataclass(frozen=True, kw_only=True)
class VisionDemo(JsonFlag):
    """Asks the embedded vision-language model about pictures of which it keeps ever fewer patches.

    Prints what each method costs and saves, and draws each picture with the dropped patches greyed out. Needs no
    download.

    Example: jaxcompress vision-demo --out vision-demo
    """

    out: Path = Path("vision-demo")
    """Write the table (JSON) and the pictures into this folder."""
    methods: tuple[str, ...] = (
        "random", "grid", "pool", "tome", "fastervlm", "visionzip", "fastv", "sparsevlm+", "dart", "mustdrop",
    )  # fmt: skip
    """Methods that choose patches; see docs/guides/pictures.md."""
    tokens: tuple[int, ...] = (64, 36)
    """Visual tokens left after the last layer, of 144."""
    pictures: int = 48
    """Number of held-out pictures, with eight questions about each."""
    drawn: int = 4
    """Number of pictures that are drawn."""

    def run(self) -> None:
        at_least(1, pictures=self.pictures)
        at_least(0, drawn=self.drawn)
        from jaxcompress.cli.runtime import Incomplete, check_figure, prepare, write_json

        prepare()
        self.out.mkdir(parents=True, exist_ok=True)
        check_figure(self.out / "picture0.png")
        from jaxcompress.checkpoints import load_embedded_vision
        from jaxcompress.evaluation.visual import Examiner, exam

        loaded = load_embedded_vision()
        chosen = _methods(self, loaded.config.tower.num_patches)
        say = (lambda *text: None) if self.json else lambda *text: print(*text, flush=True)
        asked = exam(loaded.model, loaded.tokenizer, loaded.processor, pictures=self.pictures)
        _introduce(self, asked, say)
        table, kept, failed = [], dict[tuple[str, int], Any](), 0
        try:
            failed = _measure(Examiner(loaded.model, asked), chosen, table, kept, say)
        finally:
            write_json(table, self.out / "vision_demo.json")
        if self.json:
            write_json(table)
        names = _draw(self, asked, kept)
        say(f"\nEverything is in {self.out}/: vision_demo.json, {', '.join(names)}")
        if failed:
            raise Incomplete(f"{failed} of {len(chosen)} measurements failed; the others are in {self.out}")


def _methods(how: VisionDemo, patches: int) -> list[tuple[int, Method]]:
    """(tokens left, method), the method that keeps all first."""
    from jaxcompress.vision import get_method

    if wrong := [n for n in how.tokens if not 0 < n <= patches]:
        raise ValueError(f"--tokens: {wrong[0]} of {patches} patches cannot be kept; give numbers from 1 to {patches}")
    budgets = sorted(set(how.tokens), reverse=True)
    return [(patches, get_method("full")), *((n, get_method(name, n)) for n in budgets for name in how.methods)]


def _introduce(how: VisionDemo, asked: Exam, say: Callable[..., None]) -> None:
    from jaxcompress.evaluation.visual import guessing

    example = asked.asked[0][0]
    say(f"{how.pictures} pictures that the model has never seen, {len(asked.answers)} questions about them,")
    say(f"e.g. “{example.text}” — {example.answer}. Guessing well without looking: {guessing(asked):.0%}.")
    say("Left: visual tokens after the last layer; mean: over the decoder's layers. FLOPs and time: to read one prompt")
    say("in the decoder and write the answer, FLOPs of matrix products; KV: bytes of the state of one prompt.\n")
    say(f"{'method':14}{'left':>6}{'mean':>8}{'accuracy':>10}{'MFLOPs':>9}{'KV KiB':>8}{'ms':>7}")


def _measure(
    examiner: Examiner,
    chosen: list[tuple[int, Method]],
    table: list[Any],
    kept: dict[Any, Any],
    say: Callable[..., None],
) -> int:
    """Adds a line for each method to the table, and its kept patches by name and number; says each at once.

    Returns:
      How many failed.
    """
    from jaxcompress.cli.runtime import tell

    last, failed = chosen[0][0], 0
    for n, method in chosen:
        gap, last = "\n" if n != last else "", n
        try:
            got = examiner(method)
        except ValueError as error:  # a number that this method cannot reach here; the others can
            tell(f"{method.name}, {n} tokens: {error}")
            failed += 1
            continue
        kept[got.method, n] = got.kept
        table.append(dict(budget=n, **{k: v for k, v in got._asdict().items() if k != "kept"}))
        left = method.tokens_per_layer(examiner.model.config)[-1]
        say(
            f"{gap}{got.method:14}{left:6}{got.left:8.1f}{got.accuracy:10.1%}"
            f"{got.flops / 1e6:9.1f}{got.kv_bytes / 1024:8.0f}{got.seconds * 1e3:7.2f}"
        )
    return failed


def _draw(how: VisionDemo, asked: Exam, kept: Kept) -> list[str]:
    """Draws the first pictures with every method; returns the names of the files."""
    from jaxcompress.evaluation.dropped import Panel, draw_dropped

    each, names = len(asked.asked[0]), []
    (whole, patches), *_ = kept
    budgets = list(dict.fromkeys(n for _, n in kept if n != patches))
    for number, drawing in enumerate(asked.drawings[: how.drawn]):
        question = asked.asked[number][0]
        rows: list[list[Panel | None]] = []
        for n in budgets:
            first = None if rows else Panel(f"{whole}, {patches}")
            panels = [Panel(f"{name}, {m}", masks[number * each]) for (name, m), masks in kept.items() if m == n]
            rows.append([first, *panels])
        names.append(f"picture{number}.png")
        draw_dropped(
            drawing.pixels, rows or [[Panel(whole)]], how.out / names[-1], f"{question.text} {question.answer}"
        )
    return names
