"""Confinement: a process gives up, for good, every right but computing before it runs a model's program.

A seccomp filter leaves memory, clocks, and reading and writing what is open already. No file or socket opens, no
process or thread starts, none is signalled or inspected, no namespace, module, key, ring or counter is made: each
such call fails with EPERM. Limits on memory and file size come with it, and root becomes nobody.

Whole Python programs keep two things more: threads and, where bubblewrap hides all that is worth reading, files that
are opened for reading, so that they can import.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import sys
from dataclasses import dataclass

MEMORY_LIMIT_BYTES = 512 * 1024 * 1024  # of address space; the interpreter itself has about 80 MB
NOBODY = 65534
libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38  # linux/prctl.h
SECCOMP_MODE_FILTER = 2  # linux/seccomp.h
ALLOW, REFUSE, KILL_PROCESS = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000  # SECCOMP_RET_...
UNKNOWN = 0x00050000 | errno.ENOSYS
LOAD_WORD, JUMP_IF_EQUAL, JUMP_IF_ANY_SET, RETURN = 0x20, 0x15, 0x45, 0x06  # linux/bpf_common.h
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

# All system calls that a worker may make: name, number on x86_64, number on aarch64.
COMPUTING = (
    ("read", 0, 63),
    ("write", 1, 64),
    ("close", 3, 57),
    ("fstat", 5, 80),
    ("lseek", 8, 62),
    ("mmap", 9, 222),
    ("mprotect", 10, 226),
    ("munmap", 11, 215),
    ("brk", 12, 214),
    ("mremap", 25, 216),
    ("madvise", 28, 233),
    ("rt_sigaction", 13, 134),
    ("rt_sigprocmask", 14, 135),
    ("rt_sigreturn", 15, 139),
    ("sigaltstack", 131, 132),
    ("restart_syscall", 219, 128),
    ("futex", 202, 98),
    ("sched_yield", 24, 124),
    ("nanosleep", 35, 101),
    ("clock_nanosleep", 230, 115),
    ("clock_gettime", 228, 113),
    ("clock_getres", 229, 114),
    ("gettimeofday", 96, 169),
    ("setitimer", 38, 103),
    ("getitimer", 36, 102),
    ("times", 100, 153),
    ("getrusage", 98, 165),
    ("getrandom", 318, 278),
    ("getpid", 39, 172),
    ("exit", 60, 93),
    ("exit_group", 231, 94),
)
THREADS = (
    ("gettid", 186, 178),
    ("set_robust_list", 273, 99),
    ("rseq", 334, 293),
    ("sched_getaffinity", 204, 123),
)
READING = (
    ("stat", 4, None),
    ("newfstatat", 262, 79),
    ("statx", 332, 291),
    ("access", 21, None),
    ("faccessat", 269, 48),
    ("faccessat2", 439, 439),
    ("getdents64", 217, 61),
    ("pread64", 17, 67),
    ("readlink", 89, None),
    ("readlinkat", 267, 78),
    ("getcwd", 79, 17),
    ("uname", 63, 160),
)
CLONE, CLONE3, OPENAT = (56, 220), (435, 435), (257, 56)
CLONE_THREAD = 0x10000  # linux/sched.h
FIRST_ARGUMENT, THIRD_ARGUMENT = 16, 32  # bytes of struct seccomp_data; the low half comes first on both machines


@dataclass(frozen=True, slots=True)
class Rights:
    """The rights that a process keeps."""

    memory_bytes: int = MEMORY_LIMIT_BYTES  # of address space
    file_bytes: int = 0  # that it may write to one file
    cpu_s: int | None = None
    threads: bool = False
    reading: bool = False  # may it open existing files for reading


def confine(rights: Rights = Rights()) -> None:
    """Give up every other right, for good. Without a system call filter (`can_filter`) only the limits apply."""
    become_nobody()
    die_with_parent()
    limits = {
        resource.RLIMIT_AS: rights.memory_bytes,
        resource.RLIMIT_FSIZE: rights.file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64 if rights.reading else 0,  # open descriptors stay open
    }
    if rights.cpu_s is not None:
        limits[resource.RLIMIT_CPU] = rights.cpu_s
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    if can_filter():
        forbid_all_but(rights)


def become_nobody() -> None:
    """Change the user from root to nobody; a process of another user keeps its user.

    An OSError is ignored: it means that a container has dropped root's rights already.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)


def die_with_parent() -> None:
    """Make Linux kill this process when its parent ends, however it ends.

    Call it after a change of user, which clears the setting.
    """
    if sys.platform == "linux":
        parent = os.getppid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def can_filter() -> bool:
    """Return whether this kernel accepts system call filters and AUDIT_ARCH has this machine's call numbers."""
    if sys.platform != "linux" or MACHINE not in AUDIT_ARCH:
        return False
    _prctl(
        PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None
    )  # no program is given: EFAULT if filters are supported, else EINVAL
    return ctypes.get_errno() == errno.EFAULT


def forbid_all_but(rights: Rights) -> None:
    """Install the filter: every other system call fails with EPERM, in all threads; a foreign ABI's call kills."""
    program = filter_program(rights, MACHINE)
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, None), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)):
        if _prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({arguments[0]}) failed: {os.strerror(ctypes.get_errno())}")


def filter_program(rights: Rights, machine: str) -> bytes:
    """Return the filter as classic BPF over struct seccomp_data: byte 0 holds the call's number, byte 4 the ABI."""
    column = 0 if machine == "x86_64" else 1
    calls = (*COMPUTING, *(THREADS if rights.threads else ()), *(READING if rights.reading else ()))
    instructions = [
        (LOAD_WORD, 0, 0, 4),
        (JUMP_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD_WORD, 0, 0, 0),
    ]
    for _, x86_64, aarch64 in calls:
        number = x86_64 if machine == "x86_64" else aarch64
        if number is not None:
            instructions += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    if (
        rights.threads
    ):  # threads only, no processes. clone3 hides its flags in memory: ENOSYS makes the C library use clone
        instructions += [(JUMP_IF_EQUAL, 0, 1, CLONE3[column]), (RETURN, 0, 0, UNKNOWN)]
        instructions += [
            (JUMP_IF_EQUAL, 0, 4, CLONE[column]),
            (LOAD_WORD, 0, 0, FIRST_ARGUMENT),
            (JUMP_IF_ANY_SET, 0, 1, CLONE_THREAD),
            (RETURN, 0, 0, ALLOW),
            (RETURN, 0, 0, REFUSE),
        ]
    if rights.reading:  # O_RDONLY is 0
        writing = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
        instructions += [
            (JUMP_IF_EQUAL, 0, 3, OPENAT[column]),
            (LOAD_WORD, 0, 0, THIRD_ARGUMENT),
            (JUMP_IF_ANY_SET, 1, 0, writing),
            (RETURN, 0, 0, ALLOW),
        ]
    instructions.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def _prctl(option: int, value: int, pointer: bytes | None) -> int:
    return int(libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)))


MACHINE = os.uname().machine
