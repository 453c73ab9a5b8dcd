"""Layouts that a shape allows are those that a configuration of such a model is not refused for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megashear.config.schema import ModelShape, ParallelConfig, RunConfig
from megashear.config.shapes import allowed_layouts
from megashear.config.validate import problems

SHEARED = ModelShape(
    num_layers=24, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=5504, vocab_size=32000
)
ALLOWED = {
    SHEARED: ([1, 2, 4, 8, 16], [1, 2, 3, 4, 6, 8, 12, 24]),
    replace(SHEARED, num_query_groups=4): ([1, 2, 4], [1, 2, 3, 4, 6, 8, 12, 24]),
    replace(SHEARED, vocab_size=32001, num_layers=7): ([1, 2, 4, 8, 16], [1, 7]),
    replace(SHEARED, ffn_hidden_size=5506, num_layers=1): ([1, 2], [1]),
}


def refused(shape: ModelShape, **sizes: int) -> bool:
    """Whether a run that continues a model of this shape is refused for its layout."""
    config = RunConfig("continue", "runs/c", init_from="model", parallel=ParallelConfig(**sizes))
    layout = ("init_from", "parallel.pipeline", "parallel.virtual_pipeline")
    found = problems(config, shape, None, check_files=False)
    return any(path in layout for path, _ in found)


@pytest.mark.parametrize("shape", ALLOWED)
def test_allowed_layouts(shape: ModelShape) -> None:
    tensor, pipeline = ALLOWED[shape]
    assert allowed_layouts(shape) == {"tensor": tensor, "pipeline": pipeline}
    for size in range(1, 26):
        assert refused(shape, tensor=size) == (size not in tensor), size
        assert refused(shape, pipeline=size) == (size not in pipeline), size
    for chunks in range(1, 13):
        assert refused(shape, pipeline=2, virtual_pipeline=chunks) == (2 * chunks not in pipeline)
