"""Everything that moves a weight, as optax transforms. Loads jax and optax only."""

from k2jax.optim.balance import balance
from k2jax.optim.muon import newton_schulz, scale_by_muon
from k2jax.optim.muonclip import adamw, muonclip
from k2jax.optim.qk_clip import qk_clip, shrink
from k2jax.optim.schedule import warmup_stable_decay

__all__ = [
    "adamw",
    "balance",
    "muonclip",
    "newton_schulz",
    "qk_clip",
    "scale_by_muon",
    "shrink",
    "warmup_stable_decay",
]
