"""Target shapes of a wanted size, near published ones, that pruning can reach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megashear.config.schema import (
    QUERY_GROUP,
    QUERY_HEAD,
    ModelShape,
    ParallelConfig,
    PruningConfig,
    RunConfig,
    TargetShape,
)
from megashear.config.shapes import allowed_layouts, shape_problems
from megashear.config.values import either
from megashear.pruning.counting import parameter_count
from megashear.pruning.masks import resolve_target

TOLERANCE = {"size": (0.96, 1.04), "memory": (0.94, 1.0), "kv-cache": (0.75, 1.0)}
"""Range of a proposal's figure over the wanted one; a limit is never exceeded."""
USUAL_FFN = (2, 6)
"""Range of the intermediate over the hidden size; known shapes have 2.6 to 5.9."""
INT4_BYTES = 0.5 + 2 / 128
"""Bytes per weight of the layers: four bits, and a 16-bit scale for 128 of them. Embedding and head
stay in bf16, as in common 4-bit formats."""
APART = 1.1
"""Least ratio of two proposals, in depth or in width."""
TENSOR = 8
"""Tensor-parallel ranks that a target should divide by; targets that do not are ranked lower."""


@dataclass(frozen=True)
class Known:
    """A published model: sizes, and parameters (billions)."""

    name: str
    billions: float
    num_layers: int
    hidden_size: int
    heads_width: int  # heads times their size
    ffn_hidden_size: float  # as a gated feed-forward of as many weights


def _ungated(name: str, billions: float, layers: int, hidden: int) -> Known:
    """A GPT-NeoX model: its feed-forward has 4 times the hidden size and two matrices."""
    return Known(name, billions, layers, hidden, hidden, 4 * hidden * 2 / 3)


KNOWN = (
    # github.com/EleutherAI/pythia, table of models
    _ungated("Pythia-160M", 0.162, 12, 768),
    _ungated("Pythia-410M", 0.405, 24, 1024),
    _ungated("Pythia-1B", 1.012, 16, 2048),
    _ungated("Pythia-1.4B", 1.415, 24, 2048),
    _ungated("Pythia-2.8B", 2.775, 32, 2560),
    _ungated("Pythia-6.9B", 6.857, 32, 4096),
    # config.json of each, as released
    _ungated("INCITE-3B", 2.776, 32, 2560),
    Known("Llama-3.2-1B", 1.236, 16, 2048, 2048, 8192),
    Known("Llama-3.2-3B", 3.213, 28, 3072, 3072, 8192),
    Known("SmolLM2-135M", 0.135, 30, 576, 576, 1536),
    Known("SmolLM2-360M", 0.362, 32, 960, 960, 2560),
    Known("SmolLM2-1.7B", 1.711, 24, 2048, 2048, 8192),
    Known("Qwen2.5-0.5B", 0.494, 24, 896, 896, 4864),
    Known("Qwen2.5-1.5B", 1.544, 28, 1536, 1536, 8960),
    Known("Qwen2.5-3B", 3.086, 36, 2048, 2048, 11008),
)


@dataclass(frozen=True)
class Goal:
    """The wanted figure, and a limit for the bytes of keys and values per token.

    Attributes:
        kind: size (parameters) | memory (bytes of weights) | kv-cache (bytes per token, in bf16).
        wanted: the figure.
        precision: precision of the weights in memory, bf16 | int4.
        kv_bytes: limit for kinds size and memory.
    """

    kind: str
    wanted: float
    precision: str = "bf16"
    kv_bytes: float = math.inf


@dataclass(frozen=True)
class Proposal:
    """A target and its figures."""

    target: TargetShape
    head_unit: str
    shape: ModelShape
    parameters: int
    nearest: Known
    distance: float

    @property
    def tensor(self) -> list[int]:
        """Tensor-parallel ranks, up to TENSOR, that the target divides by."""
        return [n for n in allowed_layouts(self.shape)["tensor"] if n <= TENSOR]


def kv_bytes(shape: ModelShape) -> int:
    """Return the bytes of the keys and values of a token in all layers, in bf16."""
    return 2 * 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels


