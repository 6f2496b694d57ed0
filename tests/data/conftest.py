import numpy as np
import pytest

from k2jax.data.store import Store
from k2jax.text.kimi_tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token a byte: id = byte."""
    return Tokenizer({bytes([i]): i for i in range(256)})


@pytest.fixture
def make_store(byte_tokenizer):
    """A store in memory of documents with the given numbers of bytes, all tokens told apart."""

    def make(*sizes: int) -> Store:
        documents = [
            [byte_tokenizer.bos, *((37 * d + i) % 251 for i in range(size)), byte_tokenizer.eos]
            for d, size in enumerate(sizes)
        ]
        offsets = np.cumsum([0] + [len(document) for document in documents])
        stream = [token for document in documents for token in document]
        return Store(np.array(stream, np.uint16), offsets, sum(sizes))

    return make
