"""Loads and saves checkpoints: Hugging Face folders, and GGUF files (loading only)."""

from jaxcompress.checkpoints._config import decoder_config as decoder_config
from jaxcompress.checkpoints._config import hugging_face_config as hugging_face_config
from jaxcompress.checkpoints._dtype import config_dtype as config_dtype
from jaxcompress.checkpoints._embedded import load_embedded as load_embedded
from jaxcompress.checkpoints._embedded import load_embedded_vision as load_embedded_vision
from jaxcompress.checkpoints._encoder import encoder_config as encoder_config
from jaxcompress.checkpoints._encoder import hugging_face_encoder_config as hugging_face_encoder_config
from jaxcompress.checkpoints._encoder import load_backbone as load_backbone
from jaxcompress.checkpoints._encoder import load_encoder as load_encoder
from jaxcompress.checkpoints._encoder import save_encoder as save_encoder
from jaxcompress.checkpoints._known import KNOWN_MODELS as KNOWN_MODELS
from jaxcompress.checkpoints._known import KnownModel as KnownModel
from jaxcompress.checkpoints._load import load as load
from jaxcompress.checkpoints._loaded import Loaded as Loaded
from jaxcompress.checkpoints._policy import SavedPolicy as SavedPolicy
from jaxcompress.checkpoints._policy import load_policy as load_policy
from jaxcompress.checkpoints._policy_of import missing_policy as missing_policy
from jaxcompress.checkpoints._policy_of import policy_of as policy_of
from jaxcompress.checkpoints._save import save as save
from jaxcompress.checkpoints._save_policy import save_policy as save_policy
from jaxcompress.checkpoints._stored_int8 import store_in_int8 as store_in_int8
from jaxcompress.checkpoints._vision import load_llava as load_llava
from jaxcompress.checkpoints._vision import load_tower as load_tower
from jaxcompress.checkpoints._vision import save_llava as save_llava
from jaxcompress.checkpoints._vision_config import llava_config as llava_config
from jaxcompress.checkpoints._vision_config import tower_config as tower_config
