"""Generation with a bounded state: prompts in, tokens and text out."""

from jaxcompress.generation.chat import Chat
from jaxcompress.generation.config import GenerationConfig
from jaxcompress.generation.decode_state import DecodeState, init_decode_state
from jaxcompress.generation.generate import DecodeStream, decode, decode_stream, generate, prefill, prefill_stream
from jaxcompress.generation.state_file import load_state, save_state
from jaxcompress.generation.text import StopStrings, TextStream, TextUntil, Tokenizer, encode_stream

__all__ = [
    "Chat", "DecodeState", "DecodeStream", "GenerationConfig", "StopStrings", "TextStream", "TextUntil", "Tokenizer",
    "decode", "decode_stream", "encode_stream", "generate", "init_decode_state", "load_state", "prefill",
    "prefill_stream", "save_state",
]  # fmt: skip
