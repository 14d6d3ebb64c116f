"""Attacks that a program may try after escaping its interpreter: real Python, run wherever a test puts it.

Each reads its targets from the dictionary `given` and stores its result in `loot`. The amounts are bounded, so that the
attacks can also run without a wall.
"""

from __future__ import annotations

FORKS, BLOCKS, BLOCK_MB, OUTPUT_MB = 150, 8, 100, 1000

BEGIN = """
import ctypes, os, select, signal, socket, time  # a confined worker has them already

libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(15, given["marker"].encode())  # the name by which the test finds this process, and what it forks


def first_read(paths):
    found = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                found.append(file.read(100_000).decode(errors="replace"))
        except OSError as error:
            found.append(str(error))
    return " ".join(found)


processes = ["self", 1, given["host_parent"], given["host_pid"], given["pid"]]
"""

READS = {  # they succeed if the secret is in the loot
    "another program": """
import subprocess
loot = subprocess.run(["cat", given["secret_file"]], capture_output=True, text=True).stdout
""",
    "program in memory": """
import subprocess
program = os.memfd_create("program")
with open("/bin/cat", "rb") as cat:
    os.write(program, cat.read())
cat = f"/proc/{os.getpid()}/fd/{program}"
loot = subprocess.run([cat, given["secret_file"]], capture_output=True, text=True).stdout
""",
    "environment of a thread": """
loot = first_read(f"/proc/{p}/task/{p}/environ" for p in processes if p != "self")
""",
    "hard link": """
link = given["own_folder"] + "/" + given["marker"]
os.link(given["secret_file"], link)
loot = first_read([link])
os.unlink(link)
""",
    "host file": 'loot = first_read([given["secret_file"]])',
    "environment variables": 'loot = str(dict(os.environ)) + first_read(f"/proc/{p}/environ" for p in processes)',
    "network": """
connection = socket.socket()
connection.connect(("127.0.0.1", given["port"]))
loot = connection.recv(100).decode()
""",
    "abstract socket": """
connection = socket.socket(socket.AF_UNIX)
connection.connect("\\0" + given["socket_name"])
loot = connection.recv(100).decode()
""",
    "symlink": """
loot = ""
for folder in (given["own_folder"], "/tmp", "/dev/shm", "/var/tmp", "."):
    link = folder + "/" + given["marker"]
    try:
        os.symlink(given["secret_file"], link)
        loot += first_read([link])
        os.unlink(link)
    except OSError as error:
        loot += str(error)
""",
    "root of another process": """
ways = ("root", "cwd/../../../../../../../..")
loot = first_read(f"/proc/{p}/{way}{given['secret_file']}" for p in processes for way in ways)
""",
    "memory file of another process": """
with open(f"/proc/{given['pid']}/mem", "rb", buffering=0) as memory:
    memory.seek(given["address"])
    loot = memory.read(64).decode(errors="replace")
""",
    "memory of another process": """
class Range(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("length", ctypes.c_size_t)]

taken = ctypes.create_string_buffer(64)
here, there = Range(ctypes.addressof(taken), 64), Range(given["address"], 64)
pointers = (ctypes.byref(here), ctypes.c_ulong(1), ctypes.byref(there), ctypes.c_ulong(1), ctypes.c_ulong(0))
libc.process_vm_readv(given["pid"], *pointers)
loot = taken.raw.decode(errors="replace")
""",
}

READS["expected answer in the memory of the parent"] = """
loot = ""
for process in (given["pid"], os.getppid()):
    try:
        with open(f"/proc/{process}/maps") as maps, open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
            for line in maps:
                if " rw-p " in line and not loot and "stack" not in line:
                    start, end = (int(number, 16) for number in line.split()[0].split("-"))
                    memory.seek(start)
                    found = memory.read(min(end - start, 1 << 28)).split(given["mark"].encode())
                    loot = " ".join((given["mark"].encode() + rest[:24]).decode(errors="replace") for rest in found[1:])
    except OSError as error:
        loot = loot or str(error)
"""

