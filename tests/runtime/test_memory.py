import platform
import subprocess
import sys

import numpy as np
import pytest

from k2jax.runtime import memory
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is done")
def test_steps_take_the_same_pages_of_the_heap_again_and_other_arrays_none_of_it():
    done = subprocess.run([sys.executable, "-c", KEPT], check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is done")
def test_where_an_array_stays_in_the_block_the_rest_of_it_is_given_back():
    done = subprocess.run(
        [sys.executable, "-c", MOVED], check=False, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    memory.limit_malloc_arenas()
    reserve = memory.Reserve(2**20)
    with reserve.lend():
        memory.trim_malloc()
    reserve.close()


KEPT = """
import resource
import numpy as np
from k2jax.runtime.memory import Reserve, limit_malloc_arenas, resident
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
limit_malloc_arenas()
reserve = Reserve(2**27)
began = resident()
for step in range(5):
    before = faults()
    with reserve.lend():
        assert np.ones(2**24).sum() == 2**24  # 128 MiB, 32,768 pages
    taken = faults() - before
    kept = [np.ones(2**18) for _ in range(100)]  # 2 MiB each, between steps
assert taken < 1_000, taken
kept.clear()
assert 120e6 < resident() - began < 150e6
reserve.close()
assert resident() - began < 20e6
"""

MOVED = """
import numpy as np
from k2jax.runtime.memory import Reserve, limit_malloc_arenas, resident
limit_malloc_arenas()
reserve = Reserve(2**27)
began = resident()
with reserve.lend():
    assert np.ones(2**24).sum() == 2**24
with reserve.lend():
    below = np.ones(2**23)
    kept = np.ones(2**18)  # 2 MiB, in the middle of the block
    del below
assert resident() - began < 100e6, resident() - began
assert kept.sum() == 2**18
"""

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
