"""After pretraining: fine-tuning, reinforcement learning by the model's own samples, agentic data.

It uses `k2jax.training` and `k2jax.inference`, never the other way.
"""
