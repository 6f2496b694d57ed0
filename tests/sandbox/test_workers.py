"""A worker runs one program after another, and keeps nothing of them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from k2jax.sandbox import Limits, Sandbox

LIMITS = Limits(wall=60, cpu=10)


def children(pid):
    """Processes that a process started, or adopted."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def says(sandbox, program):
    """What a program that ends well prints."""
    outcome = sandbox.run_python(program, limits=LIMITS)
    assert outcome.is_ok, outcome
    return outcome.stdout.decode().strip()


def test_nothing_is_left_for_the_next_program(sandbox):
    """A worker runs one program after another: files, IPC, processes and limits are new."""
    with Sandbox() as one:
        leaving = """
import ctypes, os, resource, socket, time
libc = ctypes.CDLL(None)
open("left", "w").write("x"); os.mkdir("more"); os.symlink("left", "link"); os.umask(0o777)
print(libc.shmget(4711, 4096, 0o1666) >= 0, libc.semget(4711, 1, 0o1666) >= 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8)); os.nice(15)
for pid in (1, 0):
    try: resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
    except OSError: pass
    try: os.setpriority(os.PRIO_PROCESS, pid, 19)
    except OSError: pass
    try: os.sched_setaffinity(pid, {min(os.sched_getaffinity(0))})
    except OSError: pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        server = socket.socket(socket.AF_UNIX); server.bind("\\0left"); server.listen()
        time.sleep(600)
    os._exit(0)
time.sleep(0.1)
"""
        looking = """
import ctypes, os, resource, socket
libc = ctypes.CDLL(None)
print(sorted(os.listdir()), libc.shmget(4711, 4096, 0), libc.semget(4711, 1, 0))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], os.nice(0), os.umask(0) != 0o777)
print(resource.getrlimit(resource.RLIMIT_FSIZE)[0], len(os.sched_getaffinity(0)))
print({int(name) for name in os.listdir("/proc") if name.isdigit()} == {1, os.getpid()})
try: socket.socket(socket.AF_UNIX).connect("\\0left"); print("connected")
except OSError: print("refused")
"""
        before = says(one, looking)
        uid = "import os\nprint(os.getuid())"
        first = says(one, uid)
        assert says(one, leaving) == "False False"
        assert says(one, looking) == before
        assert before.splitlines()[0].startswith("['main.py']")
        assert before.splitlines()[3:] == ["True", "refused"]
        if os.getuid() == 0:
            assert says(one, uid) != first
            assert len(children(one._zygote.pid)) == 1  # one worker served all of them


def test_ordinary_users_can_isolate_too(sandbox):
    """Without root a user namespace is made, and a worker runs one program only."""
    if os.getuid() != 0:
        pytest.skip("then all tests here are that")
    program = """
import os
print(os.getuid(), os.listdir("/tmp"), len([x for x in os.listdir("/proc") if x.isdigit()]))
for path in ("/etc/shadow", "/root"):
    print(os.path.exists(path))
"""
    starts = f"""
from k2jax.sandbox import Sandbox
with Sandbox() as one:
    for _ in range(2): print(one.run_python({program!r}).stdout.decode())
"""
    root = Path(__file__).parents[2]
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin") or sys.executable
    started = subprocess.run(
        [python, "-c", starts],
        env={"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if started.returncode:
        pytest.skip(started.stderr.strip().splitlines()[-1])  # no user namespaces, another Python
    assert started.stdout.split() == "1000 ['main.py'] 2 False False".split() * 2


def test_a_worker_goes_on_after_a_program_that_was_ended(sandbox):
    with Sandbox() as one:
        assert one.run_python("while True: pass", limits=Limits(wall=0.3)).status == "timeout"
        assert says(one, "print('next')") == "next"
        writing = "import os\nwhile True: os.write(1, b'x' * 65536)"
        assert one.run_python(writing, limits=LIMITS).status == "output"
        assert says(one, "print(open('/dev/stdin').read() == '')") == "True"
