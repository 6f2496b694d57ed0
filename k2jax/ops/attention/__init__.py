"""Causal attention of one device: the reference by blocks, and kernels for GPUs and TPUs."""
