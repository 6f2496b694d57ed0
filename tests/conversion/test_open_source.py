"""Whatever holds weights opens alike, and says which weights they are."""

import dataclasses

import numpy as np
import pytest
from made_up import (
    FORMS,
    LEAVES,
    MODEL,
    tensors,
)

from k2jax.checkpoint import Checkpoints
from k2jax.config import RunConfig, to_json
from k2jax.conversion import convert
from k2jax.weights.source import initial_params, open_source


@pytest.mark.parametrize("kind", ["run", "checkpoint", "converted", *FORMS])
def test_every_place_with_weights_opens_alike(sources, tmp_path, kind):
    path = sources[kind] if kind in FORMS else tmp_path / "run"
    plain = tensors()
    if kind in ("run", "checkpoint"):
        state = {"params": initial_params(sources["bf16"], LEAVES)}
        with Checkpoints(path) as checkpoints:
            checkpoints.save(7, state, {"config": to_json(RunConfig(model=MODEL))})
        (path / "LICENSE").write_text("as is")
        path = path / "checkpoints" / "7" if kind == "checkpoint" else path
    elif kind == "converted":
        convert(sources["bf16"], path)
    source = open_source(path)
    assert dataclasses.replace(source.config, mtp_layers=0) == MODEL
    assert source.tokenizer is None and "LICENSE" in source.companions
    assert "weights.bin" not in source.companions
    assert source.identity == open_source(path).identity
    assert source.is_checkpoint == (kind not in FORMS) and (source.run is None) == (kind in FORMS)
    norm = "model.layers.1.input_layernorm.weight"
    np.testing.assert_array_equal(source.tensors.read(norm).astype("f4"), plain[norm].astype("f4"))
    assert source.load("float32").params["embed"].shape == (48, 160)


def test_another_source_has_another_identity(sources):
    assert len({open_source(folder).identity for folder in sources.values()}) == len(FORMS)
