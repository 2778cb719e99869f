"""Losses and optimizers for training decoders."""

from jaxcompress.training.foresight import foresight_loss
from jaxcompress.training.loss import token_losses
from jaxcompress.training.optimizer import muon_for_decoder, warmup_stable_decay

__all__ = ["foresight_loss", "muon_for_decoder", "token_losses", "warmup_stable_decay"]
