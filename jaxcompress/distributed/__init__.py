"""One program on many devices: a mesh, and the rules that spread weights, states and optimizers over it."""

from jaxcompress.distributed.collectives import Collective, collectives
from jaxcompress.distributed.mesh import make_mesh
from jaxcompress.distributed.processes import join, on_host
from jaxcompress.distributed.rules import ShardingRules

__all__ = ["Collective", "ShardingRules", "collectives", "join", "make_mesh", "on_host"]
