"""Describe a model and its history, for commands and model cards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import megashear
from megashear.checkpoint.foreign import printable
from megashear.checkpoint.info import CheckpointInfo, Record
from megashear.checkpoint.models import Model
from megashear.config.schema import ModelShape
from megashear.config.shapes import allowed_layouts
from megashear.pruning.counting import parameter_count


def facts(model: Model) -> dict[str, Any]:
    """Return what `megashear inspect --json` prints of a model.

    Only tables of contents are read, no weights.

    Raises:
        CheckpointError: parts of the model are missing or do not fit.
    """
    info, masks = model.info, model.masks if model.is_pruning else None
    records = [asdict(record) for record in model.history]
    return {
        "path": str(info.directory),
        "stage": info.stage,
        "step": info.step,
        "tokens": info.tokens,
        "tokens_of_all_stages": sum(record["tokens"] for record in records),
        "parameters": parameter_count(info.shape),
        "dtypes": model.dtypes,
        "shape": asdict(info.shape),
        "target": asdict(info.target) if info.target else None,
        "layouts": allowed_layouts(info.shape),
        "masks": [asdict(state) for state in masks.states] if masks else None,
        "losses": records[-1]["losses"],
        "history": records[:-1],
        "tokenizer": info.tokenizer,
        "versions": info.versions,
    }


def shape_rows(shape: ModelShape) -> list[tuple[str, str]]:
    """Return the rows that describe a shape: sizes, then features."""
    biases = {
        "query/key/value": shape.qkv_bias,
        "attention output": shape.proj_bias,
        "mlp": shape.mlp_bias,
    }
    scaling, window = shape.rotary_scaling, shape.sliding_window
    features = {
        "embeddings": "tied" if shape.tied_embeddings else "",
        "bias": ", ".join(name for name, there in biases.items() if there),
        "query/key norms": "one for all heads" if shape.qk_norm else "",
        "rotary scaling": f"{scaling.rope_type}, factor {scaling.factor:g}" if scaling else "",
        "sliding window": f"{window:,} tokens" if window else "",
    }
    return [
        ("family", shape.family),
        ("parameters", f"{parameter_count(shape):,}"),
        ("layers", f"{shape.num_layers:,}"),
        ("hidden", f"{shape.hidden_size:,}"),
        ("heads", f"{shape.num_attention_heads:,}"),
        ("key/value heads", f"{shape.num_query_groups:,}"),
        ("head size", f"{shape.kv_channels:,}"),
        ("intermediate", f"{shape.ffn_hidden_size:,}"),
        ("vocabulary", f"{shape.vocab_size:,}"),
        ("positions", f"{shape.max_position_embeddings:,}"),
        ("rotary base", f"{shape.rotary_base:,g}"),
        ("norm epsilon", f"{shape.layernorm_epsilon:g}"),
        *((name, text) for name, text in features.items() if text),
    ]


def compared_rows(source: ModelShape, target: ModelShape) -> list[tuple[str, str, str]]:
    """Return the rows of `shape_rows` for two models side by side."""
    before, after = dict(shape_rows(source)), dict(shape_rows(target))
    return [(name, before.get(name, ""), after.get(name, "")) for name in {**before, **after}]


def layout_rows(shape: ModelShape) -> list[tuple[str, str]]:
    """Return the rows of the parallel layouts that a model can be trained in."""
    sizes = {kind: ", ".join(map(str, sizes)) for kind, sizes in allowed_layouts(shape).items()}
    return [
        ("tensor", sizes["tensor"]),
        ("pipeline x virtual_pipeline", sizes["pipeline"]),
        ("context, data", "any"),
    ]


RECORD = ("stage", "steps", "tokens", "parameters", "path")


def record_rows(records: Iterable[Record]) -> list[tuple[str, ...]]:
    """Return the rows of a history under the columns of `RECORD`, in Markdown."""
    return [
        (
            *(record.stage, f"{record.steps:,}", f"{record.tokens:,}"),
            f"{parameter_count(record.shape):,}" if record.shape else "",
            f"`{printable(record.path)}`",
        )
        for record in records
    ]


def model_card(info: CheckpointInfo, name: str) -> str:
    """Return the README.md of an exported model: shape, history, validation losses.

    The license is left for whoever publishes the model to state.
    """
    records, source = info.records, info.records[0].shape
    pruned = any(record.stage in ("prune", "pruned") for record in records)
    shape = _section("Shape", ("", "this model"), shape_rows(info.shape))
    if source is not None and source != info.shape:
        rows = compared_rows(source, info.shape)
        shape = _section("Shape", ("", "source", "this model"), rows)
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags: [megashear{', pruned' if pruned else ''}]\n"
        "# license: that of the source model binds this one too; state it before publishing\n"
        "# (its license files are not copied here)\n---",
        f"# {printable(name)}",
        f"A language model of {parameter_count(info.shape):,} parameters, written by megashear "
        f"{megashear.__version__} after training on {sum(r.tokens for r in records):,} tokens. "
        "This card is a stub: describe what the model is for, its data and its limits.",
        shape,
        _section("History", RECORD, record_rows(records)),
    ]
    measured = [record for record in records if record.losses]
    if measured:
        losses = [(domain, f"{loss:.4f}") for domain, loss in measured[-1].losses.items()]
        title = f"Validation losses (nats per token) at the end of stage {measured[-1].stage}"
        sections.append(_section(title, ("domain", "loss"), losses))
    return "\n\n".join(sections) + "\n"


def _section(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a heading and a table in Markdown, numbers right-aligned."""
    columns = ["---", *("---:" for _ in header[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, columns, *rows)]
    return "\n".join([f"## {title}", "", *lines])
