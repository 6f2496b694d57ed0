import pytest

from k2jax import configs
from k2jax.commands.train import suggest_mesh
from k2jax.config import override

TINY = configs.load("tiny")
EIGHT = override(TINY, {"mesh.data": "2", "mesh.model": "2"})
ONE = override(TINY, {"mesh.expert": "1"})


@pytest.mark.parametrize(
    ("run", "cores", "words"),
    [
        (ONE, 2, "this machine has 2 cores: --mesh.expert 2 is usually faster than one device"),
        (EIGHT, 2, "--mesh.data 1 --mesh.model 1 is usually faster than data=2 expert=2 model=2"),
        (TINY, 4, "--mesh.expert 4 is usually"),
        (TINY, 64, "--mesh.expert 8 is usually"),
        (override(TINY, {"model.experts": "12"}), 8, "--mesh.expert 4 is usually"),
    ],
)
def test_a_mesh_with_a_device_for_each_core_is_named(run, cores, words):
    assert words in suggest_mesh(run, cores)


@pytest.mark.parametrize(
    ("run", "cores"),
    [(TINY, 2), (TINY, 3), (TINY, 1), (EIGHT, 8), (override(ONE, {"data.rows": "3"}), 8)],
)
def test_nothing_is_suggested_where_the_run_has_that_mesh_or_none_is_better(run, cores):
    assert not suggest_mesh(run, cores)
