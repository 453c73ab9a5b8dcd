"""A cluster for the tests of this folder, which `make test-slurm` runs; else they are skipped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megashear.console import signals_interrupt
from tests.slurm.cluster import MISSING, Cluster
from tests.support.chains import write_chain

SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
SITE = """\
[[ -d $NO_SUCH_SITE ]] && source "$NO_SUCH_SITE/settings"
PATH={bin}:$PATH
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
TRAIN=(--nodes=2 --ntasks-per-node=1)
LIGHT=(--nodes=1 --ntasks=1)
ALL=(--partition=low)
"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    why = "run by `make test-slurm`" if config.option.markexpr != "slurm" else ""
    why = why or (f"needs {', '.join(MISSING)}" if MISSING else "")
    why = why or ("needs root" if os.getuid() else "")
    for item in items:
        if item.get_closest_marker("slurm") and why:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    with signals_interrupt():  # of a time-out: the daemons are stopped all the same
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture(scope="session")
def folder(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, with a space in its name, of a chain that has run, in the jobs of `jobs`."""
    folder = tmp_path_factory.mktemp("work") / "a chain"
    chain = write_chain(folder)
    chain.write_text(chain.read_text().replace("processes: 1\n", ""))
    (folder / "cluster.env").write_text(SITE.format(bin=Path(sys.executable).parent))
    return folder


@pytest.fixture(scope="session")
def jobs(cluster: Cluster, folder: Path) -> dict[str, str]:
    """The chain's jobs by their stages, all of which have ended."""
    said = cluster.run(SCRIPTS / "submit.sh", "chain.yaml", cwd=folder)
    jobs = dict(line.split() for line in said.splitlines())
    cluster.wait(lambda: not cluster.run("squeue", "-h"), 300)
    return jobs
