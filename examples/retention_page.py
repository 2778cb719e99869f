"""Shows what a policy keeps of a text: a table, and a page in which every token is coloured by how long it was held.

python examples/retention_page.py --policy h2o --slots 64 --out page.html
"""

from __future__ import annotations

from pathlib import Path

import tyro

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.evaluation import survival_by_kind, token_kinds, token_texts
from jaxcompress.evaluation.page import page


def main(
    model: str | None = None,
    file: Path | None = None,
    policy: str = "tova",
    slots: int = 64,
    tokens: int = 2048,
    out: Path = Path("page.html"),
) -> None:
    text = file.read_text(encoding="utf-8") if file else max((one.text for one in held_out("topics/")), key=len)
    loaded = jc.load(model) if model else jc.load_embedded()
    ids = loaded.tokenizer.encode(text)[:tokens]

    # When each token was evicted, [layers, sets of slots, tokens].
    trace = jc.trace(loaded.model, ids[None], jc.get_policy(policy), slots, prompt=len(ids), mode="streaming")
    death = trace.death[:, 0]

    texts = token_texts(loaded.tokenizer, ids)
    kinds = token_kinds(texts)
    print("share of tokens held 16, 64 and 256 steps after they were read")
    for row in survival_by_kind(death, kinds, after=(16, 64, 256)):
        shares = "".join(f"{share:8.0%}" for share in row.after)
        print(f"{row.kind:16}{shares}")
    out.write_text(page(death, texts, title=f"What {policy} keeps in {slots} slots", kinds=kinds), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    tyro.cli(main)
