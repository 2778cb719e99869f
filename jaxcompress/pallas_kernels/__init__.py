"""Room for TPU and GPU kernels; there are none yet.

A kernel here takes arrays, knows nothing of policies, and is reached through `jaxcompress.attention` only, which picks
it where it has been measured to be faster than XLA's own code.
"""
