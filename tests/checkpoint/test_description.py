"""The model card of an export."""

from __future__ import annotations

from dataclasses import replace

import yaml

from megashear.checkpoint.description import model_card
from megashear.checkpoint.info import CheckpointInfo, Record
from megashear.pruning.counting import parameter_count
from tests.support.runs import GQA

LARGE = replace(GQA, num_layers=6, sliding_window=32)


def cells(card: str, title: str) -> list[list[str]]:
    """The rows below the header of a section's table."""
    section = card.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [line[2:-2].split(" | ") for line in lines[2:]]


def sheared(losses: dict[str, float]) -> CheckpointInfo:
    history = (
        Record("huggingface", "/models/large", LARGE),
        Record("prune", "/runs/prune", LARGE, 10, 1_000, {"cc": 3.0}),
        Record("extracted", "/runs/prune/extracted", GQA),
    )
    return CheckpointInfo(GQA, "continue", 20, 4_000, history=history, progress={"losses": losses})


def test_it_states_source_target_tokens_and_losses() -> None:
    card = model_card(sheared({"cc": 2.5, "book": 3.25}), "small")
    assert "\n# small\n" in card
    assert f"{parameter_count(GQA):,} parameters" in card
    assert "after training on 5,000 tokens" in card
    shape = {name: values for name, *values in cells(card, "Shape")}
    assert shape["layers"] == ["6", "3"]
    assert shape["sliding window"] == ["32 tokens", ""]
    stages = [row[:3] for row in cells(card, "History")]
    assert stages == [
        ["huggingface", "0", "0"],
        ["prune", "10", "1,000"],
        ["extracted", "0", "0"],
        ["continue", "20", "4,000"],
    ]
    title = "Validation losses (nats per token) at the end of stage continue"
    assert cells(card, title) == [["cc", "2.5000"], ["book", "3.2500"]]


def test_its_front_matter_has_what_is_known_and_no_license() -> None:
    for info, tags in (
        (sheared({}), ["megashear", "pruned"]),
        (CheckpointInfo(GQA, "imported"), ["megashear"]),
    ):
        text = model_card(info, "small").split("---")[1]
        found = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
        assert yaml.safe_load(text) == found
        assert "license" in text


def test_what_is_not_known_is_left_out() -> None:
    card = model_card(sheared({}), "small")
    assert "Validation losses (nats per token) at the end of stage prune" in card
    old = CheckpointInfo(GQA, "continue", 1, 64, history=(Record("init_from", "/models/large"),))
    card = model_card(old, "small")
    assert "Validation" not in card
    assert [len(row) for row in cells(card, "Shape")] == [2] * len(cells(card, "Shape"))
    assert cells(card, "History")[0] == ["init_from", "0", "0", "", "`/models/large`"]


def test_shapes_of_one_model_are_not_compared() -> None:
    info = CheckpointInfo(GQA, "imported", history=(Record("huggingface", "/models/a", GQA),))
    assert "source" not in model_card(info, "small").split("## Shape")[1].split("## History")[0]
