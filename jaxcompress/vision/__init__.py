"""Fewer visual tokens in a vision-language model: dropped and merged in the tower, while the prompt is read, and while
the answer is written. MustDrop and the methods it is measured against."""

from jaxcompress.vision.merging import Merging, merge, unmerge
from jaxcompress.vision.method import Encoded, Method, PruneStep, combined
from jaxcompress.vision.names import NAMES, get_method, get_method_for_mean
from jaxcompress.vision.reading import encode, read_encoded, slots_per_layer

__all__ = [
    "NAMES", "Encoded", "Merging", "Method", "PruneStep", "combined", "encode", "get_method", "get_method_for_mean",
    "merge", "read_encoded", "slots_per_layer", "unmerge",
]  # fmt: skip
