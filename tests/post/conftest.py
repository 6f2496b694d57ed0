import pytest

from k2jax.post.synthesis.pipeline import Settings, load_library, synthesise


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder of all stages, 24 tasks, and what was said."""
    folder = tmp_path_factory.mktemp("synthesis") / "made"
    said = []
    synthesise(folder, Settings(tasks=24, tools=10), say=said.append)
    return folder, said


@pytest.fixture(scope="session")
def library(made):
    return load_library(made[0])
