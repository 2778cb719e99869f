"""Flax NNX modules, used strictly as pytrees, and how they run with a bounded state."""

from jaxcompress.models.config import DecoderConfig
from jaxcompress.models.decoder import Decoder, ReadResult, read
from jaxcompress.models.experts_config import ClampedGate, ExpertsConfig
from jaxcompress.models.init_state import init_state
from jaxcompress.models.llava import Llava, LlavaConfig
from jaxcompress.models.patches import Patches
from jaxcompress.models.rope import RopeConfig, rotate
from jaxcompress.models.tower_config import TowerConfig
from jaxcompress.models.vit import VisionTower

__all__ = [
    "ClampedGate", "Decoder", "DecoderConfig", "ExpertsConfig", "Llava", "LlavaConfig", "Patches", "ReadResult",
    "RopeConfig", "TowerConfig", "VisionTower",
    "init_state", "read", "rotate",
]  # fmt: skip
