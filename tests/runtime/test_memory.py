import platform
import subprocess
import sys

import numpy as np
import pytest

from k2jax.runtime.memory import resident, trim_malloc


def test_host_memory_is_what_is_resident_now():
    before = resident()
    if not before:
        pytest.skip("this system has no /proc")
    block = np.ones(2**25)
    assert 0.9 * block.nbytes < resident() - before < 1.5 * block.nbytes
    del block
    assert resident() < before + 2**27


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is done")
def test_memory_that_was_freed_goes_back_to_the_system():
    blocks = [np.ones(8_000) for _ in range(4_000)]  # 256 MB in pieces below malloc's own mmap
    top = blocks.pop()  # above all others, so the heap cannot simply shrink
    blocks.clear()
    before = resident()
    trim_malloc()
    assert resident() < before - 200e6
    assert top.sum() == 8_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is done")
def test_arrays_go_back_to_the_system_as_they_are_freed():
    # In a process of its own, whose heaps have no room yet that arrays could take.
    done = subprocess.run(
        [sys.executable, "-c", FREED], check=False, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr


FREED = """
import numpy as np
from k2jax.runtime.memory import limit_malloc_arenas, resident
assert np.ones(2**21).sum() == 2**21  # 16 MB, freed: glibc would now keep smaller ones
limit_malloc_arenas()
blocks = [np.ones(2**18) for _ in range(100)]  # 2 MB each
before = resident()
top = blocks.pop()
blocks.clear()
assert resident() < before - 190e6
assert top.sum() == 2**18
"""
