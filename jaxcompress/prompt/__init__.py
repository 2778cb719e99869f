"""The first of three places where tokens are dropped: the prompt, before a model reads it."""

from jaxcompress.inputs.encoder_tokenizer import EncoderTokenizer as EncoderTokenizer
from jaxcompress.prompt.compressor import Compressed as Compressed
from jaxcompress.prompt.compressor import Compressor as Compressor
from jaxcompress.prompt.compressor import Contexts as Contexts
from jaxcompress.prompt.compressor import Document as Document
from jaxcompress.prompt.compressor import ScoredDocument as ScoredDocument
from jaxcompress.prompt.official import OfficialCompressor as OfficialCompressor
from jaxcompress.prompt.scoring import keep_probability as keep_probability
from jaxcompress.prompt.scoring import score as score
from jaxcompress.prompt.streaming import compress_stream as compress_stream
from jaxcompress.prompt.structured import KeyRule as KeyRule
from jaxcompress.prompt.structured import Segment as Segment
from jaxcompress.prompt.structured import compress_json as compress_json
from jaxcompress.prompt.structured import compress_structured as compress_structured
from jaxcompress.prompt.words import Groups as Groups
from jaxcompress.prompt.words import align as align
from jaxcompress.prompt.words import of_words as of_words
from jaxcompress.prompt.words import owners as owners
from jaxcompress.prompt.words import segment as segment
