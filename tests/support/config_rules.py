"""A run that breaks no rule, and what is wrong with it after changes."""

from __future__ import annotations

import dataclasses
from typing import Any

from megashear.config.schema import DataConfig, Domain, ModelShape, RunConfig, TargetShape
from megashear.config.validate import problems

MHA = ModelShape(
    num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=32000
)
GQA = dataclasses.replace(MHA, num_query_groups=8)

PRUNE = RunConfig(
    "prune",
    "runs/prune",
    init_from="source",
    target=TargetShape(24, 2048, 16, 5504),
    data=DataConfig(
        domains=(
            Domain("cc", "cc_train", "cc_valid", 0.75, 1.9643),
            Domain("wiki", "wiki_train", "wiki_valid", 0.25, 1.759),
        )
    ),
)


def change(config: Any, path: str, value: Any) -> Any:
    """A copy of the configuration with one field set; a number in the path is a list's item."""
    name, _, rest = path.partition(".")
    if isinstance(config, tuple):
        index = int(name)
        return (*config[:index], change(config[index], rest, value), *config[index + 1 :])
    new = change(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: new})


def found(
    config: RunConfig = PRUNE,
    source: ModelShape | None = MHA,
    world_size: int | None = None,
    *,
    check_files: bool = False,
    **changes: Any,
) -> list[tuple[str, str]]:
    """What is wrong after changes, given as `trainer__steps=3`."""
    for path, value in changes.items():
        config = change(config, path.replace("__", "."), value)
    return problems(config, source, world_size, check_files=check_files)


def only(expected_path: str, *words: str, **arguments: Any) -> None:
    """Assert that exactly one thing is wrong, and that its message has the words."""
    result = found(**arguments)
    assert [path for path, _ in result] == [expected_path], result
    assert all(word in result[0][1] for word in words), result[0][1]
