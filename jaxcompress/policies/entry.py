"""What enters the slots when tokens come in: a token by itself, or joined to the one before it."""

from __future__ import annotations

from jaxtyping import Array, Float

from jaxcompress.policies.cache_view import IncomingTokens, LayerContext
from jaxcompress.policies.labels import Named


class Gates(Named):
    """Decides for each token whether it joins the one before it (see `jaxcompress.policies.gates`)."""

    def check_model(self, context: LayerContext, head_dim: int) -> None:
        """Raises ValueError if they are not for this model."""

    def __call__(
        self, incoming: IncomingTokens, layer: Array, context: LayerContext
    ) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
        """The logit of joining the token before, and the weight in the mean, positive."""
        raise NotImplementedError
