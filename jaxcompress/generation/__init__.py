"""Writing with a bounded state."""

from jaxcompress.generation.generate import Progress, Settings, continue_, generate, prefill, read_on, start, write
from jaxcompress.generation.sampling import Sampler
from jaxcompress.generation.text import StopStrings, TextStream, TextUntil, Tokenizer, encode_stream

__all__ = [
    "Progress", "Sampler", "Settings", "StopStrings", "TextStream", "TextUntil", "Tokenizer", "continue_",
    "encode_stream", "generate", "prefill", "read_on", "start", "write",
]  # fmt: skip
