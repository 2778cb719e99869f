"""Hugging Face checkpoints in and out."""

from jaxcompress.checkpoints._config import decoder_config as decoder_config
from jaxcompress.checkpoints._config import hugging_face_config as hugging_face_config
from jaxcompress.checkpoints._load import Loaded as Loaded
from jaxcompress.checkpoints._load import load as load
from jaxcompress.checkpoints._save import save as save
