"""Sizes at which a computation changes its way. Read without jax: the planner counts by them."""

ATTENTION_BLOCK = 512  # queries, and keys, that meet at a time; longer rows go by blocks
LOGITS_BYTES = 2**29  # of float32 logits that a device may hold; more are made in parts
