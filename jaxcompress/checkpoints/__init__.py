"""Hugging Face checkpoints in and out."""

from jaxcompress.checkpoints._config import decoder_config as decoder_config
from jaxcompress.checkpoints._config import hugging_face_config as hugging_face_config
from jaxcompress.checkpoints._encoder import LoadedEncoder as LoadedEncoder
from jaxcompress.checkpoints._encoder import encoder_config as encoder_config
from jaxcompress.checkpoints._encoder import hugging_face_encoder_config as hugging_face_encoder_config
from jaxcompress.checkpoints._encoder import load_encoder as load_encoder
from jaxcompress.checkpoints._encoder import save_encoder as save_encoder
from jaxcompress.checkpoints._load import Loaded as Loaded
from jaxcompress.checkpoints._load import load as load
from jaxcompress.checkpoints._policy import SavedPolicy as SavedPolicy
from jaxcompress.checkpoints._policy import load_policy as load_policy
from jaxcompress.checkpoints._policy import save_policy as save_policy
from jaxcompress.checkpoints._save import save as save
