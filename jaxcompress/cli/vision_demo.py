"""jaxcompress vision-demo"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class VisionDemo:
    """Asks the embedded vision-language model about pictures of which it sees ever fewer patches.

    Prints what each way of choosing patches costs and saves, and writes a picture of each picture with what was dropped
    greyed out. Needs no download.

    Example: jaxcompress vision-demo --out vision-demo
    """

    out: Path = Path("vision-demo")
    """Folder for the table (JSON) and the pictures."""
    tokens: tuple[int, ...] = (72, 36, 16)
    """Visual tokens kept of 144; perfect squares can be laid out as a grid."""
    pictures: int = 48
    """Held-out pictures, with eight questions about each."""
    drawn: int = 4
    """How many of them are drawn."""
    json: bool = False
    """Print JSON only."""

    def run(self) -> None:
        import os

        from jaxcompress.cli.runtime import prepare, write_json

        prepare()
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing: it is not needed
        from jaxcompress.embedded import load_embedded_vision
        from jaxcompress.evaluation.visual import Examiner, Way, exam, guessing

        self.out.mkdir(parents=True, exist_ok=True)
        loaded, tokenizer = load_embedded_vision()
        patches = loaded.config.tower.num_patches
        if wrong := [n for n in self.tokens if not 0 < n <= patches]:
            raise ValueError(
                f"tokens: {wrong[0]} of {patches} patches cannot be kept; give numbers from 1 to {patches}"
            )
        if self.pictures < 1:
            raise ValueError(f"pictures: at least 1 is needed, not {self.pictures}")
        say = (lambda *text: None) if self.json else lambda *text: print(*text, flush=True)
        asked = exam(tokenizer, loaded.processor(), loaded.model, pictures=self.pictures)
        example = asked.asked[0][0]
        say(f"{self.pictures} pictures that the model has never seen, {len(asked.answers)} questions about them,")
        say(f"e.g. “{example.text}” — {example.answer}. Guessing well without looking: {guessing(asked):.0%}.")
        say("Tokens: visual tokens of a picture; in a layer: mean over the decoder's layers. FLOPs and time of reading")
        say("one prompt in the decoder, FLOPs as the compiler counts them; KV: bytes of its keys and values.\n")
        say(f"{'way':24}{'tokens':>7}{'in a layer':>12}{'accuracy':>10}{'MFLOPs':>9}{'KV KiB':>8}{'ms':>7}")
        examiner, table, kept = Examiner(loaded.model, asked), [], {}
        try:
            for n in (patches, *sorted(set(self.tokens) - {patches}, reverse=True)):
                for way in [Way("all")] if n == patches else _ways(n, patches):
                    got = examiner(way)
                    kept[way.name, n] = got.kept
                    table.append(dict(budget=n, **{k: v for k, v in got._asdict().items() if k != "kept"}))
                    say(
                        f"{got.way:24}{n:7}{got.left:12.1f}{got.accuracy:10.1%}{got.flops / 1e6:9.1f}"
                        f"{got.kv_bytes / 1024:8.0f}{got.seconds * 1e3:7.2f}"
                    )
                say("")
        finally:
            write_json(table, self.out / "vision_demo.json")
        if self.json:
            write_json(table)
        names = _draw(self, asked, kept)
        say(f"Everything is in {self.out}/: vision_demo.json, {', '.join(names)}")


def _ways(n: int, patches: int) -> list:
    from jaxcompress.evaluation.ways import at_random, by_class_attention, by_last_word, on_a_lattice

    return [at_random(n), on_a_lattice(n), by_class_attention(n), by_last_word(n, patches)]


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
            panels = [Panel(f"{way}, {m}", masks[number * each]) for (way, m), masks in kept.items() if m == n]
            rows.append([first, *panels])
        names.append(f"picture{number}.png")
        draw_dropped(
            drawing.pixels, rows or [[Panel(whole)]], how.out / names[-1], f"{question.text} {question.answer}"
        )
    return names
