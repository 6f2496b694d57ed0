"""Programs in a sandbox do what they should, and nothing of what they should not."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from k2jax.config import ConfigError
from k2jax.sandbox import Limits, Sandbox, SandboxError

MB = 1 << 20
LIMITS = Limits(wall=20, cpu=10, memory=256 * MB, disk=16 * MB, processes=16, output=100_000)


def run(sandbox, program, **limits):
    return sandbox.run_python(program, limits=LIMITS.__class__(**(vars(LIMITS) | limits)))


def children(pid):
    """Processes that a process started, or adopted."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def says(sandbox, program):
    """What a program that ends well prints."""
    outcome = run(sandbox, program)
    assert outcome.is_ok, outcome
    return outcome.stdout.decode().strip()


def test_a_program_runs_and_its_end_is_reported(sandbox):
    outcome = sandbox.run_python(
        "import sys\nprint(input())\nprint('no', file=sys.stderr)", "yes\n"
    )
    assert (outcome.status, outcome.code, outcome.finished) == ("exited", 0, True)
    assert (outcome.stdout, outcome.stderr) == (b"yes\n", b"no\n")
    assert run(sandbox, "raise SystemExit(7)").code == 7
    failed = run(sandbox, "x = 1\nassert x == 2, 'it is not'")
    assert failed.code == 1 and b"main.py" in failed.stderr and b"it is not" in failed.stderr
    killed = run(sandbox, "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert (killed.status, killed.code) == ("signal", signal.SIGSEGV)


def test_programs_of_the_system_run_with_their_files(sandbox):
    outcome = sandbox.run(["sh", "-c", "cat a.txt; cat"], {"a.txt": "one "}, "two")
    assert outcome.stdout == b"one two"
    with pytest.raises(ConfigError, match="without folders"):
        sandbox.run(["true"], {"../a": ""})
    missing = sandbox.run(["no-such-program"])
    assert not missing.is_ok and b"No such file" in missing.stderr


def test_programs_of_many_threads_do_not_meet(sandbox):
    numbers = {}

    def one(i):
        program = f"open('mine', 'x').write('{i}')\nprint(open('mine').read())"
        numbers[i] = run(sandbox, program).stdout

    threads = [threading.Thread(target=one, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert numbers == {i: f"{i}\n".encode() for i in range(12)}


# Attacks. Each test is one that would succeed without the part of the sandbox that it names.


def test_network_cannot_be_reached(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = says(
            sandbox,
            f"""
import socket
for address in (("127.0.0.1", {port}), ("1.1.1.1", 53)):
    try:
        socket.create_connection(address, 1); print("reached")
    except OSError as error:
        print(error.errno)
for family in (socket.AF_NETLINK, socket.AF_PACKET, 40):
    try:
        socket.socket(family, socket.SOCK_RAW); print("opened")
    except OSError as error:
        print(error.errno)
""",
        )
    assert "reached" not in answer and "opened" not in answer


def test_fork_bomb_ends_with_its_sandbox(sandbox):
    outcome = run(sandbox, "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass")
    assert outcome.status in ("processes", "timeout", "memory")
    assert says(sandbox, "print('next')") == "next"


def test_memory_is_limited_in_one_process_and_in_all(sandbox):
    assert b"MemoryError" in run(sandbox, "x = bytearray(1 << 30)").stderr
    many = """
import mmap, os, time
for _ in range(4):
    if os.fork() == 0:
        x = mmap.mmap(-1, 100 << 20)
        x.write(b"x" * (100 << 20))
        time.sleep(60)
time.sleep(60)
"""
    assert run(sandbox, many).status == "memory"


def test_disk_is_limited(sandbox):
    outcome = run(
        sandbox,
        "for i in range(100):\n  with open(f'f{i}', 'wb') as f: f.write(b'x' * (1 << 20))",
    )
    assert b"No space left" in outcome.stderr
    files = (
        "n = 0\ntry:\n  while True: open(f'f{n}', 'w').close(); n += 1\nexcept OSError: print(n)"
    )
    assert int(says(sandbox, files)) < 10_000


def test_home_and_environment_are_not_there(sandbox, monkeypatch, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("treasure")
    monkeypatch.setenv("SECRET", "treasure")
    answer = says(
        sandbox,
        f"""
import os, pathlib
print(dict(os.environ))
for path in ({str(secret)!r}, {str(Path.home())!r}, {os.getcwd()!r}, "/etc/shadow", "/root/.ssh"):
    try:
        print(pathlib.Path(path).read_text() if os.path.isfile(path) else os.listdir(path)[:3])
    except OSError as error:
        print(error.errno)
for pid in range(1, 4000):
    try: print(open(f"/proc/{{pid}}/environ").read())
    except OSError: pass
""",
    )
    assert "treasure" not in answer and "shadow" not in answer


def test_nothing_outside_of_its_folder_can_be_written(sandbox):
    answer = says(
        sandbox,
        """
import os, sys
for path in ("/usr/x", "/etc/passwd", "/x", "/proc/sys/kernel/core_pattern", sys.base_prefix + "/x",
             "/dev/x", "/lib/x", "/proc/self/uid_map", "/proc/self/oom_score_adj"):
    try:
        open(path, "a").write("x"); print("wrote", path)
    except OSError as error:
        pass
print("tried")
""",
    )
    assert [line for line in answer.splitlines() if "oom_score_adj" not in line] == ["tried"]


def test_processes_outside_are_neither_seen_nor_signalled(sandbox):
    answer = says(
        sandbox,
        f"""
import os, signal
print(sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) == [1, os.getpid()])
for pid in (-1, 1, os.getppid(), {os.getpid()}):
    try: os.kill(pid, signal.SIGKILL)
    except OSError: pass
print("alive")
""",
    )
    assert answer.splitlines() == ["True", "alive"]


def test_no_process_can_be_traced(sandbox):
    answer = says(
        sandbox,
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, 1, 0, 0), libc.ptrace(0, 0, 0, 0))
try: open("/proc/1/mem", "rb"); print("opened")
except OSError: pass
try: print(os.readlink("/proc/1/exe"), os.listdir("/proc/1/fd"))
except OSError: print("hidden")
""",
    )
    assert answer == "-1 -1\nhidden"


def test_daemons_end_with_the_program(sandbox, tmp_path):
    daemon = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
print("left one")
"""
    began = time.monotonic()
    assert says(sandbox, daemon) == "left one"
    assert time.monotonic() - began < 60
    for worker in children(sandbox._zygote.pid):
        while children(worker) and time.monotonic() - began < 30:
            time.sleep(0.01)  # another test's program may be ending
        assert not children(worker)


def test_symbolic_links_lead_nowhere(sandbox, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("treasure")
    program = f"""
import os
os.symlink({str(secret)!r}, "link")
os.symlink("/proc/1/root" + {str(secret)!r}, "other")
for name in ("link", "other"):
    try: print(open(name).read())
    except OSError: print("nothing")
"""
    assert says(sandbox, program) == "nothing\nnothing"


def test_huge_output_ends_the_program(sandbox):
    outcome = run(sandbox, "import os\nwhile True: os.write(1, b'x' * 65536)")
    assert outcome.status == "output" and len(outcome.stdout) == LIMITS.output
    errors = run(sandbox, "import os\nwhile True: os.write(2, b'x' * 65536)")
    assert errors.status == "output" and len(errors.stderr) == LIMITS.output


@pytest.mark.parametrize(
    "end",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'passed')\n"
        "  except OSError: pass\nos._exit(0)",
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: 1",
    ],
)
def test_leaving_early_is_not_passing(sandbox, end):
    outcome = run(sandbox, f"print('passed')\n{end}\nassert False")
    assert outcome.is_ok and not outcome.finished


def test_endless_programs_end(sandbox):
    assert run(sandbox, "while True: pass", wall=0.5).status == "timeout"
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))"
    asleep = f"import signal, time\n{block}\ntime.sleep(60)"
    assert run(sandbox, asleep, wall=0.5).status == "timeout"
    spent = run(sandbox, "while True: pass", cpu=1, wall=120)
    assert (spent.status, spent.code) == ("signal", signal.SIGXCPU)
    block = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run(sandbox, block, cpu=1, wall=120).code == signal.SIGKILL


def test_namespaces_and_mounts_cannot_be_changed(sandbox):
    answer = says(
        sandbox,
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x00020000, 0x40000000, 0x20000000):
    print(libc.unshare(flags), end=" ")
print(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None), end=" ")
print(libc.umount2(b"/proc", 2), libc.chroot(b"/tmp"))
try: os.setuid(0); print("root")
except OSError: pass
try: os.mknod("disk", 0o60600, os.makedev(254, 0)); print("device")
except OSError: pass
print(libc.syscall(425, 1, 0), libc.syscall(321, 0, 0, 0))
""",
    )
    assert answer == "-1 -1 -1 -1 -1 -1 -1\n-1 -1"


def test_a_sandbox_that_cannot_isolate_refuses(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="riscv64"):
        Sandbox()


def test_without_isolation_limits_remain():
    with Sandbox(isolated=False) as one:
        assert one.run_python("print(1)").stdout == b"1\n"
        assert run(one, "while True: pass", wall=0.5).status == "timeout"
        daemon = "import os, time\nif os.fork() == 0: time.sleep(600)\nprint('left one')"
        assert run(one, daemon).stdout == b"left one\n"


def test_closing_ends_what_runs(sandbox):
    one = Sandbox()
    errors = []

    def endless():
        try:
            one.run_python("while True: pass")
        except SandboxError as error:
            errors.append(error)

    thread = threading.Thread(target=endless)
    thread.start()
    time.sleep(0.3)
    one.close()
    thread.join(60)
    assert errors and not thread.is_alive()
    with pytest.raises(SandboxError, match="has ended"):
        one.run_python("")
