"""A policy of one's own, compared with others on text that the model has not seen.

python examples/new_policy.py
jaxcompress compare --policies examples/new_policy.py:Fading tova window+4     # every command takes such a file
"""

from __future__ import annotations

import jax.numpy as jnp
import tyro

import jaxcompress as jc
from jaxcompress.embedded.corpus import held_out
from jaxcompress.policies import Policy, policy, protect


@policy
class Fading(Policy):
    """Keeps what has received most attention, where attention of long ago counts less."""

    scope = "layer"
    half_life: int = 16  # tokens after which attention counts half

    def init(self, incoming):
        """The number that each token brings along, [B, P, T]."""
        return jnp.zeros_like(incoming.positions, jnp.float32)

    def observe(self, stats, seen):
        """The numbers after a block of queries. Written as a fold: it may come in one block or token by token."""
        newest = seen.queries.max(-1, keepdims=True)
        age = jnp.where(seen.queries >= 0, newest - seen.queries, 0)  # [B, T]; padding has no attention to give
        fade = 0.5 ** (age / self.half_life)
        passed = (seen.queries >= 0).sum(-1)[:, None, None]
        received = jnp.einsum("bptn,bt->bpn", seen.per_set(self.scope), fade)
        return stats * 0.5 ** (passed / self.half_life) + received

    def score(self, stats, held):
        """[B, P, N]; the lowest goes."""
        return stats


def main(model: str | None = None, slots: int = 64, tokens: int = 2048) -> None:
    loaded = jc.load(model) if model else jc.load_embedded()
    text = max((document.text for document in held_out("topics/")), key=len)
    ids = loaded.tokenizer.encode(text)[None, :tokens]
    print(f"perplexity of {ids.size:,} tokens read through {slots} slots")
    newcomers_stay = protect(Fading(), recent=16)  # they have had no time to receive any attention
    for one in (Fading(), newcomers_stay, jc.get_policy("tova"), jc.get_policy("window+4")):
        print(f"{one.name:32}{jc.perplexity(loaded.model, ids, one, slots).perplexity:8.2f}")


if __name__ == "__main__":
    tyro.cli(main)