DEEDS = {
    "limit another process": """
two = (ctypes.c_ulong * 2)()
done = libc.prlimit64(given["pid"], 4, None, two) == 0 and libc.prlimit64(given["pid"], 4, two, None) == 0
loot = "done" if done else "refused"
""",
    "slow another process down": 'os.setpriority(os.PRIO_PROCESS, given["pid"], 19); loot = "done"',
    "take a file of another process": """
process = libc.syscall(434, given["pid"], 0)  # pidfd_open
loot = "done" if process >= 0 and libc.syscall(438, process, 0, 0) >= 0 else "refused"  # pidfd_getfd
""",
    "talk to another session": """
meeting = socket.create_server(("127.0.0.1", 0))
with socket.create_connection(meeting.getsockname()):
    loot = "done"
""",  # they succeed if they say "done"
    "kernel setting": """
with open("/proc/sys/vm/swappiness", "r+") as setting:
    same = setting.read()
    setting.seek(0)
    setting.write(same)
loot = "done"
""",
    "trace another process": 'loot = "done" if libc.ptrace(16, given["pid"], None, None) == 0 else "refused"',
    "rights in a new namespace": 'loot = "done" if libc.unshare(0x10000000) == 0 else "refused"',
    "fork bomb": f"""
for _ in range({FORKS}):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
loot = "done"
""",
    "memory bomb": f"""
blocks = [b"x" * ({BLOCK_MB} << 20) for _ in range({BLOCKS})]
loot = "done"
""",
    "memory bomb of many processes": f"""
reading, writing = os.pipe()
for _ in range({BLOCKS}):
    if os.fork() == 0:
        block = b"x" * ({BLOCK_MB} << 20)
        os.write(writing, b"1")
        time.sleep(60)
        os._exit(0)
full = 0
while full < {BLOCKS} and os.waitpid(-1, os.WNOHANG) == (0, 0):  # until one was killed
    if select.select([reading], [], [], 0.1)[0]:
        full += len(os.read(reading, 100))
loot = "done" if full == {BLOCKS} else "refused"
""",
    "1 GB of output": f"""
loot = "refused"
for descriptor in given["descriptors"]:
    try:
        for _ in range({OUTPUT_MB}):
            written = 0
            while written < 1 << 20:
                written += os.write(descriptor, b"x" * ((1 << 20) - written))
        loot = "done"
    except OSError:
        pass
os.write(descriptor, b"\\n")
""",
}

HONEST = 'loot = "done"'

ALL = {
    **READS,
    **DEEDS,
    # these succeed by what they leave behind
    "write outside": 'open(given["outside_file"], "w").write("here I was"); loot = "done"',
    "kill another process": 'os.kill(given["pid"], signal.SIGKILL); loot = "done"',
    "kill another process by a file's owner": """
import fcntl
reading, writing = os.pipe()
fcntl.fcntl(reading, fcntl.F_SETOWN, given["pid"])
fcntl.fcntl(reading, 10, signal.SIGKILL)  # F_SETSIG
fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
os.write(writing, b"x")
loot = "done"
""",
    "kill another process by its descriptor": """
process = libc.syscall(434, given["pid"], 0)  # pidfd_open
loot = "done" if process >= 0 and libc.syscall(424, process, 9, None, 0) == 0 else "refused"  # pidfd_send_signal
""",
    "kill another process by a queued signal": """
loot = "done" if libc.sigqueue(given["pid"], 9, None) == 0 else "refused"
""",
    "write outside by /proc": """
open("/proc/self/root" + given["outside_file"], "w").write("here I was")
loot = "done"
""",
    "write outside by a rename": """
own = given["own_folder"] + "/" + given["marker"]
open(own, "w").write("here I was")
os.rename(own, given["outside_file"])
loot = "done"
""",
    "endless loop": """
for number in (signal.SIGALRM, signal.SIGPROF, signal.SIGTERM, signal.SIGXCPU):
    signal.signal(number, signal.SIG_IGN)
signal.setitimer(signal.ITIMER_REAL, 0)
while True:
    pass
""",
    "orphan": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
libc.prctl(15, b"parent")
loot = "done"
""",
    "orphan of a raw call": """
told, tell = os.pipe()
child = libc.syscall(56 if os.uname().machine == "x86_64" else 220, signal.SIGCHLD, 0, 0, 0, 0)  # clone
if child == 0:
    os.setsid()
    os.write(tell, b"alone")
    time.sleep(60)
    os._exit(0)
os.close(tell)
os.read(told, 5)  # until the child is in a session of its own, or has ended
libc.prctl(15, b"parent")
loot = "done"
""",
}
