"""Everything that moves a weight, as optax transforms. Loads jax and optax only.

`optax.inject_hyperparams(muonclip)(learning_rate=2e-2)` lets `state.hyperparams` be set between
steps.

In anyone's training loop, with plain matrices (`specs` say how other arrays are to be seen):

    import jax, optax
    from k2jax.optim import muonclip

    tx = muonclip(2e-2)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss
"""

from k2jax.optim.balance import balance
from k2jax.optim.muon import muon, scale_by_muon
from k2jax.optim.muonclip import adamw, muonclip
from k2jax.optim.newton_schulz import POLYNOMIALS, RESTARTS, newton_schulz
from k2jax.optim.qk_clip import clip_factor, qk_clip
from k2jax.optim.schedule import warmup_stable_decay
from k2jax.params.matrices import Matrices
from k2jax.params.spec import ParamSpec

__all__ = [
    "POLYNOMIALS",
    "RESTARTS",
    "Matrices",
    "ParamSpec",
    "adamw",
    "balance",
    "clip_factor",
    "muon",
    "muonclip",
    "newton_schulz",
    "qk_clip",
    "scale_by_muon",
    "warmup_stable_decay",
]
