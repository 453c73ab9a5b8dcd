"""What this machine has for a run: directory, locks, memory, limits."""

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
    """The result of one check.

    Attributes:
        mark: OK, WARNING or PROBLEM.
        item: what was checked.
        text: what was found.
        remedy: what to do; empty if there is nothing to do.
    """

    mark: str
    item: str
    text: str
    remedy: str = ""


def judged(item: str, text: str, *faults: tuple[bool, str, str]) -> Finding:
    """Return a finding with the first fault (condition, mark, remedy) that holds; else it is OK."""
    mark, remedy = next((fault[1:] for fault in faults if fault[0]), (OK, ""))
    return Finding(mark, item, text, remedy)


def probe(code: str, *arguments: str, seconds: float = PROBE_SECONDS) -> tuple[bool, str]:
    """Run Python code in a new process, which may crash: (success, output or last error)."""
    status, output = run(sys.executable, "-c", code, *arguments, seconds=seconds)
    return status == 0, output if status == 0 else output.splitlines()[-1][:300]


def run(*command: str, seconds: float = 20) -> tuple[int, str]:
    """Run a program and return its exit status and output; if it fails, its errors, never empty.

    The status is 127 if it is missing, cannot be started or does not end.
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
    output = done.stderr.strip() or done.stdout.strip()
    return done.returncode, output or f"exit status {done.returncode}, no output"


def host() -> str:
    """Return this machine's name."""
    return socket.gethostname()


def directory(path: Path) -> Iterator[Finding]:
    """Check space and kind of file system, and that files can be written and locked."""
    path = path.resolve()
    while not path.exists():  # a run will make it
        path = path.parent
    kind, free = file_system(path), shutil.disk_usage(path).free
    lost = "its files are lost when the machine stops. Give another run_dir"
    small = "a checkpoint of a 7B model takes 94 GB: `megashear plan` shows the size of yours"
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
        remedy = "give a directory that you can write to, with space left in your quota"
        yield Finding(PROBLEM, "directory", f"{path} cannot be written: {error.strerror}", remedy)


def file_system(path: Path) -> str:
    """Return the kind of file system of a path, by /proc/mounts; `unknown` without that file."""
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
    """Check that a lock of this process keeps another process from taking it."""
    import fcntl

    remedy = "two jobs could run in one run directory. Give another (local disk, NFS with locks)"
    with file.open("a+") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding(PROBLEM, "file locks", f"do not work: {error.strerror}", remedy)
        status, _ = run(sys.executable, "-c", LOCK, str(file))
    if status != 9:
        return Finding(PROBLEM, "file locks", "a second process gets the same lock", remedy)
    network = kind.startswith(NETWORK)
    where = " between processes here; not tried between machines" if network else ""
    return Finding(OK, "file locks", f"work{where}")


def shared_memory() -> Finding:
    """Check /dev/shm, which NCCL uses within a machine."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding(WARNING, "shared memory", "/dev/shm is missing", "mount a tmpfs there")
    size = shutil.disk_usage(path)
    text = f"/dev/shm: {size.free / GIB:.1f} of {size.total / GIB:.1f} GiB free"
    remedy = "NCCL may fail. In a container: --shm-size=8g or --ipc=host"
    return judged("shared memory", text, (size.free < MIN_SHM, WARNING, remedy))


def cores() -> Finding:
    """Check the cores that this process may use."""
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
    """Report the memory of this machine, and the limit of this process's control groups."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    limit = memory_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    limited = f", limited to {limit / GIB:.1f} GiB" if limit < total else ""
    return Finding(OK, "memory", f"{total / GIB:.0f} GiB, {free / GIB:.0f} GiB unused{limited}")


def memory_limit(groups: Path, mounted: Path) -> float:
    """Return the bytes that a control group and its parents allow (versions 1 and 2).

    Args:
        groups: the process's list: `4:memory:/job_7` in version 1, `0::/job_7` in version 2.
        mounted: where groups are mounted; in a container often its own group alone, as the root.
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
    """Check the limits of open files and, where there is InfiniBand, of locked memory."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = locked == resource.RLIM_INFINITY
    shown = "unlimited" if free else f"{locked / 2**20:.0f} MiB"
    pinned = "NCCL cannot use InfiniBand. ulimit -l unlimited; in Slurm: PropagateResourceLimits"
    return judged(
        "limits",
        f"open files {files:,}, locked memory {shown}",
        (not free and Path("/sys/class/infiniband").is_dir(), PROBLEM, pinned),
        (files < MIN_FILES, WARNING, f"ulimit -n {MIN_FILES} for many loader workers"),
    )
