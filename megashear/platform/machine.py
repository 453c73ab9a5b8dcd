"""What a machine has for a run: directory, locks, memory, limits. Never imports torch.

Every check is a function that gives Findings; `megashear doctor` prints them.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OK, WARNING, PROBLEM = "ok", "warning", "PROBLEM"
GIB = 2**30
LEAST_DISK, LEAST_SHM, LEAST_FILES = 50 * GIB, GIB, 4096
PROBE_SECONDS = 120

NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.", "wekafs")
LOCK = """
import fcntl, sys
with open(sys.argv[1], "a+") as stream:
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(9)
"""


@dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Attributes:
        mark: OK, WARNING or PROBLEM.
        item: what was looked at.
        text: how it is.
        remedy: what to do; empty where nothing is to be done.
    """

    mark: str
    item: str
    text: str
    remedy: str = ""


def probe(code: str, *arguments: str, seconds: float = PROBE_SECONDS) -> tuple[bool, str]:
    """Run Python code in a process of its own, which may crash or hang: (ended well, what it said).

    Of what failed it is the last line.
    """
    command = [sys.executable, "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    if done.returncode == 0:
        return True, done.stdout.strip()
    lines = done.stderr.strip().splitlines()
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
    return False, lines[-1][:300] if lines and done.returncode > 0 else how


def run(*command: str, seconds: float = 20) -> tuple[int, str]:
    """A program's exit status and output; status 127 where it is not there or does not end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except FileNotFoundError:
        return 127, "not found"
    except subprocess.TimeoutExpired:
        return 127, f"no answer within {seconds:.0f} s"
    return done.returncode, (done.stdout or done.stderr).strip()


def host() -> str:
    """This machine's name."""
    return socket.gethostname()


def directory(path: Path) -> Iterator[Finding]:
    """Space, kind of file system, and whether files can be written and locked."""
    path = path.resolve()
    while not path.exists():  # a run directory that a run will make
        path = path.parent
    kind, free = file_system(path), shutil.disk_usage(path).free
    text = f"{path}: {free / GIB:,.0f} GiB free, {kind}"
    if kind in ("tmpfs", "ramfs"):
        remedy = "what lies there is lost when the machine ends. Give another run_dir"
        yield Finding(WARNING, "directory", text, remedy)
    elif free < LEAST_DISK:
        remedy = "checkpoints of a 7B model take 94 GB each: `megashear plan` says what yours take"
        yield Finding(WARNING, "directory", text, remedy)
    else:
        yield Finding(OK, "directory", text)
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".doctor-") as stream:
            stream.write(b"x")
            os.fsync(stream.fileno())
            yield locks(Path(stream.name), kind)
    except OSError as error:
        remedy = "give a directory that you may write to, with room in your quota"
        yield Finding(PROBLEM, "directory", f"{path} cannot be written: {error.strerror}", remedy)


def file_system(path: Path) -> str:
    """The kind of file system that a path is on, of /proc/mounts; `unknown` without that."""
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return "unknown"
    best = ("", "unknown")
    for mount in mounts:
        _, where, kind, *_ = mount.split()
        if path == Path(where) or Path(where) in path.parents:
            best = max(best, (where, kind), key=lambda each: len(each[0]))
    return best[1]


def locks(file: Path, kind: str) -> Finding:
    """Whether a lock of this process keeps another from taking it."""
    import fcntl

    with file.open("a+") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            remedy = "two jobs could run in one run directory. Mount it with locks, or give another"
            return Finding(PROBLEM, "file locks", f"do not work: {error.strerror}", remedy)
        status, _ = run(sys.executable, "-c", LOCK, str(file))
    if status != 9:
        remedy = "two jobs could run in one run directory. Give another (local, NFS with locks)"
        return Finding(PROBLEM, "file locks", "a second process gets the same lock", remedy)
    network = kind.startswith(NETWORK)
    where = "between processes of this machine; between machines not tried" if network else "here"
    return Finding(OK, "file locks", f"work {where}")


def shared_memory() -> Finding:
    """Of /dev/shm, by which NCCL talks within a machine."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(WARNING, "shared memory", "/dev/shm is not there", "mount a tmpfs there")
    size = shutil.disk_usage(path)
    text = f"/dev/shm: {size.free / GIB:.1f} of {size.total / GIB:.1f} GiB free"
    if size.free < LEAST_SHM:
        remedy = "NCCL may fail. In a container: --shm-size=8g or --ipc=host"
        return Finding(WARNING, "shared memory", text, remedy)
    return Finding(OK, "shared memory", text)


def cores() -> Finding:
    """Cores that this process may use."""
    mine, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    text = f"{mine} of {all_cores}, OMP_NUM_THREADS {threads or 'not set'}"
    if threads and threads.isdecimal() and int(threads) > mine:
        return Finding(WARNING, "cores", text, f"set OMP_NUM_THREADS to {mine} or less")
    if mine == 1 < all_cores:
        return Finding(WARNING, "cores", text, "under Slurm: --cpus-per-task, for loader workers")
    return Finding(OK, "cores", text)


def memory() -> Finding:
    """Of this machine, and of the control group that the process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    text = f"{total / GIB:.0f} GiB, {free / GIB:.0f} GiB unused"
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = Path("/sys/fs/cgroup", name)
        limit = file.read_text().strip() if file.is_file() else "max"
        if limit.isdecimal() and int(limit) < total:
            text += f", limited to {int(limit) / GIB:.0f} GiB"
    return Finding(OK, "memory", text)


def limits() -> Finding:
    """Of open files; and of locked memory, where there is InfiniBand."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shown = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked / 2**20:.0f} MiB"
    text = f"open files {files:,}, locked memory {shown}"
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        remedy = (
            "NCCL cannot use InfiniBand. ulimit -l unlimited; of Slurm: PropagateResourceLimits"
        )
        return Finding(PROBLEM, "limits", text, remedy)
    if files < LEAST_FILES:
        return Finding(WARNING, "limits", text, f"ulimit -n {LEAST_FILES} for many loader workers")
    return Finding(OK, "limits", text)
