"""New tokens from a model: decoding from cached latents, choosing, and the batch call."""
