"""TPU and GPU kernels.

A kernel here takes arrays, knows nothing of policies, and is reached through `jaxcompress.recurrence.attention` only.
What one is asked to do is in `contract`; where one is picked by `auto`, in `measured`; `tpu` and `gpu` are the two
backends. See docs/kernels.md for what was proven of them, and how.
"""