def weight_bytes(shape: ModelShape, precision: str) -> float:
    """Return the bytes of the weights in bf16 or int4."""
    outer = parameter_count(replace(shape, num_layers=0))
    rate = 2 if precision == "bf16" else INT4_BYTES
    return 2 * outer + rate * (parameter_count(shape) - outer)


def figure(shape: ModelShape, goal: Goal) -> float:
    """Return the figure of a shape that the goal is about."""
    if goal.kind == "kv-cache":
        return kv_bytes(shape)
    return parameter_count(shape) if goal.kind == "size" else weight_bytes(shape, goal.precision)


def propose(source: ModelShape, goal: Goal, tensor: int = 1, most: int = 6) -> list[Proposal]:
    """Return the targets nearest to known shapes, each at least APART from the others.

    No size is larger than the source's. A target keeps the head size and the ratio of heads to
    query groups (or, by query heads, the groups), divides by the tensor-parallel ranks, has an even
    number of layers or the source's, and the wanted figure within TOLERANCE.
    """
    chosen: list[Proposal] = []
    found = sorted(_candidates(source, goal, tensor), key=lambda each: each.distance)
    for each in found:
        if len(chosen) < most and all(_are_apart(each.shape, other.shape) for other in chosen):
            chosen += [each] if _passes(each, source, tensor) else []
    return chosen


def _are_apart(one: ModelShape, other: ModelShape) -> bool:
    pairs = (one.num_layers, other.num_layers), (one.hidden_size, other.hidden_size)
    return any(max(pair) >= APART * min(pair) for pair in pairs)


def why_none(source: ModelShape, goal: Goal, tensor: int) -> tuple[str, str]:
    """Return (option, text): which option leaves nothing to propose, and why."""
    most = figure(source, goal)
    if goal.wanted > most:
        return goal.kind, f"is more than the source has, {most:,.0f}"
    if free := propose(source, replace(goal, kv_bytes=math.inf), tensor):
        least = min(kv_bytes(each.shape) for each in free) / 1024
        return "kv-cache", f"is too small for that {goal.kind}: usual shapes need {least:g} KiB"
    split = allowed_layouts(source)["tensor"]
    if tensor not in split:
        return "tensor", f"does not split the source, which divides by {either(split)}"
    sizes = [
        figure(replace(shape, num_layers=layers, ffn_hidden_size=ffn), goal)
        for _, shape in _widths(source, tensor)
        for layers in _depths(source)
        for ffn in (USUAL_FFN[0] * shape.hidden_size, source.ffn_hidden_size)
    ] or [most]
    text = f"shapes from {min(sizes):,.0f} to {max(sizes):,.0f} are tried: a quarter of the layers"
    text += ", and whole heads, at least. Try another"
    if tensor > 1 and propose(source, goal):
        return "tensor", f"leaves none of that {goal.kind}: {text}"
    return goal.kind, f"is that of no usual shape: {text}"


def _passes(proposal: Proposal, source: ModelShape, tensor: int) -> bool:
    """Whether the rules of a run accept the target."""
    config = RunConfig(
        stage="prune",
        run_dir="run",
        init_from="source",
        target=proposal.target,
        pruning=PruningConfig(head_unit=proposal.head_unit),
        parallel=ParallelConfig(tensor=tensor),
    )
    found = shape_problems(config, source)
    return all(path == "data.seq_length" for path, _ in found)  # a run's own choice


def _candidates(source: ModelShape, goal: Goal, tensor: int) -> Iterator[Proposal]:
    for head_unit, width in _widths(source, tensor):
        for layers in _depths(source):
            shape = replace(width, num_layers=layers)
            if kv_bytes(shape) <= goal.kv_bytes:
                for ffn in _ffn_hidden_sizes(source, shape, goal, tensor):
                    yield _proposal(replace(shape, ffn_hidden_size=ffn), head_unit, goal)


