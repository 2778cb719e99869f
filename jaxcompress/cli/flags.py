"""The flags that several commands take. Each is declared once, so that it means the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from jaxcompress.cli.paths import POLICY, READ
from jaxcompress.inputs.text import named, parse_json, read_text

if TYPE_CHECKING:
    from jaxcompress.generation import GenerationConfig

StateDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4"]
"""`jaxcompress.state.storage.DTYPES`, for the parser, which imports no array library."""

CHUNK = 128
"""Tokens between two selections in mode chunked, unless --chunk says otherwise."""


def at_least(least: int, **given: int | None | tuple[int, ...]) -> None:
    """Raises ValueError for a number below the least that makes sense, and names its flag."""
    for name, values in given.items():
        for value in (values,) if isinstance(values, int) else values or ():
            if value < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def check_fractions(given: tuple[int, ...], usual: tuple[int, ...], policies: tuple[str, ...]) -> None:
    """Raises ValueError if --fractions is given for policies that all get the whole context."""
    if given != usual and set(policies) == {"full"}:
        raise ValueError("--fractions does nothing for full, which gets the whole context; leave it out")


@dataclass(frozen=True, kw_only=True)
class ModelFlag:
    """Which model."""

    model: str | None = None
    """Folder in Hugging Face's format, a name on its hub, a GGUF file, or smollm2; the embedded model if not given."""


@dataclass(frozen=True, kw_only=True)
class WeightFlags(ModelFlag):
    """Which model, and the type of its weights."""

    dtype: str = "auto"
    """Type of the weights, for example bfloat16. `auto` is the checkpoint's own, but float32 on a CPU, where narrower
    floats are slower. int8 rounds them: a quarter of the memory, and on a CPU decoding is up to twice as fast."""


@dataclass(frozen=True, kw_only=True)
class StateDtypeFlag:
    """How the state is stored."""

    state_dtype: StateDtype | None = None
    """Type in which the state stores keys and values; that of the weights if not given. The last three have a scale per
    slot and head."""


@dataclass(frozen=True, kw_only=True)
class PlacementFlag:
    """Where tokens stand for RoPE."""

    placement: Literal["absolute", "slot", "compact"] | None = None
    """Position of a token for RoPE; as the policy was published if not given. slot and compact keep distances within
    what the model was trained on, however long the text."""

    def check_placement(self, *policies: str) -> None:
        """Raises ValueError if --placement is given for policies that all keep every token where it stands."""
        if self.placement is not None and set(policies) == {"full"}:
            raise ValueError(
                "--placement does nothing for full, which keeps every token where it stands; leave it out, or name a "
                "policy that evicts"
            )


@dataclass(frozen=True, kw_only=True)
class PolicyFlags:
    """The policy and its capacity."""

    policy: Annotated[str, POLICY] = "tova"
    """Eviction policy: a name from `jaxcompress info`, learned for the one saved with the model, or FILE.py:NAME for
    your own. Modifiers follow after slashes: tova/protect-recent64."""
    slots: tuple[int, ...] = (128,)
    """Capacity of each layer: one number for all layers, or one per layer."""

    @property
    def capacity(self) -> int | tuple[int, ...]:
        """`slots` as the library takes them."""
        return self.slots[0] if len(self.slots) == 1 else self.slots


@dataclass(frozen=True, kw_only=True)
class ModeFlags:
    """How often tokens are selected while a text is read."""

    mode: Literal["streaming", "chunked", "oneshot"] = "streaming"
    """streaming: select after every token, as in decoding. chunked: select after every --chunk tokens. oneshot: read
    the whole prompt, then select once."""
    chunk: int | None = None
    """Tokens between two selections in mode chunked; 128 if not given."""

    def chunk_tokens(self) -> int:
        """Tokens between two selections in mode chunked. Raises ValueError if --chunk is given for another mode."""
        at_least(1, chunk=self.chunk)
        if self.chunk is not None and self.mode != "chunked":
            raise ValueError(f"--chunk is for --mode chunked; {self.mode} has no chunks")
        return CHUNK if self.chunk is None else self.chunk


@dataclass(frozen=True, kw_only=True)
class PromptTokensFlag:
    """Where the prompt ends in a text that is read to its end."""

    prompt_tokens: int | None = None
    """The first so many tokens are the prompt; half of the tokens if not given. The rest is read token by token."""


@dataclass(frozen=True, kw_only=True)
class TextFlags:
    """The text to read."""

    file: Annotated[Path | None, READ] = None
    """Read this UTF-8 file; - is standard input."""
    prompt: str | None = None
    """Read this text."""

    def text(self) -> tuple[str, str] | None:
        """Name and content of the text; None if none was given.

        Raises:
          ValueError: two texts, or not UTF-8.
          OSError: the file cannot be read.
        """
        if self.file is not None and self.prompt is not None:
            raise ValueError("give --file or --prompt, not both")
        if self.prompt is not None:
            return "the prompt", self.prompt
        return None if self.file is None else (named(self.file), read_text(self.file))


@dataclass(frozen=True, kw_only=True)
class TemplateFlags:
    """What the chat template is given."""

    system: str | None = None
    """System message before the user's."""
    template_args: str | None = None
    """Arguments of the chat template, as a JSON object: {"enable_thinking": false}."""

    def template_arguments(self) -> dict[str, Any]:
        """--template-args as an object. Raises ValueError if it is none."""
        given = {} if self.template_args is None else parse_json(self.template_args, "--template-args")
        if not isinstance(given, dict):
            raise ValueError(f'--template-args must be a JSON object like {{"name": true}}, not {self.template_args}')
        return given


@dataclass(frozen=True, kw_only=True)
class LimitFlag:
    """How much of a text."""

    limit: int = 2048
    """Read at most so many tokens."""


@dataclass(frozen=True, kw_only=True)
class SeedFlag:
    """What is drawn at random."""

    seed: int = 0
    """Seed of all random numbers."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(SeedFlag):
    """How tokens are written."""

    max_new_tokens: int = 128
    """Tokens to write, at most."""
    temperature: float = 0.0
    """0: always the most likely token."""
    top_k: int | None = None
    """Draw from so many of the most likely tokens."""
    top_p: float | None = None
    """Draw from the most likely tokens that together have this probability."""
    min_p: float | None = None
    """Draw from tokens at least this times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were read or written before become less likely."""

    def check_sampling(self) -> None:
        """Raises ValueError for what can be known to be wrong before anything is loaded."""
        at_least(1, max_new_tokens=self.max_new_tokens)
        if self.temperature == 0:
            for name, none in (("top_k", None), ("top_p", None), ("min_p", None), ("seed", 0)):
                if getattr(self, name) != none:
                    raise ValueError(
                        f"--{name.replace('_', '-')} does nothing at --temperature 0, which takes the best token"
                    )

    def sampling(self, stop_token_ids: tuple[int, ...] = ()) -> GenerationConfig:
        """The flags as the library takes them."""
        from jaxcompress.generation import GenerationConfig

        return GenerationConfig(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, stop_token_ids
        )


@dataclass(frozen=True, kw_only=True)
class RowsFlag:
    """Where figures go."""

    out: Path | None = None
    """Add a row for each figure to this file (JSON Lines), which `jaxcompress board` reads. Nothing in it changes; what
    is there already is not measured again."""


@dataclass(frozen=True, kw_only=True)
class FigureFlag:
    """A picture of the results."""

    figure: Path | None = None
    """Draw the results into this file too (.png)."""


@dataclass(frozen=True, kw_only=True)
class JsonFlag:
    """What is printed."""

    json: bool = False
    """Print JSON instead of text."""
