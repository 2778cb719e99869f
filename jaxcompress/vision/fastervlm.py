"""FasterVLM: patches that the class token looks at (Zhang et al. 2024, "[CLS] Attention is All You Need").

The same scores give VisionZip its dominant tokens.
"""

from __future__ import annotations

from jaxtyping import Array, Float


def class_attention_scores(row: Float[Array, "B H N"]) -> Float[Array, "B N"]:
    """Scores: attention of the class token in the tower's last layer but one, mean over heads."""
    return row.mean(1)
