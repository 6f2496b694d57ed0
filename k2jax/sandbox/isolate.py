"""Namespaces, a file system of its own, a user without rights: what a process cannot undo.

What all programs share, a root that nobody can write to, is made once (`make_root`); what workers
must not share, for each of them (`leave_processes`, `enter`); what programs must not, for each of
those (`renew`, `become_nobody`).

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
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 24, 36, 38
CAP_SYS_ADMIN = 21
FIRST_UID, UIDS = 1_900_000_000, 1 << 20  # a range that nobody has
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32", "/etc/alternatives")
FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("null", "zero", "full", "random", "urandom")
NEW_ROOT = "/tmp"  # only a place to mount on, in a mount namespace of its own
libc = ctypes.CDLL(None, use_errno=True)
FILTER = seccomp.make_filter()
CAPABILITIES_OF_THIS = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
NO_CAPABILITIES = bytes(24)


def make_root(read_only: list[str]) -> None:
    """Make this process's root a small one: the system and `read_only`.

    Root needs no user namespace: its programs become users that nobody is. Others are root in one
    of their own, and an ordinary user in each program.

    Args:
        read_only: folders or files that can be read at their own paths.
    """
    user, group = os.getuid(), os.getgid()
    if not _has_capability(CAP_SYS_ADMIN):
        _call("unshare", CLONE_NEWUSER)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"1000 {user} 1")
        _write("/proc/self/gid_map", f"1000 {group} 1")
    _call("unshare", CLONE_NEWNS | CLONE_NEWUTS)
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    # Every source is opened first: mounting the new root may cover it.
    sources = {path: os.open(path, os.O_PATH) for path in _list_sources(read_only)}
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    _mount("tmpfs", NEW_ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, source in sources.items():
        _bind(f"/proc/self/fd/{source}", path)
        os.close(source)
    for path, target in links.items():
        if not os.path.lexists(NEW_ROOT + path):
            os.symlink(target, NEW_ROOT + path)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{NEW_ROOT}/dev/{name}")
    os.symlink("/tmp", f"{NEW_ROOT}/dev/shm")
    _write(f"{NEW_ROOT}/etc/passwd", "nobody:x:1000:1000:nobody:/tmp:/bin/sh\n")
    for name in ("tmp", "proc"):
        os.mkdir(f"{NEW_ROOT}/{name}")
    _mount("/proc", f"{NEW_ROOT}/proc", "", MS_BIND | MS_REC)  # covered in each program's view
    os.chdir(NEW_ROOT)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    for capability in range(64):  # what nothing that is started from here can get back
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    _mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def adopt_orphans() -> None:
    """Become the parent of what processes under this one leave behind."""
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def leave_processes() -> None:
    """Let the processes that this one starts be in a process namespace of their own."""
    _call("unshare", CLONE_NEWPID)


def enter() -> None:
    """Give this process, number 1 of its namespace, mounts, /proc, network and IPC of its own."""
    _call("unshare", CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "size=4k")
    # Processes only: nothing of the machine, no /proc/sys. It covers the machine's own, which has
    # to be there for users who are not root: they may mount no more than they can see.
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid")


def renew(disk: int, is_new: bool) -> None:
    """Give the next program an empty /tmp, in which this process then is.

    Args:
        disk: bytes of everything that can be written.
        is_new: False: the last program had as many; what is empty but for its source can stay.
    """
    os.chdir("/tmp")
    if not is_new and _is_emptied():
        return
    os.chdir("/")
    _call("umount2", b"/tmp", MNT_DETACH)
    _mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes=8192,mode=1777")
    os.chdir("/tmp")


def _is_emptied() -> bool:
    for name in ("main.py", "stdin"):
        if os.path.lexists(name) and not os.path.isdir(name):
            os.unlink(name)
    return not os.listdir(".")


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
    os.setresuid(user, user, user)
    _call("capset", CAPABILITIES_OF_THIS, NO_CAPABILITIES)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)  # its own /proc/self/fd, and with it /dev/stdin


def deny_system_calls() -> None:
    """Install the filter of system calls; `become_nobody` comes before."""
    seccomp.install(libc, FILTER)


def hide_memory() -> None:
    """Keep processes of the same user from reading this one's memory."""
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)


def set_limits(limits: dict) -> None:
    """Set the limits of a process: CPU seconds, memory, processes, files, no core dumps."""
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, limits["cpu"], limits["cpu"] + 1),  # SIGXCPU, then SIGKILL
        # Not the address space: V8 reserves much of it.
        (resource.RLIMIT_DATA, limits["memory"], limits["memory"]),
        (resource.RLIMIT_NPROC, limits["processes"], limits["processes"]),
        (resource.RLIMIT_FSIZE, limits["disk"], limits["disk"]),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        most = resource.getrlimit(kind)[1]
        top = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(kind, (min(soft, top), top))


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


def _write(path: str, text: str) -> None:
    with open(path, "w") as out:
        out.write(text)


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
