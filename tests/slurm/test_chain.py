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
    ended = {name: cluster.job(job) for name, job in jobs.items()}
    assert {name: job["JobState"] for name, job in ended.items()} == dict.fromkeys(
        STAGES, "COMPLETED"
    ), logs
    nodes = {name: job["NumNodes"] for name, job in ended.items()}
    assert nodes == {**dict.fromkeys(STAGES, "1"), "prune": "2", "continue": "2"}
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
    other = (folder / "prune.yaml").read_text().replace("runs/prune", "runs/missing")
    (folder / "missing.yaml").write_text(other)
    after = (folder / "continue.yaml").read_text().replace("runs/prune", "runs/missing")
    (folder / "after_missing.yaml").write_text(after)
    chain = (folder / "chain.yaml").read_text().replace("prune.yaml", "missing.yaml")
    (folder / "missing_chain.yaml").write_text(chain.replace("continue.y", "after_missing.y"))
    command = (SCRIPTS / "submit.sh", "missing_chain.yaml", "continue", "extract")
    said = cluster.run(*command, cwd=folder)
    extract, go_on = (line.split()[1] for line in said.splitlines())
    cluster.wait(lambda: not cluster.run("squeue", "-h"), 60)
    assert (cluster.state(extract), cluster.job(extract)["ExitCode"]) == ("FAILED", "2:0")
    assert "runs/missing" in (folder / "logs" / f"extract-{extract}.log").read_text()
    assert cluster.state(go_on) == "CANCELLED"
    assert not (folder / "logs" / f"continue-{go_on}.log").exists()


def test_a_wrong_chain_is_refused_before_anything_is_submitted(
    cluster: Cluster, folder: Path, jobs: dict[str, str]
) -> None:
    wrong = (folder / "chain.yaml").read_text().replace("models/source", "models/missing")
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
    assert "missing" in done.stderr
    assert done.stdout == ""
