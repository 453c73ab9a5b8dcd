"""What a run leaves: records as the schema says, in TensorBoard and W&B too, and masks.json."""

from __future__ import annotations

import json
import math
import socket
import types
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megashear import records as schema
from megashear.config import validate
from megashear.config.schema import LogConfig, ParallelConfig, PruningConfig, RunConfig
from megashear.platform import parallel
from megashear.training.trainer import Trainer
from tests.support.config_rules import only
from tests.support.distributed import run_distributed
from tests.support.runs import GQA, MHA, TARGETS, records, run_config, write_domains, write_source
from tests.training.test_resume import prune_run, train

KINDS = {
    "start": schema.StartRecord,
    "step": schema.StepRecord,
    "evaluation": schema.EvaluationRecord,
    "save": schema.SaveRecord,
    "end": schema.EndRecord,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a run that died after its fifth step and went on from its third; views show it."""
    directory = tmp_path_factory.mktemp("logged")
    run_distributed(write_source, 1, directory, GQA)
    log = LogConfig(tensorboard=True, wandb="offline", wandb_project="test")
    pruning = PruningConfig(sparsity_warmup_steps=3, multipliers="per_layer")
    config = prune_run(directory, log=log, pruning=pruning)
    run_distributed(train, 2, config, 5)
    run_distributed(train, 2, config, None)
    return config


def written(config: RunConfig) -> list[dict[str, Any]]:
    """Every record, in the order of the file."""
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").open()]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is of a type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inner)
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is (type(None) if hint is None else hint)


def test_every_record_has_the_fields_of_the_schema_and_no_others(config: RunConfig) -> None:
    found = written(config)
    assert Counter(record["kind"] for record in found) == {
        **{"start": 2, "step": 6, "evaluation": 3, "save": 2, "end": 1}
    }
    for record in found:
        hints = typing.get_type_hints(KINDS[record["kind"]])
        assert record.keys() == hints.keys(), record["kind"]
        for field, value in record.items():
            assert fits(value, hints[field]), (record["kind"], field, value)


def test_the_file_tells_the_run_in_its_order(config: RunConfig) -> None:
    told = [(record["kind"], record["step"]) for record in written(config)]
    assert told == [
        *[("start", 0), ("evaluation", 0), ("step", 1), ("step", 2), ("step", 3)],
        *[("evaluation", 3), ("save", 3), ("start", 3), ("step", 4), ("step", 5), ("step", 6)],
        *[("evaluation", 6), ("save", 6), ("end", 6)],
    ]
    times = [r["time"] for r in written(config) if isinstance(r["time"], float)]
    assert times == sorted(times)


def test_a_start_tells_what_trains_where(config: RunConfig) -> None:
    first, second = records(config.run_dir, "start")
    assert first["source"] == asdict(GQA)
    assert first["target"]["num_attention_heads"] == TARGETS[GQA].num_attention_heads
    assert first["layout"] == {"tensor": 2, "pipeline": 1, "context": 1, "data": 1}
    assert first["hosts"] == [socket.gethostname()]
    assert (first["device"], first["peak_flops"], first["precision"]) == ("cpu", None, "fp32")
    assert first["tokens_per_step"] == 64
    for package in ("torch", "megatron-core", "numpy", "tensorboard", "wandb"):
        assert first["versions"][package].startswith(version(package))
    assert first["domain_weights"] == {"first": 0.7, "second": 0.3}
    at_three = records(config.run_dir, "evaluation")[1]
    assert second["domain_weights"] == at_three["domain_weights"]


def test_the_parts_of_a_step_are_within_it(config: RunConfig) -> None:
    weights = {r["step"]: r["domain_weights"] for r in records(config.run_dir, "evaluation")}
    for step in (r for r in written(config) if r["kind"] == "step"):
        parts = step["data_seconds"] + step["forward_backward_seconds"]
        assert 0 < step["forward_backward_seconds"] < parts < step["seconds"]
        assert step["tokens_per_second"] == pytest.approx(64 / step["seconds"])
        assert step["tokens"] == 64 * step["step"]
        assert step["domain_weights"] == weights[0 if step["step"] <= 3 else 3]
        assert {name: np.shape(rows) for name, rows in step["multipliers"].items()} == {
            **{"layer": (2, 1), "hidden": (2, 1), "head": (2, 3), "intermediate": (2, 3)}
        }


def test_masks_file_has_the_units_of_highest_log_alpha(config: RunConfig) -> None:
    run_dir = Path(config.run_dir)
    stored = json.loads((run_dir / "masks.json").read_text())
    state = load_file(run_dir / "checkpoints" / "step-00000006" / "masks.safetensors")
    keep = {"layer": 2, "hidden": 24, "head": 2, "intermediate": 32}
    assert stored["step"] == 6
    for name, units in keep.items():
        found = np.array(schema.unpack(stored["masks"][name]), dtype=bool)
        log_alpha = state[f"log_alpha.{name}"]
        assert found.shape == log_alpha.shape
        for row, values in zip(found, log_alpha, strict=True):
            assert row.sum() == units
            assert values[row].min() >= values[~row].max()


def norms(config: RunConfig) -> dict[str, Any]:
    """What a step records, and norms of the gradients that it left, which were not clipped."""
    platform = parallel.start(config.platform, config.parallel, config.trainer.seed)
    trainer = Trainer(config, platform)
    trainer.records.peak_flops = 1e9 / platform.world_size
    found: list[Any] = []
    trainer.log.record = found.append  # type: ignore[method-assign]
    trainer.train_step()
    objective: Any = trainer.objective
    groups = {"mask": objective.masks.log_alpha, "multiplier": objective.lagrangian.multipliers}
    gradients = {kind: [p.grad.flatten() for p in group.values()] for kind, group in groups.items()}
    parallel.stop()
    expected = {kind: float(torch.cat(parts).norm()) for kind, parts in gradients.items()}
    return {"record": found[0], "expected": expected}


def test_norms_are_of_gradients_before_clipping_and_mfu_of_the_peak(tmp_path: Path) -> None:
    run_distributed(write_source, 1, tmp_path, GQA)
    unclipped = PruningConfig(sparsity_warmup_steps=0, clip_grad=1e9)
    found = run_distributed(
        norms, 1, prune_run(tmp_path, parallel=ParallelConfig(), pruning=unclipped)
    )
    record, expected = found[0]["record"], found[0]["expected"]
    for kind, norm in expected.items():
        assert record[f"{kind}_grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert norm > 0
    # 6 for each weight of a product (all but the embedding's 64 x 32), 12 for attention
    flops = 6 * (27360 - 64 * 32) + 12 * 3 * 32 * 16
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / 1e9)


def expected_scalars(config: RunConfig) -> dict[str, dict[int, float]]:
    """Values by name and step, as docs/metrics.md says they are shown."""
    found: dict[str, dict[int, float]] = {}
    for record in written(config):
        if record["kind"] in ("start", "end"):
            continue
        for field, value in record.items():
            if field in ("kind", "step", "time", "mfu") or (record["kind"], field) == (
                "step",
                "domain_weights",
            ):
                continue
            if not isinstance(value, dict):
                found.setdefault(f"{record['kind']}/{field}", {})[record["step"]] = value
                continue
            for name, part in value.items():
                shown = {f"{field}/{name}": part}
                if field == "multipliers":
                    shown = {f"{field}/{name}/lambda{n}": np.mean(part[n - 1]) for n in (1, 2)}
                for tag, number in shown.items():
                    found.setdefault(tag, {})[record["step"]] = float(np.mean(number))
    return found


def test_tensorboard_shows_every_number_once(config: RunConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.run_dir) / "tensorboard"), {"scalars": 0})
    events.Reload()
    expected = expected_scalars(config)
    assert set(events.Tags()["scalars"]) == set(expected)
    assert {"step/loss", "losses/first", "domain_weights/first", "sparsity/head"} < set(expected)
    for tag, values in expected.items():
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in shown] == list(values), tag
        assert [value for _, value in shown] == pytest.approx(list(values.values()), rel=1e-6), tag


def wandb_records(file: Path) -> Iterator[Any]:
    """Of an offline run's file: W&B's header of 7 bytes, then LevelDB's log of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a block's end has no room for a header
            position += 32768 - position % 32768
            continue
        begin = position + 7
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        position, ends_record = begin + length, data[position + 6] in (1, 4)
        record += data[begin:position]
        if ends_record:
            parsed = Record()
            parsed.ParseFromString(record)
            yield parsed
            record = b""


def test_wandb_offline_shows_every_number_in_one_run(config: RunConfig) -> None:
    files = sorted(Path(config.run_dir).glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2  # before and after the death
    ids, shown = set(), []
    for file in files:
        found: dict[str, dict[int, float]] = {}
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                ids.add((record.run.run_id, record.run.project))
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            for tag in items.keys() - {"step", "_step", "_runtime", "_timestamp"}:
                found.setdefault(tag, {})[int(items["step"])] = float(items[tag])
        shown.append(found)
    assert ids == {((Path(config.run_dir) / "wandb-id").read_text().strip(), "test")}
    assert list(shown[0]["step/loss"]) == [1, 2, 3, 4, 5]
    assert list(shown[1]["step/loss"]) == [4, 5, 6]
    for tag, values in expected_scalars(config).items():
        both = shown[0].get(tag, {}) | shown[1].get(tag, {})
        assert both == pytest.approx(values, rel=1e-9), tag


def test_a_view_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """W&B has no key, and a file is where TensorBoard's directory belongs."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    log = LogConfig(tensorboard=True, wandb="online")
    config = run_config(tmp_path, write_domains(tmp_path), model=MHA, log=log)
    config = replace(config, trainer=replace(config.trainer, steps=2, save_interval=2))
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / "tensorboard").touch()
    run_distributed(train, 1, config, None)
    told = capfd.readouterr().err
    assert told.count("TensorBoard failed, and the run goes on without it: FileExistsError") == 1
    assert told.count("W&B failed, and the run goes on without it: ") == 1
    assert [r["step"] for r in records(config.run_dir, "step")] == [1, 2]
    (end,) = records(config.run_dir, "end")
    assert (end["reason"], end["verdict"]) == ("complete", "")
    for record in records(config.run_dir, "step", "evaluation"):  # it prunes nothing
        assert not {"penalty", "sparsity", "multipliers", "mask_grad_norm", "kept"} & record.keys()
        assert math.isfinite(record.get("loss", 0.0))
    assert not (Path(config.run_dir) / "masks.json").exists()


def test_a_view_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    only("log.wandb", "'offline'", "pip install megashear[wandb]", log__wandb="offline")
    only("log.tensorboard", "true", "megashear[tensorboard]", log__tensorboard=True)
