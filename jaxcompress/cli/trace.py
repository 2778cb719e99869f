"""jaxcompress trace"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from jaxcompress.cli.flags import (
    FigureFlag,
    LimitFlag,
    ModeFlags,
    PlacementFlag,
    PolicyFlags,
    PromptTokensFlag,
    StateDtypeFlag,
    TextFlags,
    WeightFlags,
    at_least,
)
from jaxcompress.cli.paths import READ
from jaxcompress.cli.retention import slots_told
from jaxcompress.cli.runtime import check_figure, check_writable, chosen_policy, open_weights, tell
from jaxcompress.inputs.whole_file import whole_file

if TYPE_CHECKING:
    import numpy as np

    from jaxcompress.checkpoints import Loaded


@dataclass(frozen=True, kw_only=True)
class Trace(
    FigureFlag, StateDtypeFlag, PlacementFlag, ModeFlags, PromptTokensFlag, PolicyFlags, WeightFlags, LimitFlag,
    TextFlags,
):  # fmt: skip
    """Writes which tokens the slots held after each step, the logits, and when each token was evicted.

    The file has positions[layer, step, batch, set, slot] (-1: a free slot; step 0 is the prompt),
    logits[step, batch, vocab] of the last token read, and death[layer, batch, set, token]: the first position that no
    longer saw the token, or the number of tokens if it was held to the end.

    Example: jaxcompress trace --file README.md --prompt-tokens 256 --policy tova --slots 64 --out trace.npz
    """

    out: Path
    """Write the arrays to this file (.npz)."""
    token_ids: Annotated[Path | None, READ] = None
    """Read these token ids instead of a text: .npy, [tokens] or [batch, tokens]."""

    def run(self) -> None:
        import numpy as np

        chunk = self.chunk_tokens()
        self.check_placement(self.policy)
        at_least(1, limit=self.limit, prompt_tokens=self.prompt_tokens)
        given = [flag for flag in (self.token_ids, self.file, self.prompt) if flag is not None]
        if len(given) != 1:
            raise ValueError("give one of --file, --prompt and --token-ids")
        check_writable(self.out)
        check_figure(self.figure)
        loaded = open_weights(self.model, self.dtype)
        from jaxcompress.evaluation.tracing import trace

        ids = self._ids(loaded)
        policy = chosen_policy(self.policy, loaded.model, loaded.folder)
        prompt = max(ids.shape[1] // 2, 1) if self.prompt_tokens is None else self.prompt_tokens
        done = trace(
            loaded.model, ids, policy, self.capacity,
            prompt=prompt, mode=self.mode, chunk=chunk, placement=self.placement, dtype=self.state_dtype,
        )  # fmt: skip
        with whole_file(self.out) as part, open(part, "wb") as file:
            np.savez_compressed(file, **done._asdict())
        if self.figure is not None:
            from jaxcompress.evaluation.figures import death_times

            death_times(done, self.figure, title=f"{self.policy}, {slots_told(self.capacity)} slots")
        layers, steps, batch, sets, _ = done.positions.shape
        print(f"{self.out}: {layers} layers, {steps} steps, batch {batch}, {sets} set{'s' * (sets > 1)} of slots")

    def _ids(self, loaded: Loaded) -> np.ndarray:
        """The token ids to read, [batch, tokens]."""
        import numpy as np

        from jaxcompress.inputs.token_ids import token_rows

        if (given := self.text()) is not None:
            what, ids = given[0], loaded.tokenizer.encode(given[1])
        else:
            assert self.token_ids is not None
            what, ids = str(self.token_ids), _array(self.token_ids)
            if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
                raise ValueError(
                    f"{what} holds {ids.dtype} {ids.shape}; expected integers, [tokens] or [batch, tokens]"
                )
        ids = np.atleast_2d(ids)
        if ids.shape[1] > self.limit:
            tell(f"the first {self.limit:,} of {ids.shape[1]:,} tokens are read; --limit reads more")
        return token_rows(ids[:, : self.limit], loaded.model.config.vocab_size, what)


def _array(path: Path) -> np.ndarray:
    """The array in a .npy file. Raises ValueError if there is none, OSError if the file cannot be read."""
    import numpy as np

    with open(path, "rb") as file:
        try:
            return np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, EOFError, OverflowError, MemoryError, SyntaxError, TypeError) as error:
            raise ValueError(f"{path} is not an array of numbers (.npy): {error}") from None
