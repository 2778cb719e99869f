"""Compression of a prompt, before a model reads it: score its words, keep the best, drop the others."""

from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer
from jaxcompress.prompt.compressor import Compressor
from jaxcompress.prompt.contexts import Contexts
from jaxcompress.prompt.counting import WORDS, Counter, TokenizerCounter
from jaxcompress.prompt.keeping import BudgetTooSmall, Compressed, Kept, keep, keep_above
from jaxcompress.prompt.kinds import KINDS, Kind, protected_spans
from jaxcompress.prompt.messages import compress_messages
from jaxcompress.prompt.official import OfficialCompressor
from jaxcompress.prompt.payoff import Payoff
from jaxcompress.prompt.reading import read_shortened, read_shortened_with_picture
from jaxcompress.prompt.recovery import recovery
from jaxcompress.prompt.streaming import compress_stream
from jaxcompress.prompt.structured import KeyRule, Segment, compress_json, compress_structured
from jaxcompress.prompt.word_scores import ScoredWords, Scorer, mixed
from jaxcompress.prompt.words import segment

__all__ = [
    "KINDS", "WORDS", "BudgetTooSmall", "Compressed", "Compressor", "Contexts", "Counter", "EncoderTokenizer",
    "Kept", "KeyRule", "Kind", "OfficialCompressor", "Payoff", "ScoredWords", "Scorer", "Segment",
    "TokenizerCounter", "compress_json", "compress_messages", "compress_stream", "compress_structured", "keep",
    "keep_above", "mixed", "protected_spans", "read_shortened",
    "read_shortened_with_picture", "recovery", "segment",
]  # fmt: skip
