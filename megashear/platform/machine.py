"""What a machine has for a run: directory, locks, memory, limits. Never imports torch.

Every check is a function that gives Findings; `megashear doctor` prints them.
"""

from __future__ import annotations

import math
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
MIN_DISK, MIN_SHM, MIN_FILES = 50 * GIB, GIB, 4096
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


def judged(item: str, text: str, *faults: tuple[bool, str, str]) -> Finding:
    """A finding that is well unless one of the faults (is it there, mark, remedy) is; the first."""
    there = ((mark, remedy) for is_there, mark, remedy in faults if is_there)
    mark, remedy = next(there, (OK, ""))
    return Finding(mark, item, text, remedy)


def probe(code: str, *arguments: str, seconds: float = PROBE_SECONDS) -> tuple[bool, str]:
    """Run Python code in a process of its own, which may crash or hang: (ended well, what it said).

    Of what failed it is the last line.
    """
    status, said = run(sys.executable, "-c", code, *arguments, seconds=seconds)
    return status == 0, said if status == 0 else said.splitlines()[-1][:300]


def run(*command: str, seconds: float = 20) -> tuple[int, str]:
    """A program's exit status and what it said: of what failed, its errors; never nothing then.

    Status 127 where it is not there, or cannot be started, or does not end.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except OSError as error:
        return 127, error.strerror or str(error)
    except subprocess.TimeoutExpired:
        return 127, f"no answer within {seconds:.0f} s"
    if done.returncode == 0:
        return 0, done.stdout.strip()
    if done.returncode < 0:
        return done.returncode, f"killed by signal {-done.returncode}"
    said = done.stderr.strip() or done.stdout.strip()
    return done.returncode, said or f"ends with status {done.returncode} and says nothing"


def host() -> str:
    """This machine's name."""
    return socket.gethostname()


def directory(path: Path) -> Iterator[Finding]:
    """Space, kind of file system, and whether files can be written and locked."""
    path = path.resolve()
    while not path.exists():  # a run directory that a run will make
        path = path.parent
    kind, free = file_system(path), shutil.disk_usage(path).free
    lost = "what lies there is lost when the machine ends. Give another run_dir"
    small = "checkpoints of a 7B model take 94 GB each: `megashear plan` says what yours take"
    yield judged(
        "directory",
        f"{path}: {free / GIB:,.0f} GiB free, {kind}",
        (kind in ("tmpfs", "ramfs"), WARNING, lost),
        (free < MIN_DISK, WARNING, small),
    )
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

    remedy = "two jobs could run in one run directory. Give another (local, NFS with locks)"
    with file.open("a+") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding(PROBLEM, "file locks", f"do not work: {error.strerror}", remedy)
        status, _ = run(sys.executable, "-c", LOCK, str(file))
    if status != 9:
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
    remedy = "NCCL may fail. In a container: --shm-size=8g or --ipc=host"
    return judged("shared memory", text, (size.free < MIN_SHM, WARNING, remedy))


def cores() -> Finding:
    """Cores that this process may use."""
    mine, all_cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    too_many = threads.isdecimal() and int(threads) > mine
    return judged(
        "cores",
        f"{mine} of {all_cores}, OMP_NUM_THREADS {threads or 'not set'}",
        (too_many, WARNING, f"set OMP_NUM_THREADS to {mine} or less"),
        (mine == 1 < all_cores, WARNING, "under Slurm: --cpus-per-task, for loader workers"),
    )


def memory() -> Finding:
    """Of this machine, and of the control groups that the process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    limit = memory_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    limited = f", limited to {limit / GIB:.1f} GiB" if limit < total else ""
    return Finding(OK, "memory", f"{total / GIB:.0f} GiB, {free / GIB:.0f} GiB unused{limited}")


def memory_limit(groups: Path, mounted: Path) -> float:
    """Bytes that a process's control group and those above it allow (versions 1 and 2).

    Args:
        groups: the process's own list: `4:memory:/job_7` is of version 1, `0::/job_7` of 2.
        mounted: where groups are; in a container often its own alone, then as the root.
    """
    limits = [math.inf]
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root, name = (
            (mounted / "memory", "memory.limit_in_bytes") if kinds else (mounted, "memory.max")
        )
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root) and (group / name).is_file():
                text = (group / name).read_text().strip()
                limits += [float(text)] if text.isdecimal() else []
    return min(limits)


def limits() -> Finding:
    """Of open files; and of locked memory, where there is InfiniBand."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = locked == resource.RLIM_INFINITY
    shown = "unlimited" if free else f"{locked / 2**20:.0f} MiB"
    pinned = "NCCL cannot use InfiniBand. ulimit -l unlimited; of Slurm: PropagateResourceLimits"
    return judged(
        "limits",
        f"open files {files:,}, locked memory {shown}",
        (not free and Path("/sys/class/infiniband").is_dir(), PROBLEM, pinned),
        (files < MIN_FILES, WARNING, f"ulimit -n {MIN_FILES} for many loader workers"),
    )
