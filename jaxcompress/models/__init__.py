"""Flax NNX modules, used strictly as pytrees, and how they run with a bounded state."""

from jaxcompress.models.bounded import Read, init_state, read
from jaxcompress.models.decoder import Decoder, DecoderConfig
from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.models.vit import Patches, TowerConfig, VisionTower

__all__ = [
    "Decoder", "DecoderConfig", "Llava", "LlavaConfig", "Patches", "Read", "RopeConfig", "TowerConfig", "VisionTower",
    "init_state", "read", "rotate",
]  # fmt: skip
