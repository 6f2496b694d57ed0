"""A seccomp filter for untrusted code: system calls that no program of a benchmark needs fail.

Run without the package (`zygote.py`): standard library only.

Namespaces and the lack of capabilities already stop most of these calls. The filter is there for
the parts of a kernel in which holes are found: other namespaces, eBPF, io_uring, keys, tracing; and
for System V's memory and messages, which outlive the program that a worker runs.
Source: seccomp(2), linux/filter.h, linux/audit.h.
"""

import ctypes
import errno
import platform
import struct

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ALLOW, FAIL = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
LOAD, JUMP, RETURN = 0x20, 0x05, 0x06
JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT = 0x15, 0x35, 0x45
Instruction = tuple[int, int, int, int]  # code, jump if so, jump if not, value
AT_NUMBER, AT_ARCH, AT_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
NEW_NAMESPACES = 0x7E020080  # CLONE_NEW*: time, mounts, cgroup, uts, ipc, user, pid, net
X32 = 0x40000000  # numbers of x86-64's second table of calls

# Numbers on x86-64 and on ARM64; None: no such call.
DENIED = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
FAMILIES = (1, 2, 10)  # unix, and the internet of an empty network namespace; not vsock, netlink
ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH


def is_supported() -> bool:
    """Whether the numbers of this machine's system calls are known."""
    return platform.machine() in ARCHES


def make_filter() -> bytes:
    """The filter as instructions of classic BPF."""
    column, arch = ARCHES[platform.machine()]
    fail = [FAIL | code for code in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT)]
    denied = [numbers[column] for numbers in DENIED.values()]
    actions = {number: [(RETURN, 0, 0, fail[0])] for number in denied if number is not None}
    # clone3 has its flags in memory, which a filter cannot read: libc falls back to clone.
    actions[CLONE3[column]] = [(RETURN, 0, 0, fail[1])]
    actions[CLONE[column]] = [
        (LOAD, 0, 0, AT_ARGUMENT),
        (JUMP_ANY_BIT, 0, 1, NEW_NAMESPACES),
        (RETURN, 0, 0, fail[0]),
        (RETURN, 0, 0, ALLOW),
    ]
    actions[SOCKET[column]] = [
        (LOAD, 0, 0, AT_ARGUMENT),
        *((JUMP_EQUAL, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)),
        (RETURN, 0, 0, fail[2]),
        (RETURN, 0, 0, ALLOW),
    ]
    program = [(LOAD, 0, 0, AT_ARCH), (JUMP_EQUAL, 1, 0, arch), (RETURN, 0, 0, fail[0])]
    program += [(LOAD, 0, 0, AT_NUMBER), (JUMP_AT_LEAST, 0, 1, X32), (RETURN, 0, 0, fail[1])]
    program += _search(sorted(actions), actions)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _search(numbers: list[int], actions: dict[int, list[Instruction]]) -> list[Instruction]:
    """Find a call's number by halves: the kernel runs the filter for each of its calls at once."""
    if len(numbers) == 1:
        action = actions[numbers[0]]
        return [(JUMP_EQUAL, 0, len(action), numbers[0]), *action, (RETURN, 0, 0, ALLOW)]
    middle = len(numbers) // 2
    below, above = (_search(half, actions) for half in (numbers[:middle], numbers[middle:]))
    return [(JUMP_AT_LEAST, 0, 1, numbers[middle]), (JUMP, 0, 0, len(below)), *below, *above]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(libc: ctypes.CDLL, program: bytes) -> None:
    """Filter the calls of this process and of all that it starts; `no_new_privs` must be set."""
    loaded = _Program(len(program) // 8, program)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(loaded), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp filter refused")
