"""jaxcompress vision-demo"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxcompress.cli.flags import JsonFlag, at_least


@dataclass(frozen=True, kw_only=True)
class VisionDemo(JsonFlag):
    """Asks the embedded vision-language model about pictures of which it sees ever fewer patches.

    Prints what each way of choosing patches costs and saves, and writes a picture of each picture with what was dropped
    greyed out. Needs no download.

    Example: jaxcompress vision-demo --out vision-demo
    """

    out: Path = Path("vision-demo")
    """Write the table (JSON) and the pictures into this folder."""
    methods: tuple[str, ...] = (
        "random", "grid", "pool", "tome", "fastervlm", "visionzip", "fastv", "sparsevlm+", "dart", "mustdrop",
    )  # fmt: skip
    """Methods that choose patches; see docs/vision.md."""
    tokens: tuple[int, ...] = (36, 16)
    """Numbers of visual tokens that are left in the end, of 144."""
    pictures: int = 48
    """Number of held-out pictures, with eight questions about each."""
    drawn: int = 4
    """Number of pictures that are drawn."""

    def run(self) -> None:
        at_least(1, pictures=self.pictures)
        at_least(0, drawn=self.drawn)
        from jaxcompress.cli.runtime import prepare, write_json

        prepare()
        from jaxcompress.checkpoints import load_embedded_vision
        from jaxcompress.evaluation.visual import Examiner, exam, guessing
        from jaxcompress.vision import get_method

        self.out.mkdir(parents=True, exist_ok=True)
        loaded = load_embedded_vision()
        tokenizer = loaded.tokenizer
        patches = loaded.config.tower.num_patches
        if wrong := [n for n in self.tokens if not 0 < n <= patches]:
            raise ValueError(
                f"--tokens: {wrong[0]} of {patches} patches cannot be kept; give numbers from 1 to {patches}"
            )
        budgets = sorted(set(self.tokens), reverse=True)
        chosen = [(patches, get_method("full")), *((n, get_method(name, n)) for n in budgets for name in self.methods)]
        say = (lambda *text: None) if self.json else lambda *text: print(*text, flush=True)
        asked = exam(tokenizer, loaded.processor, loaded.model, pictures=self.pictures)
        example = asked.asked[0][0]
        say(f"{self.pictures} pictures that the model has never seen, {len(asked.answers)} questions about them,")
        say(f"e.g. “{example.text}” — {example.answer}. Guessing well without looking: {guessing(asked):.0%}.")
        say("Left: visual tokens after the last layer; mean: over the decoder's layers. FLOPs and time of reading one")
        say("prompt in the decoder, FLOPs of its matrix products; KV: bytes of its keys and values.\n")
        say(f"{'method':14}{'left':>6}{'mean':>8}{'accuracy':>10}{'MFLOPs':>9}{'KV KiB':>8}{'ms':>7}")
        examiner, table, kept, last = Examiner(loaded.model, asked), [], {}, patches
        try:
            for n, method in chosen:
                try:
                    got = examiner(method)
                except ValueError as error:  # a number that this method cannot reach here; the others can
                    say(("\n" if n != last else "") + f"{method.name:14}{n:6}  {error}")
                    last = n
                    continue
                kept[got.method, n] = got.kept
                table.append(dict(budget=n, **{k: v for k, v in got._asdict().items() if k != "kept"}))
                say(
                    ("\n" if n != last else "") + f"{got.method:14}{n:6}{got.left:8.1f}{got.accuracy:10.1%}"
                    f"{got.flops / 1e6:9.1f}{got.kv_bytes / 1024:8.0f}{got.seconds * 1e3:7.2f}"
                )
                last = n
        finally:
            write_json(table, self.out / "vision_demo.json")
        if self.json:
            write_json(table)
        names = _draw(self, asked, kept)
        say(f"\nEverything is in {self.out}/: vision_demo.json, {', '.join(names)}")


def _draw(how: VisionDemo, asked, kept) -> list[str]:
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
