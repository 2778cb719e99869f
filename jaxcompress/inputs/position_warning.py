"""The warning of texts longer than a model was trained for. The command line knows it before it imports jax."""


class PositionWarning(UserWarning):
    """Tokens stand at positions that the model was not trained for (see `jaxcompress.models.checks`)."""
