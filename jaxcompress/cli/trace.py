"""jaxcompress trace"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxcompress.cli.runtime import (
    StateDtype,
    at_least,
    check_writable,
    chunk_of,
    open_weights,
    policy_named,
    warn_of_positions,
)
from jaxcompress.inputs.text import read_text

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Trace:
    """Writes what a policy held after every step, the logits, and when each token died.

    The file has positions[layer, step, batch, set, slot] (-1 free; step 0 is the prompt), logits[step, batch, vocab] of
    the last token, and death[layer, batch, set, token], the first position that no longer saw the token (the number of
    tokens if it was held to the end).

    Example: jaxcompress trace --text README.md --prompt 256 --policy tova --slots 64 --out trace.npz
    """

    out: Path
    """Where to write (.npz)."""
    prompt: int
    """So many first tokens are read as the mode says, the rest one by one."""
    tokens: Path | None = None
    """Token ids, .npy, [tokens] or [batch, tokens]."""
    text: Path | None = None
    """Or a UTF-8 text; - for standard input."""
    limit: int | None = None
    """Use so many tokens of the text."""
    model: str | None = None
    """Hugging Face folder, hub id, GGUF file or smollm2; the embedded model if not given."""
    policy: str = "tova"
    """See `jaxcompress info` for the names."""
    slots: tuple[int, ...] = (128,)
    """Capacity: one for all layers, or one for each."""
    mode: Literal["oneshot", "chunked", "streaming"] = "oneshot"
    """How the prompt is read."""
    chunk: int | None = None
    """Tokens between two selections in mode chunked; 128 if not given."""
    placement: Literal["absolute", "slot", "compact"] | None = None
    """Where tokens stand for RoPE; as the policy was published if not given."""
    dtype: str | None = None
    """Of weights, e.g. float32; the checkpoint's if not given."""
    state_dtype: StateDtype | None = None
    """What keys and values are stored in, the last three with a scale per slot and head; as --dtype if not given."""
    figure: Path | None = None
    """Also draw the death times (.png)."""

    def run(self) -> None:
        import numpy as np

        if (self.tokens is None) == (self.text is None):
            raise ValueError("give either --tokens or --text")
        chunk = chunk_of(self.mode, self.chunk)
        at_least(1, limit=self.limit)
        check_writable(self.out, self.figure)
        loaded = open_weights(self.model, self.dtype)
        model = loaded.model
        from jaxcompress.evaluation.tracing import trace
        from jaxcompress.generation import Tokenizer
        from jaxcompress.inputs.token_ids import token_rows

        if self.tokens is not None:
            ids = _array(self.tokens)
            if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
                raise ValueError(
                    f"{self.tokens} holds {ids.dtype} {ids.shape}; expected integers, [tokens] or [batch, tokens]"
                )
        else:
            ids = Tokenizer(loaded.folder).encode(read_text(self.text))
        ids = token_rows(np.atleast_2d(ids)[:, : self.limit], model.config.vocab_size, str(self.tokens or self.text))
        policy = policy_named(self.policy, loaded.folder)
        warn_of_positions(model, [self.placement or policy.placement], ids.shape[1])
        done = trace(
            model, ids, policy,
            self.slots[0] if len(self.slots) == 1 else self.slots,
            prompt=self.prompt, mode=self.mode, chunk=chunk, placement=self.placement, dtype=self.state_dtype,
        )  # fmt: skip
        with open(self.out, "wb") as file:
            np.savez_compressed(file, **done._asdict())
        if self.figure is not None:
            from jaxcompress.evaluation.figures import death_times

            death_times(done, self.figure, title=f"{self.policy}, {self.slots[0]} slots")
        layers, steps, batch, sets, _ = done.positions.shape
        print(f"{self.out}: {layers} layers, {steps} steps, batch {batch}, {sets} set{'s' * (sets > 1)} of slots")


def _array(path: Path) -> np.ndarray:
    """The array in a .npy file. Raises ValueError if it is none, OSError if it cannot be read."""
    import numpy as np

    with open(path, "rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, OverflowError, MemoryError, SyntaxError, TypeError) as error:
            raise ValueError(f"{path} is not an array of numbers (.npy): {error}") from None
