"""Do a step again whose batch a run kept when it ended."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from k2jax import sharding
from k2jax.checkpoint import Checkpoints
from k2jax.config import ConfigError, from_json
from k2jax.model.batch import to_devices
from k2jax.params.arrays import initial
from k2jax.training.compile import compile_step
from k2jax.training.metrics import metrics_to_host
from k2jax.training.recovery import REPLAY
from k2jax.training.step import State, build


def replay(run: str | Path, step: int) -> dict[str, Any]:
    """Return the metrics of `step` on the newest checkpoint before it, with its kept batch.

    Nothing is written. The weights are those of that checkpoint: steps taken between it and `step`
    are not done again, skipped ones moved none. Of a run that began with `--init` there must be a
    checkpoint. One process, on the mesh of the run; files of several processes are not taken.

    Args:
        run: its folder; `config.json` may be edited to try other settings.
        step: N of a file `replay/step-N.npz` in it.

    Raises:
        ConfigError: no such file; names those that exist.
    """
    folder = Path(run)
    file = folder / REPLAY / f"step-{step}.npz"
    if not file.is_file():
        kept = sorted(path.name for path in (folder / REPLAY).glob("*.npz"))
        raise ConfigError(f"no file {file}; there are: {', '.join(kept) or 'none'}")
    config = from_json(json.loads((folder / "config.json").read_text()))
    with jax.set_mesh(sharding.make_mesh(config.mesh)) as _, Checkpoints(folder) as saved:
        program = build(config)
        before = max((done for done in saved.steps() if done < step), default=None)
        if before is None:
            state = program.init(initial(program.specs, config.train.seed, config.model.init_std))
        else:
            state = State(**saved.restore(before, program.abstract_state()._asdict()))
        compiled = compile_step(program, jax.sharding.get_mesh())
        with np.load(file) as rows:
            batch = to_devices(rows, config.train.accumulate)
        return metrics_to_host(compiled(state, batch, np.float32(np.inf))[1])
