"""Hugging Face checkpoints in and out."""

from jaxcompress.checkpoints._config import decoder_config as decoder_config
from jaxcompress.checkpoints._config import hugging_face_config as hugging_face_config
from jaxcompress.checkpoints._load import Loaded as Loaded
from jaxcompress.checkpoints._load import load as load
from jaxcompress.checkpoints._policy import SavedPolicy as SavedPolicy
from jaxcompress.checkpoints._policy import load_policy as load_policy
from jaxcompress.checkpoints._policy import save_policy as save_policy
from jaxcompress.checkpoints._save import save as save
from jaxcompress.checkpoints._vision import LoadedLlava as LoadedLlava
from jaxcompress.checkpoints._vision import LoadedTower as LoadedTower
from jaxcompress.checkpoints._vision import llava_config as llava_config
from jaxcompress.checkpoints._vision import load_llava as load_llava
from jaxcompress.checkpoints._vision import load_tower as load_tower
from jaxcompress.checkpoints._vision import save_llava as save_llava
from jaxcompress.checkpoints._vision import tower_config as tower_config
