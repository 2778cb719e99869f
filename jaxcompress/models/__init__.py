"""Flax NNX modules, used strictly as pytrees, and how they run with a bounded state."""

from jaxcompress.models.bounded import Read, init_state, read
from jaxcompress.models.decoder import Decoder, DecoderConfig
from jaxcompress.models.rope import RopeConfig, rotate

__all__ = ["Decoder", "DecoderConfig", "Read", "RopeConfig", "init_state", "read", "rotate"]
