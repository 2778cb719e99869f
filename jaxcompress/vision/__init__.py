"""The vision tokens of a vision-language model, dropped and merged in the tower, while the prompt is read, and while
words are written: MustDrop and the methods it is measured against."""

from jaxcompress.vision.merging import Merging, merge, unmerge
from jaxcompress.vision.method import Encoded, Method, then
from jaxcompress.vision.names import NAMES, get_method, named_for_average
from jaxcompress.vision.reading import encode, read_encoded, slots

__all__ = [
    "NAMES", "Encoded", "Merging", "Method", "encode", "get_method", "merge", "named_for_average", "read_encoded",
    "slots", "then", "unmerge",
]  # fmt: skip