def _depths(source: ModelShape) -> Iterator[int]:
    """Even numbers of layers, which pipeline stages divide, and the source's own."""
    for layers in range(max(1, source.num_layers // 4), source.num_layers + 1):
        if layers % 2 == 0 or layers == source.num_layers:
            yield layers


def _widths(source: ModelShape, tensor: int) -> Iterator[tuple[str, ModelShape]]:
    """Yield (head unit, the source with fewer heads and a smaller hidden size)."""
    for head_unit, heads in _heads(source, tensor):
        for hidden in _hidden_sizes(source, heads):
            sizes = TargetShape(source.num_layers, hidden, heads, source.ffn_hidden_size)
            yield head_unit, resolve_target(source, sizes, head_unit)


def _heads(source: ModelShape, tensor: int) -> Iterator[tuple[str, int]]:
    """Yield (head unit, heads) of targets whose query groups divide by the ranks."""
    groups, per_group = source.num_query_groups, source.heads_per_group
    for kept in range(tensor, groups + 1, tensor):
        yield QUERY_GROUP, kept * per_group
    if per_group > 1 and groups % tensor == 0:
        for kept in range(1, per_group):
            yield QUERY_HEAD, kept * groups


def _hidden_sizes(source: ModelShape, heads: int) -> Iterator[int]:
    """Multiples of 128 (64 for small models) near the width of the heads.

    transformers requires the hidden size of a LLaMA to be a multiple of its number of heads.
    """
    width = heads * source.kv_channels
    unit = 128 if source.hidden_size % 128 == 0 else 64
    for hidden in range(unit, source.hidden_size + 1, unit):
        if hidden % heads == 0 and 0.6 <= width / hidden <= 1.7:
            yield hidden


def _ffn_hidden_sizes(
    source: ModelShape, shape: ModelShape, goal: Goal, tensor: int
) -> Iterator[int]:
    """Yield the size that brings a shape nearest to the goal, and the source's ratio, rounded up.

    The paper's target and LLaMA's sizes are of the second kind.
    """
    unit = math.lcm(tensor, 128 if source.ffn_hidden_size % 128 == 0 else 64)
    share = source.ffn_hidden_size * shape.hidden_size / source.hidden_size
    sizes = {math.ceil(share / unit) * unit}
    if goal.kind != "kv-cache":
        at_one, at_two = (figure(replace(shape, ffn_hidden_size=n * unit), goal) for n in (1, 2))
        steps = 1 + (goal.wanted - at_one) / (at_two - at_one)
        sizes.add(unit * (round(steps) if TOLERANCE[goal.kind][1] > 1 else math.floor(steps)))
    for size in sorted(sizes):
        least, most = (n * shape.hidden_size for n in USUAL_FFN)
        if max(1, least) <= size <= min(most, source.ffn_hidden_size):
            share = figure(replace(shape, ffn_hidden_size=size), goal) / goal.wanted
            low, high = TOLERANCE[goal.kind]
            if low <= share <= high:
                yield size


def _proposal(shape: ModelShape, head_unit: str, goal: Goal) -> Proposal:
    target = TargetShape(
        shape.num_layers, shape.hidden_size, shape.num_attention_heads, shape.ffn_hidden_size
    )
    parameters = parameter_count(shape)
    distance, nearest = min(
        ((_distance(shape, parameters, known), known) for known in KNOWN), key=lambda pair: pair[0]
    )
    proposal = Proposal(target, head_unit, shape, parameters, nearest, distance)
    # Targets that split badly over ranks or stages, or miss the goal, are ranked lower.
    ranks = max(n for n in proposal.tensor if TENSOR % n == 0)
    later = 0.05 * math.log2(TENSOR / ranks) + (0.1 if shape.num_layers % 4 else 0)
    later += 0.25 * _apart(figure(shape, goal), goal.wanted)
    return replace(proposal, distance=distance + later)


def _distance(shape: ModelShape, parameters: int, known: Known) -> float:
    """Return the distance of a shape to a known one, in logarithms of ratios."""
    depth = _apart(shape.hidden_size / shape.num_layers, known.hidden_size / known.num_layers)
    ffn = _apart(
        shape.ffn_hidden_size / shape.hidden_size, known.ffn_hidden_size / known.hidden_size
    )
    width = shape.num_attention_heads * shape.kv_channels
    heads = _apart(width / shape.hidden_size, known.heads_width / known.hidden_size)
    return depth + 0.5 * ffn + heads + 0.25 * _apart(parameters / 1e9, known.billions)


def _apart(one: float, other: float) -> float:
    return abs(math.log(one / other))
