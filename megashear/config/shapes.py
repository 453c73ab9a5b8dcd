"""Rules for sizes: model, source, target and batch against each other and the parallel layout.

Part of `validate`, which see. Imports `schema` and `values` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megashear.config.values import (
    SIZES,
    Check,
    Faulty,
    Problem,
    Run,
    divisors,
    either,
    multiples,
)


def _model(run: Run) -> Iterator[Problem]:
    """The shape to initialise fits together."""
    model = run.config.model
    if model is None or min(model.num_attention_heads, model.num_query_groups) < 1:
        return
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        text = f"= {groups} does not divide num_attention_heads = {heads}. "
        yield "model.num_query_groups", text + f"Use {either(divisors(heads))}"
    if model.hidden_size % heads and model.kv_channels == model.hidden_size // heads:
        text = f"= {model.hidden_size} is not divisible by num_attention_heads = {heads}. "
        yield "model.hidden_size", text + f"Use {multiples(model.hidden_size, heads)}"
    elif model.kv_channels % 2:
        text = f"= {model.kv_channels} is odd; rotary embeddings need an even head size"
        yield "model.kv_channels", text


def _target(run: Run) -> Iterator[Problem]:
    """The target is no larger than the source and keeps whole query groups."""
    target, source = run.config.target, run.source
    if target is None or source is None or run.config.stage != "prune":
        return
    wanted = {name: getattr(target, name) or getattr(source, name) for name in SIZES}
    if any(isinstance(size, Faulty) or size < 1 for size in wanted.values()):
        return
    larger = [name for name in SIZES if wanted[name] > getattr(source, name)]
    for name in larger:
        text = f"= {wanted[name]} is larger than the source's {getattr(source, name)}. "
        yield f"target.{name}", text + f"Use at most {getattr(source, name)}"
    heads, per_group = wanted["num_attention_heads"], source.heads_per_group
    if "num_attention_heads" not in larger and heads % per_group:
        text = f"= {heads} is not a multiple of the source's {per_group} heads per query group. "
        yield "target.num_attention_heads", text + f"Use {multiples(heads, per_group)}"
    elif wanted == {name: getattr(source, name) for name in SIZES} and any(
        getattr(target, name) is not None for name in SIZES
    ):
        yield "target", "is the source's shape. Make at least one size smaller"


def _tensor_parallel(run: Run) -> Iterator[Problem]:
    """Every axis that tensor parallelism splits divides by its ranks, in source and target."""
    tensor = run.config.parallel.tensor
    axes = list(_split_axes(run))
    if tensor < 2 or not axes or min(size for *_, size in axes) < 1:
        return
    common = math.gcd(*(size for *_, size in axes))
    advice = f"Use {either([n for n in divisors(common) if n < tensor])}"
    for path, text, size in axes:
        if size % tensor:
            change = "" if path == "init_from" else f", or change the {path.split('.')[0]}"
            yield path, f"{text} not divisible by parallel.tensor = {tensor}. {advice}{change}"


def _split_axes(run: Run) -> Iterator[tuple[str, str, int]]:
    """(path, beginning of the message, size) of what tensor parallelism splits."""
    config, source = run.config, run.source
    shape = config.model if config.stage == "pretrain" else source
    if shape is not None:
        grouped = shape.num_query_groups != shape.num_attention_heads
        heads = "num_query_groups" if grouped else "num_attention_heads"
        for name in (heads, "ffn_hidden_size", "vocab_size"):
            size = getattr(shape, name)
            if config.stage == "pretrain":
                yield f"model.{name}", f"= {size} is", size
            else:
                yield "init_from", f"is a model whose {name} = {size} is", size
    target = config.target
    if target is None or config.stage != "prune":
        return
    if target.num_attention_heads is not None:
        number, per_group = target.num_attention_heads, source.heads_per_group if source else 1
        if per_group == 1:
            yield "target.num_attention_heads", f"= {number} is", number
        elif number % per_group == 0:
            groups = number // per_group
            text = f"= {number} makes {groups} query groups, which is"
            yield "target.num_attention_heads", text, groups
    if target.ffn_hidden_size is not None:
        size = target.ffn_hidden_size
        yield "target.ffn_hidden_size", f"= {size} is", size


def _sequence(run: Run) -> Iterator[Problem]:
    """Sequence parallelism has ranks to split over, and splits evenly."""
    parallel, length = run.config.parallel, run.config.data.seq_length
    if not parallel.sequence or parallel.tensor < 1:
        return
    if parallel.tensor == 1:
        text = "= true needs parallel.tensor > 1, and it is 1. Raise that, or write false"
        yield "parallel.sequence", text
    if length % parallel.tensor:
        text = f"= {length} is not divisible by parallel.tensor = {parallel.tensor}, which "
        text += f"parallel.sequence needs. Use {multiples(length, parallel.tensor)}"
        yield "data.seq_length", text


def _positions(run: Run) -> Iterator[Problem]:
    config = run.config
    shape = config.model if config.stage == "pretrain" else run.source
    if shape is not None and config.data.seq_length > shape.max_position_embeddings:
        most = shape.max_position_embeddings
        text = f"= {config.data.seq_length} is more than the model's max_position_embeddings"
        yield "data.seq_length", f"{text} = {most}. Use at most {most}"


def _world(run: Run) -> Iterator[Problem]:
    tensor, ranks = run.config.parallel.tensor, run.world_size
    if ranks is not None and tensor >= 1 and ranks % tensor:
        text = f"= {tensor} does not divide the {ranks} processes of the run. "
        yield "parallel.tensor", text + f"Use {either(divisors(ranks))}, or start other processes"


def _batches(run: Run) -> Iterator[Problem]:
    """A global batch is whole micro-batches on every data-parallel rank."""
    batch, micro = run.config.trainer.global_batch_size, run.config.trainer.micro_batch_size
    if min(batch, micro) < 1:
        return
    unit, what = micro, f"trainer.micro_batch_size = {micro}"
    if run.world_size is not None:
        tensor = run.config.parallel.tensor
        if tensor < 1 or run.world_size % tensor:
            return
        ranks = run.world_size // tensor
        unit, what = micro * ranks, f"{what} times {ranks} data-parallel ranks"
    if batch % unit:
        text = f"= {batch} is not divisible by {what}. Use {multiples(batch, unit)}"
        yield "trainer.global_batch_size", text


CHECKS: tuple[Check, ...] = (
    _model,
    _target,
    _tensor_parallel,
    _sequence,
    _positions,
    _world,
    _batches,
)
