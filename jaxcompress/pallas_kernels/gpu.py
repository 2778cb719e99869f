"""Kernels for NVIDIA GPUs, through Pallas' Mosaic GPU. See docs/results/kernels-gpu.md for what was proven of them.

step, step_evict   `gpu_step`      one token: keys and values are read once, a row of each is written
segment            `gpu_segment`   many tokens, one after the other, with the slots in shared memory all along
block              `gpu_block`     many queries at once, with the mass that policies fold over
"""

from jaxcompress.pallas_kernels.gpu_block import block as block
from jaxcompress.pallas_kernels.gpu_segment import segment as segment
from jaxcompress.pallas_kernels.gpu_step import step as step
from jaxcompress.pallas_kernels.gpu_step import step_evict as step_evict
