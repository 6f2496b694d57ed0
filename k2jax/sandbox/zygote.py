"""The process that starts programs: `python -I -S zygote.py FD OPTIONS`. Standard library only.

It forks itself, which is faster than a new interpreter: what programs of benchmarks import is
loaded already. Three kinds of process take part:

    zygote    waits on FD for sockets, and starts a worker for each
    worker    number 1 inside: runs one program after another, watches its memory, processes and
              time, and kills all that is left of it; when it ends, the kernel kills everything
    program   the untrusted code, without rights, as a user of its own

What a worker keeps between programs is its namespaces of processes, mounts and network. Each
program gets an empty /tmp and a user that no other program has; nothing else outlives one.
"""

import gc
import json
import marshal
import os
import select
import signal
import socket
import sys
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import isolate

# What samples import most; forked with the zygote.
for _name in (
    *("bisect", "collections", "copy", "functools", "heapq", "itertools", "math", "operator"),
    *("random", "re", "string", "typing"),
):
    __import__(_name)

POLL = 0.02  # seconds between looks at a sandbox's processes
PAGE = os.sysconf("SC_PAGE_SIZE")
FINISHED = 3  # file that a Python program's runner writes to when the last line has been run
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def serve(control: socket.socket, isolated: bool, read_only: list[str]) -> None:
    """Say whether programs can be isolated, then start a worker for every socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers are not waited for
    try:
        isolate.adopt_orphans()
        if isolated:
            isolate.make_root(read_only)
    except OSError as error:
        control.sendall(str(error).encode())
        return
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    control.sendall(b"ready")
    gc.collect()
    gc.freeze()  # forks share the pages of what is here now
    gc.disable()
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        connection = socket.socket(fileno=files[0])
        if os.fork() == 0:
            control.close()
            _become_worker(connection, isolated)
        connection.close()


def _become_worker(connection: socket.socket, isolated: bool) -> None:
    """Fork into a process namespace; what has it is the child, which outlives this process."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if isolated:
            isolate.leave_processes()
        if os.fork() == 0:
            work(connection, isolated)
        code = 0
    except BaseException as error:
        _refuse(connection, error)
    finally:
        os._exit(code)


def work(connection: socket.socket, isolated: bool) -> None:
    """Run programs until the other side is gone."""
    try:
        os.umask(0o022)
        if isolated:
            isolate.enter()
            isolate.hide_memory()
        else:
            isolate.adopt_orphans()
        # A program with this process's user could change the limits of the next one.
        serves_many = os.getuid() == 0
        disk = 0
        while True:
            message, files, _, _ = socket.recv_fds(connection, 4096, 3)
            if not message:
                break
            limits = json.loads(message)
            if isolated:
                isolate.renew(limits["disk"], limits["disk"] != disk)
            disk = limits["disk"]
            report = _run(limits, files, connection, isolated)
            connection.sendall(json.dumps(report | {"is_last": not serves_many}).encode())
            if not serves_many:
                break
    except BaseException as error:
        _refuse(connection, error)
    finally:
        os._exit(0)  # and all that is left inside ends


def _refuse(connection: socket.socket, error: BaseException) -> None:
    why = {"status": "refused", "why": f"{type(error).__name__}: {error}"}
    try:
        connection.sendall(json.dumps(why).encode())
    except OSError:
        pass  # nobody wants to know any more


def _run(limits: dict, files: list[int], connection: socket.socket, isolated: bool) -> dict:
    """Run one program, and see that nothing of it is left; how it ended."""
    began = time.monotonic()
    setup_in, setup_out = os.pipe()
    finished_in, finished_out = os.pipe()
    program = os.fork()
    if program == 0:
        connection.close()
        _be_program(isolated, files, setup_out, finished_out)
    for file in (setup_out, finished_out, *files):
        os.close(file)
    why = _wait(program, connection, limits, began)
    seconds = time.monotonic() - began
    ended = _kill_all(program, isolated)
    refused, finished = _read_all(setup_in), _read_all(finished_in)
    if refused:
        return {"status": "refused", "why": refused.decode()}
    code = os.waitstatus_to_exitcode(ended)
    end: dict = {"status": "signal" if code < 0 else "exited", "code": abs(code)}
    return (end if not why else {"status": why}) | {
        "finished": "" if why else finished[:256].decode("ascii", "replace"),
        "seconds": seconds,
    }


