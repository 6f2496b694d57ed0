"""One server over a scripted engine for all tests of a file that need no other."""

import pytest
from serving import say_what_user_says, serving


@pytest.fixture(scope="module")
def server():
    """It answers with what the user said, control tokens read as such."""
    with serving(say_what_user_says) as made:
        yield made
