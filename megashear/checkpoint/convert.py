"""The two ways between Hugging Face and Megatron: import a model, export a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from megashear.checkpoint.hf import VOCABULARIES, HuggingFaceReader, write_huggingface
from megashear.checkpoint.manager import (
    HUGGINGFACE,
    CheckpointInfo,
    Record,
    open_weights,
    versions,
    write_model,
)
from megashear.checkpoint.stream import processes, share
from megashear.config.schema import ModelShape
from megashear.console import progress
from megashear.errors import CheckpointError
from megashear.platform.parallel import launched_rank, single_process
from megashear.pruning.counting import parameter_count


def import_huggingface(
    source: str | Path, out: str | Path, *, overwrite: bool = False
) -> CheckpointInfo:
    """Write a Hugging Face model as a Megatron checkpoint that loads in any parallel layout.

    Args:
        source: Hugging Face directory.
        out: directory of the checkpoint.
        overwrite: whether an existing checkpoint there is replaced.

    Raises:
        CheckpointError: the model is incomplete or not understood, or `out` exists.
    """
    reader = HuggingFaceReader(source)
    reader.check()
    directory = reader.directory.resolve()
    has_tokenizer = any((directory / name).is_file() for name in VOCABULARIES)
    info = CheckpointInfo(
        shape=reader.shape,
        stage="imported",
        history=(Record(HUGGINGFACE, str(directory), reader.shape),),
        tokenizer=str(directory) if has_tokenizer else None,
    )
    with processes():
        names = share(info.shape)
        weights = shown(((name, reader.read(name)) for name in names), "importing", len(names))
        return write_model(Path(out), info, weights, overwrite=overwrite)


def export_huggingface(
    info: CheckpointInfo,
    out: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model of a dense checkpoint as transformers loads it, with a model card.

    Args:
        info: of the checkpoint.
        out: Hugging Face directory to write.
        dtype: of the weights; None keeps the checkpoint's.
        tokenizer: directory or file of the tokenizer that goes with it.
        overwrite: whether an existing model there is replaced.

    Raises:
        CheckpointError: the checkpoint is of a pruning run, or of a model that no architecture of
            transformers is, or lacks a weight, or `out` exists.
    """
    if info.stage == "prune":
        raise CheckpointError(
            f"{info.directory} is of a pruning run, whose model has masks. Cut the target model "
            "out first: python tools/checkpoint/extract.py --run <run>"
        )
    with single_process():
        reader = open_weights(info)
        return write_huggingface(
            out,
            info.shape,
            shown(reader.items(), "exporting", len(reader.rows)),
            dtype=dtype,
            tokenizer=tokenizer,
            card=model_card(info, Path(out).resolve().name),
            overwrite=overwrite,
        )


def shape_rows(shape: ModelShape) -> list[tuple[str, str]]:
    """What a command shows of a model: its sizes, and what else it has."""
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


def model_card(info: CheckpointInfo, name: str) -> str:
    """README.md of an exported model: what it is, where it comes from, how far it was trained.

    The front matter has what is known; the license is for whoever publishes the model to state.
    """
    records = info.records
    pruned = any(record.stage in ("prune", "pruned") for record in records)
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags: [megashear{', pruned' if pruned else ''}]\n"
        "# license: that of the source model binds this one too; state it before publishing\n---",
        f"# {name}",
        f"A language model of {parameter_count(info.shape):,} parameters, written by megashear "
        f"{versions()['megashear']} after training on {sum(r.tokens for r in records):,} tokens. "
        "This card is a stub: what the model is for, its data and its limits are yours to tell.",
        _shapes(records[0].shape, info.shape),
        _history(records),
    ]
    measured = [record for record in records if record.losses]
    if measured:
        losses = [(domain, f"{loss:.4f}") for domain, loss in measured[-1].losses.items()]
        title = f"Validation losses (nats per token) at the end of stage {measured[-1].stage}"
        sections.append(_section(title, ("domain", "loss"), losses))
    return "\n\n".join(sections) + "\n"


def _shapes(source: ModelShape | None, shape: ModelShape) -> str:
    """The shape of the model, beside that of the one which it was made of if it differs."""
    this = dict(shape_rows(shape))
    if source in (None, shape):
        return _section("Shape", ("", "this model"), this.items())
    before = dict(shape_rows(source))
    rows = [(name, before.get(name, ""), this.get(name, "")) for name in {**before, **this}]
    return _section("Shape", ("", "source", "this model"), rows)


def _history(records: Sequence[Record]) -> str:
    rows = [
        (
            *(record.stage, f"{record.steps:,}", f"{record.tokens:,}"),
            f"{parameter_count(record.shape):,}" if record.shape else "",
            f"`{record.path}`",
        )
        for record in records
    ]
    return _section("History", ("stage", "steps", "tokens", "parameters", "path"), rows)


def _section(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A heading and a table in Markdown, numbers to the right."""
    columns = ["---", *("---:" for _ in header[1:])]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, columns, *rows)]
    return "\n".join([f"## {title}", "", *lines])


def shown(
    weights: Iterable[tuple[str, Tensor]], what: str, total: int
) -> Iterable[tuple[str, Tensor]]:
    """The same stream with a progress bar, where somebody watches the first process."""
    return progress(weights, what, total, "tensors", speaks=launched_rank() == 0)
