import pytest
from made_up import CONFIG, FORMS, save


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {form: save(root / form, t(), CONFIG | c) for form, (c, t) in FORMS.items()}
