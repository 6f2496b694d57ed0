"""The process that starts programs: `python -I -S zygote.py FD OPTIONS`. Standard library only.

It forks itself for every program, which is faster than a new interpreter: what programs of
benchmarks import is loaded already. Four processes take part:

    zygote    waits for requests on FD, one socket each
    warden    outside of the sandbox: watches memory, processes and time, reports the end
    init      number 1 inside: when it ends, the kernel kills everything else inside
    program   the untrusted code, without rights
"""

import gc
import json
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
SETUP_FAILED = 99  # of init: the status pipe has the reason
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}


def serve(control: socket.socket, isolated: bool, read_only: list[str]) -> None:
    """Say whether programs can be isolated, then fork a warden for every request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # wardens are not waited for
    try:
        if isolated:
            isolate.make_root(read_only)
    except OSError as error:
        control.sendall(str(error).encode())
        return
    control.sendall(b"ready")
    gc.freeze()  # forks share the pages of what is here now
    while True:
        message, files, _, _ = socket.recv_fds(control, 1, 3)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            code = 1
            try:
                watch(files, isolated)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        for file in files:
            os.close(file)


def watch(files: list[int], isolated: bool) -> None:
    """Run one program and report how it ended; nothing of it is left then."""
    request_fd, stdout, stderr = files
    isolate.die_with_parent()
    connection = socket.socket(fileno=request_fd)
    request = _receive(connection)
    limits, began = request["limits"], time.monotonic()
    status_in, status_out = os.pipe()
    if isolated:
        isolate.leave_processes()
    init = os.fork()
    if init == 0:
        os.close(status_in)
        connection.close()
        _be_init(request, isolated, status_out, (stdout, stderr))
    for file in (status_out, stdout, stderr):
        os.close(file)
    why = _wait(init, connection, limits, began)
    if not isolated:
        _kill_group(init)
    _kill(init)
    report = json.loads(_read_all(status_in) or b"{}")
    report.update({"status": why} if why else {})
    report.setdefault("status", "killed")
    _send(connection, report | {"seconds": time.monotonic() - began})


def _wait(init: int, connection: socket.socket, limits: dict, began: float) -> str:
    """Wait for the end: "" of itself, or why it has to be ended."""
    ended = os.pidfd_open(init)
    poll = select.poll()
    for file in (ended, connection.fileno()):
        poll.register(file, select.POLLIN)
    while True:
        ready = {file for file, _ in poll.poll(1e3 * POLL)}
        if ended in ready:
            return ""
        if ready:  # the side that asked is gone, or had enough
            return "abandoned"
        if time.monotonic() - began > limits["wall"]:
            return "timeout"
        processes, memory = _measure(init)
        if memory > limits["memory"]:
            return "memory"
        if processes > limits["processes"]:
            return "processes"


def _measure(root: int) -> tuple[int, int]:
    """Processes under `root`, it included, and their resident bytes."""
    count, total, found = 0, 0, [root]
    while found:
        pid = found.pop()
        try:
            with open(f"/proc/{pid}/statm") as statm:
                total += int(statm.read().split()[1]) * PAGE
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as children:
                    found += map(int, children.read().split())
        except (OSError, IndexError):
            continue  # it ended meanwhile
        count += 1
    return count, total


def _kill(init: int) -> None:
    try:
        os.kill(init, signal.SIGKILL)
    except ProcessLookupError:
        pass
    os.waitpid(init, 0)


def _kill_group(init: int) -> None:
    try:
        os.killpg(init, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _be_init(request: dict, isolated: bool, status: int, outputs: tuple[int, int]) -> None:
    """Set up the sandbox, start the program in it, report how the program ended."""
    try:
        isolate.die_with_parent()
        _set_up(request, isolated)
        finished_in, finished_out = os.pipe()
        program = os.fork()
    except BaseException as error:
        why = {"status": "refused", "why": f"{type(error).__name__}: {error}"}
        os.write(status, json.dumps(why).encode())
        os._exit(SETUP_FAILED)
    if program == 0:
        os.close(status)
        _be_program(request, isolated, finished_out, outputs)
    for file in (finished_out, *outputs):
        os.close(file)
    while True:
        pid, ended = os.wait()
        if pid == program:
            break
    code = os.waitstatus_to_exitcode(ended)
    report: dict = {"status": "signal" if code < 0 else "exited", "code": abs(code)}
    os.set_blocking(finished_in, False)
    try:
        report["finished"] = os.read(finished_in, 1024) == request["token"].encode()
    except BlockingIOError:  # a program that lives on has the pipe too
        report["finished"] = False
    os.write(status, json.dumps(report).encode())
    os._exit(0)


def _set_up(request: dict, isolated: bool) -> None:
    if isolated:
        isolate.enter(request["limits"]["disk"])
    else:
        os.setpgid(0, 0)
        os.chdir(request["folder"])
    for name, text in request["files"].items():
        with open(name, "wb") as out:
            out.write(text.encode("utf-8", "surrogateescape"))
        os.chmod(name, 0o644)
    if isolated:
        isolate.become_nobody(request["number"])
        isolate.hide_memory()


def _be_program(request: dict, isolated: bool, finished: int, outputs: tuple[int, int]) -> None:
    """Become the untrusted program."""
    code = 1
    try:
        nothing = os.open("stdin", os.O_RDONLY)
        os.dup2(nothing, 0)
        for target, file in enumerate((*outputs, finished), start=1):
            os.dup2(file, target)
        os.closerange(FINISHED + 1, 1024)
        if isolated:
            os.setsid()
            isolate.deny_system_calls()
        isolate.set_limits(request["limits"])
        for number in (signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        if request["argv"]:
            os.close(FINISHED)
            os.execvpe(request["argv"][0], request["argv"], ENVIRONMENT)
        code = _run_python(request["main"], request.pop("token"))
    except OSError as error:
        os.write(2, f"sandbox: {error}\n".encode())
    finally:
        os._exit(code)


def _run_python(main: str, token: str) -> int:
    """Run a Python file as `python FILE` would; its exit code."""
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    sys.argv, sys.path[0] = [main], "/tmp"
    sys.modules["random"].seed()
    namespace = {"__name__": "__main__", "__file__": main, "__builtins__": __builtins__}
    code = 0
    try:
        with open(main, "rb") as file:
            exec(compile(file.read(), main, "exec"), namespace)
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


def _receive(connection: socket.socket) -> dict:
    size = int.from_bytes(_exactly(connection, 8), "little")
    return json.loads(_exactly(connection, size))


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise OSError("request cut short")
        parts += part
    return bytes(parts)


def _send(connection: socket.socket, message: dict) -> None:
    try:
        connection.sendall(json.dumps(message).encode())
    except OSError:
        pass  # nobody wants to know any more


def _read_all(file: int) -> bytes:
    parts = bytearray()
    while part := os.read(file, 65_536):
        parts += part
    return bytes(parts)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), **json.loads(sys.argv[2]))
