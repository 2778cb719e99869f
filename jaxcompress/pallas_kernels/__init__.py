"""TPU and GPU kernels.

A kernel takes arrays and knows nothing of policies. `jaxcompress.recurrence.attention` is the only way to it. `types`
is the interface, `tpu` and `gpu` are the two backends, `tpu_limits` and `gpu_limits` say what they can do, `dispatch`
chooses one, and `measured` is the table that `auto` follows. docs/results/kernels-tpu.md says what was proven, and how.
"""
