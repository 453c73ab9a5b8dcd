"""The two ways between Hugging Face and Megatron: import a model, export a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megashear.checkpoint.hf import VOCABULARIES, HuggingFaceReader, write_huggingface
from megashear.checkpoint.manager import CheckpointInfo, open_weights, write_model
from megashear.checkpoint.stream import processes, share
from megashear.config.schema import ModelShape
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
        origin={"imported": str(directory)},
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
        CheckpointError: the checkpoint is of a pruning run, or of a model that LLaMA's format has
            no place for, or lacks a weight, or `out` exists.
    """
    if info.stage == "prune":
        raise CheckpointError(
            f"{info.directory} is of a pruning run, whose model has masks. Cut the target model "
            "out first: python tools/checkpoint/extract.py --run <run>"
        )
    parts = {"attention bias": info.shape.qkv_bias, "q/k norms": info.shape.qk_norm}
    if any(parts.values()):
        has = " and ".join(part for part, there in parts.items() if there)
        raise CheckpointError(
            f"{info.directory} is of a model with {has}, which a Hugging Face LLaMA has no weights "
            "for, and other architectures cannot be written yet. Use it as a Megatron checkpoint"
        )
    with single_process():
        reader = open_weights(info)
        return write_huggingface(
            out,
            info.shape,
            shown(reader.items(), "exporting", len(reader.rows)),
            dtype=dtype,
            tokenizer=tokenizer,
            card=model_card(info),
            overwrite=overwrite,
        )


def shape_rows(shape: ModelShape) -> list[tuple[str, str]]:
    """What a command shows of a model."""
    return [
        ("parameters", f"{parameter_count(shape):,}"),
        ("layers", f"{shape.num_layers:,}"),
        ("hidden", f"{shape.hidden_size:,}"),
        ("heads", f"{shape.num_attention_heads:,}"),
        ("key/value heads", f"{shape.num_query_groups:,}"),
        ("head size", f"{shape.kv_channels:,}"),
        ("intermediate", f"{shape.ffn_hidden_size:,}"),
        ("vocabulary", f"{shape.vocab_size:,}"),
    ]


def model_card(info: CheckpointInfo) -> str:
    """README.md of an exported model: what it is, where it comes from, how far it was trained."""
    history = [(how, f"`{where}`") for how, where in info.origin.items()]
    history += [("stage", info.stage), ("steps", f"{info.step:,}"), ("tokens", f"{info.tokens:,}")]
    losses = info.progress.get("losses") or {}
    sections = [
        "---\nlibrary_name: transformers\ntags: [megashear]\n---\n# Model card (stub)",
        "A LLaMA-architecture language model, written by megashear.",
        _section("Shape", shape_rows(info.shape)),
        _section("History", history),
    ]
    if losses:
        rows = [(domain, f"{loss:.4f}") for domain, loss in losses.items()]
        sections.append(_section("Last validation losses (nats per token)", rows))
    return "\n\n".join(sections) + "\n"


def _section(title: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join([f"## {title}", "", "| | |", "| --- | ---: |", *lines])


def shown(
    weights: Iterable[tuple[str, Tensor]], what: str, total: int
) -> Iterable[tuple[str, Tensor]]:
    """The same stream with a progress bar, where somebody watches the first process."""
    hidden = None if launched_rank() == 0 else True
    return tqdm(weights, what, total, unit=" tensors", leave=False, disable=hidden)
