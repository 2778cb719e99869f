"""What becomes of evicted tokens: merged into what stays, or summarised beside it."""

from jaxcompress.policies.reduction import Reduction
from jaxcompress.policies.reductions.merge import cam, d2o, merge_nearest, merge_weighted
from jaxcompress.policies.reductions.reduced import with_reduce
from jaxcompress.policies.reductions.summarise import low_rank, mean_slots

__all__ = ["Reduction", "cam", "d2o", "low_rank", "mean_slots", "merge_nearest", "merge_weighted", "with_reduce"]
