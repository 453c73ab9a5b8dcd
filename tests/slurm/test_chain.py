"""The chain as jobs: submitted once, it makes a small model of a large one, on two nodes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SCRIPTS

pytestmark = pytest.mark.slurm
STAGES = ["tokenize", "convert", "prune", "extract", "continue", "export", "evaluate"]


def test_the_chain_makes_a_small_model(
    cluster: Cluster, folder: Path, jobs: dict[str, str]
) -> None:
    assert list(jobs) == STAGES
    logs = {name: (folder / "logs" / f"{name}-{job}.log").read_text() for name, job in jobs.items()}
    states = {name: cluster.job(job)["JobState"] for name, job in jobs.items()}
    assert states == dict.fromkeys(STAGES, "COMPLETED"), logs
    small = AutoModelForCausalLM.from_pretrained(folder / "models" / "sheared")
    assert (small.config.num_hidden_layers, small.config.hidden_size) == (2, 24)
    for run in ("prune", "continue"):
        records = (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
        start = json.loads(records[0])
        assert start["job"] == jobs[run]
        assert start["layout"]["data"] == 2  # one process on each of the two nodes
    assert set(json.loads((folder / "runs/continue/losses.json").read_text())) != set()
    assert (folder / "runs/continue/report.html").is_file()


def test_what_comes_after_a_stage_that_failed_does_not_start(
    cluster: Cluster, folder: Path, jobs: dict[str, str]
) -> None:
    broken = (folder / "chain.yaml").read_text().replace("prune.yaml", "broken.yaml")
    (folder / "broken_chain.yaml").write_text(broken.replace("models/sheared", "models/none"))
    config = (folder / "prune.yaml").read_text()
    (folder / "broken.yaml").write_text(config.replace("steps: 6", "steps: 5"))  # of a run with 6
    command = (SCRIPTS / "submit.sh", "broken_chain.yaml", "cluster.env", "prune", "extract")
    said = cluster.run(*command, cwd=folder)
    prune, extract = (line.split()[1] for line in said.splitlines())
    cluster.wait(lambda: not cluster.run("squeue", "-h"), 60)
    assert cluster.job(prune)["JobState"] == "FAILED"
    assert cluster.job(prune)["ExitCode"] == "2:0"
    assert cluster.job(extract)["JobState"] == "CANCELLED"
    log = (folder / "logs" / f"prune-{prune}.log").read_text()
    assert log.count("holds a run of another configuration") == 2  # once on each node
    assert not (folder / "logs" / f"extract-{extract}.log").exists()


def test_a_wrong_chain_is_refused_before_anything_is_submitted(
    cluster: Cluster, folder: Path, jobs: dict[str, str]
) -> None:
    wrong = (folder / "chain.yaml").read_text().replace("models/source", "models/sorce")
    (folder / "wrong.yaml").write_text(wrong)
    done = subprocess.run(
        [SCRIPTS / "submit.sh", "wrong.yaml"],
        cwd=folder,
        env={**cluster.environment, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "sorce" in done.stderr
    assert done.stdout == ""
