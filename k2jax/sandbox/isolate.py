"""Namespaces, a file system of its own, a user without rights: what a process cannot undo.

Run without the package (`zygote.py`): standard library only. Source: namespaces(7),
user_namespaces(7), pivot_root(2), capabilities(7).
"""

import ctypes
import os
import resource
import struct

import seccomp

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MNT_DETACH = 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
CAP_SYS_ADMIN = 21
SIGKILL = 9
FIRST_UID, UIDS = 1_900_000_000, 1 << 20  # a range that nobody has
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/alternatives")
FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("null", "zero", "full", "random", "urandom")
NEW_ROOT = "/tmp"  # only a place to mount on, in a mount namespace of its own
libc = ctypes.CDLL(None, use_errno=True)


def enter_namespaces() -> None:
    """Leave this process's namespaces; those it starts are in a process namespace of their own.

    Root needs no user namespace: it becomes a user that nobody is. Others are root in one of their
    own while they mount, and an ordinary user after.
    """
    user, group = os.getuid(), os.getgid()
    if _has_capability(CAP_SYS_ADMIN):
        _call("unshare", CLONE_NEWPID)
        return
    _call("unshare", CLONE_NEWUSER | CLONE_NEWPID)
    for file, text in (
        ("setgroups", "deny"),
        ("uid_map", f"1000 {user} 1"),
        ("gid_map", f"1000 {group} 1"),
    ):
        with open(f"/proc/self/{file}", "w") as out:
            out.write(text)


def enter_file_system(read_only: list[str], disk: int) -> None:
    """Make this process's root a small one: the system and `read_only`, /dev, /proc and /tmp.

    Args:
        read_only: folders or files that can be read at their own paths.
        disk: bytes of everything that can be written.
    """
    _call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    # Every source is opened first: mounting the new root may cover it.
    sources = {path: os.open(path, os.O_PATH) for path in _list_sources(read_only)}
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    _mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes=8192,mode=755")
    for path, source in sources.items():
        _bind(f"/proc/self/fd/{source}", path)
        os.close(source)
    for path, target in links.items():
        if not os.path.lexists(NEW_ROOT + path):
            os.symlink(target, NEW_ROOT + path)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{NEW_ROOT}/dev/{name}")
    for name in ("dev/shm", "tmp"):
        os.mkdir(f"{NEW_ROOT}/{name}")
        os.chmod(f"{NEW_ROOT}/{name}", 0o1777)
    with open(f"{NEW_ROOT}/etc/passwd", "w") as out:
        out.write("nobody:x:1000:1000:nobody:/tmp:/bin/sh\n")
    os.mkdir(f"{NEW_ROOT}/proc")
    # Processes only: nothing of the machine, no /proc/sys.
    _mount("proc", f"{NEW_ROOT}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")
    os.chdir(NEW_ROOT)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def become_nobody(number: int) -> None:
    """Give up all rights for good, in this process and in all that it starts.

    Args:
        number: tells sandboxes apart, so that limits of a user are limits of a sandbox.
    """
    if os.getuid() == 0:
        user = FIRST_UID + number % UIDS
        os.setgroups([])
        os.setresgid(user, user, user)
    else:
        user = os.getuid()
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    os.setresuid(user, user, user)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))
    _call("capset", header, ctypes.create_string_buffer(24))
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def deny_system_calls(program: bytes) -> None:
    """Install the filter of system calls; `become_nobody` comes before."""
    seccomp.install(libc, program)


def die_with_parent() -> None:
    """Be killed when the process that started this one ends."""
    _call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)


def hide_memory() -> None:
    """Keep processes of the same user from reading this one's memory."""
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def set_limits(limits: dict) -> None:
    """Set the limits of a process: CPU seconds, memory, processes, files, no core dumps."""
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu"]),
        (resource.RLIMIT_DATA, limits["memory"]),  # not the address space: V8 reserves much of it
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, 256),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))


def _list_sources(read_only: list[str]) -> list[str]:
    system = [path for path in SYSTEM if os.path.isdir(path) and not os.path.islink(path)]
    files = [path for path in FILES if os.path.isfile(path)]
    return [*system, *files, *read_only, *(f"/dev/{name}" for name in DEVICES)]


def _bind(source: str, path: str) -> None:
    """Mount `source` read-only at `path` of the new root."""
    target = NEW_ROOT + path
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.lexists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(source, target, "", MS_BIND)
    # A user namespace may not lift flags of the source; these have the same numbers as in statvfs.
    kept = os.statvfs(target).f_flag & (MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    is_device = path.startswith("/dev/")
    flags = MS_NOSUID if is_device else MS_NOSUID | MS_NODEV | MS_RDONLY
    _mount("none", target, "", MS_REMOUNT | MS_BIND | flags | kept)


def _has_capability(number: int) -> bool:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> number & 1)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), flags, options.encode())


def _call(name: str, *args: object) -> None:
    function = getattr(libc, name, None)
    if function is None:
        raise OSError(0, f"no {name} in this libc")
    if function(*args):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
