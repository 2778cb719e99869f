"""jaxcompress train"""

from jaxcompress.cli.train.command import Train
from jaxcompress.cli.train.settings import train_defaults

__all__ = ["Train", "train_defaults"]
