"""What a process gives up before it runs a model's program, and cannot get back: all but computing.

A seccomp filter leaves memory, clocks, and reading and writing what is open already. No file or socket opens, no
process or thread starts, none is signalled or inspected, no namespace, module, key, ring or counter is made: each
such call fails with EPERM. Limits on memory and file size come with it, and root becomes nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import struct
import sys

from integrations.openenv.servers.nursery import die_with_parent, libc

MEMORY_LIMIT_BYTES = 512 * 1024 * 1024  # of address space; the interpreter itself has about 80 MB
NOBODY = 65534

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2  # linux/prctl.h, linux/seccomp.h
ALLOW, REFUSE, KILL_PROCESS = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000  # SECCOMP_RET_...
LOAD_WORD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

# The whole list of what a worker may ask the kernel for: name, number on x86_64, number on aarch64.
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


def confine(memory_bytes: int = MEMORY_LIMIT_BYTES) -> None:
    """Give it all up. Where the kernel has no filter for us (`can_filter`) the limits alone remain."""
    os.dup2(1, 2)  # a nursery's stdout is /dev/null
    become_nobody()
    die_with_parent()
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),  # what is open stays open; nothing more opens
    ):
        resource.setrlimit(limit, (value, value))
    if can_filter():
        forbid_all_but_computing()


def become_nobody() -> None:
    """Whoever was root has no rights any more; another user stays who it is.

    A root that may not do this has lost its rights already, in a container that dropped them.
    """
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)


def can_filter() -> bool:
    """Whether this kernel takes system call filters, and we know the machine's numbers."""
    if sys.platform != "linux" or MACHINE not in AUDIT_ARCH:
        return False
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None)  # no program: EFAULT where one would be taken, else EINVAL
    return ctypes.get_errno() == errno.EFAULT


def forbid_all_but_computing() -> None:
    """Every other system call fails with EPERM, from now on, here and in children; one of a foreign ABI kills."""
    code = ctypes.create_string_buffer(FILTER, len(FILTER))
    header = struct.pack("HxxxxxxP", len(FILTER) // 8, ctypes.addressof(code))  # struct sock_fprog
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, None), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header)):
        if _prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({arguments[0]}) failed: {os.strerror(ctypes.get_errno())}")


def filter_program(architecture: int, numbers: list[int]) -> bytes:
    """Classic BPF over struct seccomp_data: the call's number is at byte 0, the architecture at byte 4."""
    instructions = [
        (LOAD_WORD, 0, 0, 4),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD_WORD, 0, 0, 0),
    ]
    for number in numbers:
        instructions += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    instructions.append((RETURN, 0, 0, REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)


def _prctl(option: int, value: int, pointer: bytes | None) -> int:
    return int(libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)))


MACHINE = os.uname().machine
FILTER = filter_program(
    AUDIT_ARCH.get(MACHINE, 0), [x86_64 if MACHINE == "x86_64" else aarch64 for _, x86_64, aarch64 in COMPUTING]
)
