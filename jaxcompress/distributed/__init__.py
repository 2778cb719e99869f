"""One program on many devices: a mesh, and the rules that spread weights, states and optimizers over it."""

from jaxcompress.distributed.mesh import make_mesh, mesh_sizes
from jaxcompress.distributed.rules import ShardingRules

__all__ = ["ShardingRules", "make_mesh", "mesh_sizes"]
