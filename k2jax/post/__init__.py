"""After pretraining: supervised fine-tuning, and reinforcement learning by the model's own samples.

It uses `k2jax.training` and `k2jax.inference`, never the other way.
"""
