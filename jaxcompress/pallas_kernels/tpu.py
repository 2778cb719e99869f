"""Kernels for TPUs (Mosaic), written for v5e and v6e. See docs/results/kernels-tpu.md for what was proven of them.

Each reads keys and values once, in tiles that the pipeline brings into VMEM, and is one launch per layer:

  step, step_evict   `tpu_step`      one token: a tile of the state is read, 8 rows of it are written
  segment            `tpu_segment`   many tokens, one after the other, with a row's slots in VMEM all along
  block              `tpu_block`     many queries at once, with the mass that policies fold over
"""

from jaxcompress.pallas_kernels.tpu_block import block as block
from jaxcompress.pallas_kernels.tpu_segment import segment as segment
from jaxcompress.pallas_kernels.tpu_step import step as step
from jaxcompress.pallas_kernels.tpu_step import step_evict as step_evict