def _wait(program: int, connection: socket.socket, limits: dict, began: float) -> str:
    """Wait for the end: "" of itself, or which limit is exceeded."""
    ended = os.pidfd_open(program)
    poll = select.poll()
    for file in (ended, connection.fileno()):
        poll.register(file, select.POLLIN)
    try:
        while True:
            ready = {file for file, _ in poll.poll(1e3 * POLL)}
            if ended in ready:
                return ""
            if ready:  # the side that asked is gone, or had enough
                return "abandoned"
            if time.monotonic() - began > limits["wall"]:
                return "timeout"
            processes, memory = _measure(os.getpid())
            if memory > limits["memory"]:
                return "memory"
            if processes > limits["processes"]:
                return "processes"
    finally:
        os.close(ended)


def _measure(root: int) -> tuple[int, int]:
    """Processes under `root`, it included, and their resident bytes."""
    count, total, left = 0, 0, [root]
    while left:
        pid = left.pop()
        try:
            with open(f"/proc/{pid}/statm") as statm:
                total += int(statm.read().split()[1]) * PAGE
        except (OSError, IndexError):
            continue  # it ended meanwhile
        left += _list_children(pid)
        count += 1
    return count, total


def _list_children(pid: int) -> list[int]:
    children: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                children += map(int, file.read().split())
    except OSError:
        pass  # it ended meanwhile
    return children


def _kill_all(program: int, isolated: bool) -> int:
    """Kill and reap all processes but this one; the program's wait status."""
    status = 0
    while True:
        if isolated:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            _kill_tree(os.getpid())
        try:
            pid, ended = os.waitpid(-1, 0)
        except ChildProcessError:
            return status
        if pid == program:
            status = ended


def _kill_tree(root: int) -> None:
    for pid in _list_children(root):
        _kill_tree(pid)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _set_up(request: dict, isolated: bool) -> None:
    """Write the program's files and give up all rights."""
    if not isolated:
        os.chdir(request["folder"])
    for name, text in request["files"].items():
        file = os.open(name, os.O_CREAT | os.O_WRONLY, 0o644)
        _write_all(file, text.encode("utf-8", "surrogateescape"))
        os.close(file)
    if "stdin" in request["files"]:  # without input it is /dev/null, as in the zygote
        file = os.open("stdin", os.O_RDONLY)
        os.dup2(file, 0)
        os.close(file)
    os.setsid()
    if isolated:
        isolate.become_nobody(request["number"])
        isolate.deny_system_calls()
    isolate.set_limits(request["limits"])
    for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)


def _be_program(isolated: bool, files: list[int], setup: int, finished: int) -> None:
    """Become the untrusted program."""
    code = 1
    try:
        try:
            request = marshal.loads(_read_all(files[0]))
            _set_up(request, isolated)
        except BaseException as error:
            os.write(setup, f"{type(error).__name__}: {error}".encode())
            return
        for target, file in ((1, files[1]), (2, files[2]), (FINISHED, finished)):
            os.dup2(file, target)
        os.closerange(FINISHED + 1, 1024)
        gc.enable()
        if request["argv"]:
            os.close(FINISHED)
            os.execvpe(request["argv"][0], request["argv"], ENVIRONMENT)
        code = _run_python(request["main"], request.pop("token"))
    except OSError as error:
        os.write(2, f"sandbox: {error}\n".encode())
    finally:
        os._exit(code)


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _run_python(main: str, token: str) -> int:
    """Run a Python file as `python FILE` would; its exit code."""
    sys.argv, sys.path[0] = [main], "/tmp"
    namespace = {"__name__": "__main__", "__file__": main, "__builtins__": __builtins__}
    code = 0
    try:
        source = _read_all(os.open(main, os.O_RDONLY))
        exec(compile(source, main, "exec"), namespace)
        os.write(FINISHED, token.encode())
    except SystemExit as leaving:
        code = _exit_code(leaving.code)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            code = code or 1
    return code


def _exit_code(code: object) -> int:
    if code is None or isinstance(code, int):
        return (code or 0) & 255
    sys.stderr.write(f"{code}\n")
    return 1


def _read_all(file: int) -> bytes:
    """What a file, or a pipe that nobody writes to any more, holds; it is closed."""
    parts = bytearray()
    while part := os.read(file, 1 << 20):
        parts += part
    os.close(file)
    return bytes(parts)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), **json.loads(sys.argv[2]))
