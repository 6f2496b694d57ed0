"""In someone else's training loop, with nothing of ours loaded but the transforms."""

import re
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import optax

import k2jax.optim
from k2jax.optim import muonclip

OURS = {"k2jax", "k2jax.optim", "k2jax.config", "k2jax.spec"}


def shown(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_it_loads_jax_and_optax_only():
    code = """
    import sys
    import jax, optax
    before = set(sys.modules)
    import k2jax.optim
    new = {name for name in set(sys.modules) - before}
    print(sorted(n for n in new if n.split('.')[0] not in sys.stdlib_module_names))
    """
    new = set(re.findall(r"'([^']+)'", shown(textwrap.dedent(code))))
    assert {name for name in new if not name.startswith("k2jax.optim.")} <= OURS


def test_the_loop_of_the_docstring_learns():
    lines = textwrap.dedent(k2jax.optim.__doc__.split("seen):\n")[1])
    assert len([line for line in lines.splitlines() if line.strip()]) <= 10
    code = f"""
import jax.numpy as jnp
params = {{"w": jnp.ones((4, 8)), "b": jnp.zeros(8)}}
batch = (jnp.eye(4), jnp.arange(32.0).reshape(4, 8) / 32)
def loss_of(p, batch):
    return jnp.mean((batch[0] @ p["w"] + p["b"] - batch[1]) ** 2)
{lines}
for _ in range(60):
    params, state, loss = step(params, state, batch)
first = loss_of({{"w": jnp.ones((4, 8)), "b": jnp.zeros(8)}}, batch)
print(float(loss) < 0.2 * float(first))
"""
    assert shown(code) == "True"


def test_a_rate_can_be_set_between_steps():
    params = {"w": jnp.eye(4)}
    tx = optax.inject_hyperparams(lambda learning_rate: muonclip(learning_rate, tau=None))(2e-2)
    state = tx.init(params)
    first, state = tx.update(params, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(1e-2)
    again = tx.init(params)._replace(hyperparams=state.hyperparams)
    second, _ = tx.update(params, again, params)
    np.testing.assert_allclose(first["w"], 2 * second["w"], rtol=1e-6)
