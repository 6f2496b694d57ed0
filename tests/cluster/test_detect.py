"""Who this process is: by options, by SLURM, by a Kubernetes job, or alone."""

import pytest

from k2jax.cluster.detect import Place, find
from k2jax.config import ConfigError

CLUSTERS = ("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No cluster around the tests."""
    import os

    for name in [name for name in os.environ if name.startswith(CLUSTERS)]:
        monkeypatch.delenv(name)


def test_a_plain_start_is_alone():
    assert find(None, None, None) is None
    assert find(None, 1, None) is None


def test_three_options_make_a_place():
    assert find("10.0.0.1:1234", 4, 3) == Place("10.0.0.1:1234", 4, 3)


WRONG = [
    (("h:1", 4, None), "--process is missing; processes by hand need --coordinator HOST:PORT"),
    ((None, 4, 1), "--coordinator is missing"),
    (("h:1", None, 1), "--processes is missing"),
    (("h:1", 4, 4), "--process is 4; 4 processes have the numbers 0..3"),
    (("h:1", 4, -1), "--process is -1; 4 processes have the numbers 0..3"),
    (("h:1", 0, 0), "--processes is 0; it must be at least 1"),
    (("h", 4, 1), "--coordinator is 'h'; it must be HOST:PORT"),
    (("h:port", 4, 1), "--coordinator is 'h:port'; it must be HOST:PORT"),
    (("h:99999", 4, 1), "--coordinator is 'h:99999'; it must be HOST:PORT"),
]


@pytest.mark.parametrize(("given", "says"), WRONG)
def test_options_that_do_not_fit_are_refused(given, says):
    with pytest.raises(ConfigError) as error:
        find(*given)
    assert str(error.value).startswith(says)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
}


def test_slurm_says_it_itself(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    place = find(None, None, None)
    assert place == Place(place.coordinator, 16, 9, [1])
    assert place.coordinator.startswith("gpu03:")
    assert find(None, 1, None) is None  # a sweep: each task trains alone
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find(None, None, None) is None


def test_a_cluster_that_makes_no_sense_is_one_line(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "many"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        find(None, None, None)
    assert "ValueError" in str(error.value) and "--processes 1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*Kubernetes environment detected")
def test_a_pod_without_the_kubernetes_package_is_told_what_to_install(monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    monkeypatch.setitem(__import__("sys").modules, "kubernetes", None)
    with pytest.raises(ConfigError, match=r"install jax\[k8s\]"):
        find(None, None, None)
