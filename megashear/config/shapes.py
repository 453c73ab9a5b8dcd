"""Rules for sizes: model, source, target and batch against each other and the parallel layout.

`validate.problems` applies them. Imports `schema` and `values` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megashear.config.schema import QUERY_GROUP, QUERY_HEAD, ModelShape, RunConfig
from megashear.config.values import (
    PRUNED_SIZES,
    Check,
    CheckContext,
    Faulty,
    Problem,
    divisors,
    either,
    multiples,
    show,
)


def shape_problems(
    config: RunConfig, source: ModelShape, world_size: int | None = None
) -> list[Problem]:
    """Return every rule for sizes that a configuration without faulty values breaks.

    The rules about the number of processes are skipped where `world_size` is None.
    """
    run = CheckContext(config, source, world_size, check_files=False)
    return [problem for check in CHECKS for problem in check(run)]


def allowed_layouts(shape: ModelShape) -> dict[str, list[int]]:
    """Return the sizes of the parallel layout that a model's shape allows, by kind.

    `pipeline` is the number of stages times the chunks per stage (virtual stages).
    """
    split = math.gcd(*(getattr(shape, name) for name in _split_sizes(shape)))
    return {"tensor": divisors(split), "pipeline": _stages(shape)}


def _split_sizes(shape: ModelShape) -> tuple[str, ...]:
    """Return the sizes that tensor parallelism splits evenly; the vocabulary is padded."""
    grouped = shape.num_query_groups != shape.num_attention_heads
    heads = "num_query_groups" if grouped else "num_attention_heads"
    return heads, "ffn_hidden_size"


def _stages(shape: ModelShape) -> list[int]:
    """Return the products of stages and chunks that get the same number of layers each."""
    return divisors(shape.num_layers)


def _model(run: CheckContext) -> Iterator[Problem]:
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


def _biases(run: CheckContext) -> Iterator[Problem]:
    """Megatron-Core gives linear_qkv a bias wherever linear_proj has one."""
    model = run.config.model
    if model is not None and model.proj_bias and not model.qkv_bias:
        yield "model.proj_bias", "= true needs model.qkv_bias = true. Write that, or false here"


def _rotary_scaling(run: CheckContext) -> Iterator[Problem]:
    """Megatron-Core supports this scaling of rotary embeddings."""
    scaling = run.config.model.rotary_scaling if run.config.model is not None else None
    if scaling is None:
        return
    original, factor = scaling.original_max_position_embeddings, scaling.attention_factor
    if scaling.rope_type == "llama3" and original != 8192:
        text = f"= {show(original)}: Megatron-Core supports llama3 with 8192 only. Write that"
        yield "model.rotary_scaling.original_max_position_embeddings", text
    if scaling.rope_type == "yarn" and original is None:
        text = "is missing: yarn needs the positions that the model had before scaling"
        yield "model.rotary_scaling.original_max_position_embeddings", text
    if 0 < scaling.factor < 1:
        yield "model.rotary_scaling.factor", f"= {scaling.factor:g} must be >= 1"
    elif scaling.rope_type == "yarn" and scaling.factor == 1 and factor not in (None, 1):
        text = f"= {factor:g} needs a factor above 1. Raise that, or leave it out"
        yield "model.rotary_scaling.attention_factor", text


def _target(run: CheckContext) -> Iterator[Problem]:
    """The target is no larger than the source, and its heads are what the head unit leaves."""
    target, source = run.config.target, run.source
    if target is None or source is None or run.config.stage != "prune":
        return
    wanted = {name: getattr(target, name) or getattr(source, name) for name in PRUNED_SIZES}
    if any(isinstance(size, Faulty) or size < 1 for size in wanted.values()):
        return
    larger = [name for name in PRUNED_SIZES if wanted[name] > getattr(source, name)]
    for name in larger:
        text = f"= {wanted[name]} is larger than the source's {getattr(source, name)}. "
        yield f"target.{name}", text + f"Use at most {getattr(source, name)}"
    heads, (unit, what) = wanted["num_attention_heads"], _heads_together(run, source)
    if "num_attention_heads" not in larger and heads % unit:
        text = f"= {heads} is not a multiple of the source's {what}. "
        yield "target.num_attention_heads", text + f"Use {multiples(heads, unit)}"
    elif wanted == {name: getattr(source, name) for name in PRUNED_SIZES} and any(
        getattr(target, name) is not None for name in PRUNED_SIZES
    ):
        yield "target", "is the source's shape. Make at least one size smaller"


def _heads_together(run: CheckContext, source: ModelShape) -> tuple[int, str]:
    """Return the number that heads are pruned in multiples of, and its meaning in the source."""
    groups, per_group = source.num_query_groups, source.heads_per_group
    if run.config.pruning.head_unit == QUERY_HEAD and per_group > 1:
        return groups, f"{groups} query groups, each of which keeps the same number of heads"
    return per_group, f"{per_group} heads per query group"


def _head_unit(run: CheckContext) -> Iterator[Problem]:
    """Single query heads can be pruned only if several share a key and value."""
    source, head_unit = run.source, run.config.pruning.head_unit
    if run.config.stage != "prune" or source is None or source.heads_per_group > 1:
        return
    if head_unit == QUERY_HEAD:
        text = f"= {show(head_unit)}, but no two heads of the source share a key and value. "
        yield "pruning.head_unit", text + f"Use {show(QUERY_GROUP)}, which prunes its single heads"


def _tensor_parallel(run: CheckContext) -> Iterator[Problem]:
    """The sizes that tensor parallelism splits divide by its ranks, in source and target."""
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


def _split_axes(run: CheckContext) -> Iterator[tuple[str, str, int]]:
    """Yield (path, start of the message, size) of what tensor parallelism splits evenly."""
    config, source, shape = run.config, run.source, _trained(run)
    if shape is not None:
        for name in _split_sizes(shape):
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
        elif run.config.pruning.head_unit != QUERY_HEAD and number % per_group == 0:
            groups = number // per_group
            text = f"= {number} makes {groups} query groups, which is"
            yield "target.num_attention_heads", text, groups
    if target.ffn_hidden_size is not None:
        size = target.ffn_hidden_size
        yield "target.ffn_hidden_size", f"= {size} is", size


def _pipeline(run: CheckContext) -> Iterator[Problem]:
    """Every chunk of every pipeline stage has the same number of layers."""
    config, shape = run.config, _trained(run)
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    if min(stages, chunks) < 1:
        return
    if chunks > 1 and stages == 1:
        text = f"= {chunks} needs parallel.pipeline > 1, and it is 1. Raise that, or write 1"
        yield "parallel.virtual_pipeline", text
    elif shape is not None and shape.num_layers > 0 and stages * chunks not in _stages(shape):
        text = f"= {stages}" + (f" times virtual_pipeline = {chunks}" if chunks > 1 else "")
        text += f" does not divide the model's {shape.num_layers} layers. Use "
        text += either(_stages(shape)) + (" for their product" if chunks > 1 else "")
        yield "parallel.pipeline", text


def _sequence(run: CheckContext) -> Iterator[Problem]:
    """Ranks that split a sequence divide it, and sequence parallelism has ranks to split over.

    Context parallelism gives each rank two blocks, one from either end of the sequence.
    """
    parallel, length = run.config.parallel, run.config.data.seq_length
    if min(parallel.tensor, parallel.context) < 1:
        return
    if parallel.sequence and parallel.tensor == 1:
        text = "= true needs parallel.tensor > 1, and it is 1. Raise that, or write false"
        yield "parallel.sequence", text
    needs = [f"parallel.context = {parallel.context}"] if parallel.context > 1 else []
    needs += [f"parallel.tensor = {parallel.tensor} with sequence"] if parallel.sequence else []
    unit = 2 * parallel.context if parallel.context > 1 else 1
    if parallel.sequence:
        unit = math.lcm(unit, parallel.context * parallel.tensor)
    if length % unit:
        text = f"= {length} is not divisible by {unit}, which {' and '.join(needs)} needs. "
        yield "data.seq_length", text + f"Use {multiples(length, unit)}"


def _overlap(run: CheckContext) -> Iterator[Problem]:
    """Only the distributed optimizer gathers weights during the forward pass."""
    parallel = run.config.parallel
    missing = [
        f"parallel.{name}"
        for name in ("distributed_optimizer", "overlap_grad_reduce")
        if not getattr(parallel, name)
    ]
    if parallel.overlap_param_gather and missing:
        text = f"= true needs {' and '.join(missing)} too. Write true there, or false here"
        yield "parallel.overlap_param_gather", text


def _trained(run: CheckContext) -> ModelShape | None:
    """Return the shape that the run trains, if it is known."""
    return run.config.model if run.config.stage == "pretrain" else run.source


def _positions(run: CheckContext) -> Iterator[Problem]:
    config, shape = run.config, _trained(run)
    if shape is not None and config.data.seq_length > shape.max_position_embeddings:
        most = shape.max_position_embeddings
        text = f"= {config.data.seq_length} is more than the model's max_position_embeddings"
        yield "data.seq_length", f"{text} = {most}. Use at most {most}"


def _context(run: CheckContext) -> Iterator[Problem]:
    """Limits of the layers if ranks split a sequence."""
    config, shape = run.config, _trained(run)
    context = config.parallel.context
    if shape is None or context < 2:
        return
    scaling, window = shape.rotary_scaling, shape.sliding_window
    yarn = scaling is not None and scaling.rope_type == "yarn"
    original = scaling.original_max_position_embeddings if scaling is not None else None
    # Megatron-Core computes yarn's embeddings of these positions and splits them when it starts.
    if yarn and original and original % (2 * context):
        text = f"= {context}: the {original} original positions of the model's yarn embeddings "
        yield "parallel.context", text + f"are not divisible by {2 * context}"
    if window and window < config.data.seq_length and config.platform.layers != "torch":
        text = f"= {context} needs platform.layers = 'torch' where data.seq_length is longer than "
        yield "parallel.context", text + f"the model's sliding window = {window}"


def _packed_documents(run: CheckContext) -> Iterator[Problem]:
    """Transformer Engine cannot split a sequence with a mask over ranks."""
    context, layers = run.config.parallel.context, run.config.platform.layers
    if run.config.data.reset_attention_mask and context > 1 and layers != "torch":
        text = f"= true with parallel.context = {context} needs platform.layers = 'torch'"
        yield "data.reset_attention_mask", text


def _world(run: CheckContext) -> Iterator[Problem]:
    parallel, ranks = run.config.parallel, run.world_size
    sizes = {name: getattr(parallel, name) for name in ("tensor", "pipeline", "context")}
    if ranks is None or min(sizes.values()) < 1 or ranks % parallel.model_ranks == 0:
        return
    large = {name: size for name, size in sizes.items() if size > 1}
    where = f"parallel.{next(iter(large))}" if len(large) == 1 else "parallel"
    product = " times ".join(f"{name} {size}" for name, size in large.items())
    text = f"= {parallel.model_ranks}" if len(large) == 1 else f": {product}"
    advice = either(divisors(ranks)) + (" for the product" if len(large) > 1 else "")
    text += f" does not divide the {ranks} processes of the run. "
    yield where, text + f"Use {advice}, or start other processes"


def _batches(run: CheckContext) -> Iterator[Problem]:
    """A global batch is whole micro-batches on every data-parallel rank, in rounds of the stages.

    If the number of processes is unknown, one data-parallel rank is assumed.
    """
    trainer, parallel = run.config.trainer, run.config.parallel
    batch, micro = trainer.global_batch_size, trainer.micro_batch_size
    sizes = (parallel.tensor, parallel.pipeline, parallel.context, parallel.virtual_pipeline)
    if min(batch, micro, *sizes) < 1:
        return
    unit, what = micro, f"trainer.micro_batch_size = {micro}"
    if run.world_size is not None:
        if run.world_size % parallel.model_ranks:
            return
        ranks = run.world_size // parallel.model_ranks
        unit, what = micro * ranks, f"{what} times {ranks} data-parallel ranks"
    if parallel.virtual_pipeline > 1:
        unit *= parallel.pipeline
        what += f" times {parallel.pipeline} interleaved stages"
    if batch % unit:
        text = f"= {batch} is not divisible by {what}. Use {multiples(batch, unit)}"
        yield "trainer.global_batch_size", text


CHECKS: tuple[Check, ...] = (
    _model,
    _biases,
    _rotary_scaling,
    _target,
    _head_unit,
    _tensor_parallel,
    _pipeline,
    _sequence,
    _overlap,
    _positions,
    _context,
    _packed_documents,
    _world,
    _batches,
)
