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
from megashear.config.shapes import CHECKS
from megashear.config.values import Run
from megashear.pruning.counting import parameter_count
from megashear.pruning.masks import resolve_target

TOLERANCE = {"size": (0.97, 1.03), "memory": (0.94, 1.0), "kv-cache": (0.75, 1.0)}
"""A proposal's figure over the wanted one; what is a limit is never exceeded."""
INT4_BYTES = 0.5 + 2 / 128
"""Of a weight of the layers: four bits, and a 16-bit scale for 128 of them. Embedding and head stay
in bf16, as common 4-bit formats leave them."""
ALIKE = 2
"""Proposals that have the same nearest known model; more would differ by a layer."""


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
    """Of the GPT-NeoX architecture: feed-forward of 4 times the hidden size, two matrices."""
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
    """What is asked for: one figure, and at most so many bytes of keys and values a token.

    Attributes:
        kind: size (parameters) | memory (bytes of weights) | kv-cache (bytes a token, at bf16).
        wanted: the figure.
        precision: of the weights in memory, bf16 | int4.
        kv_bytes: limit for kinds size and memory.
    """

    kind: str
    wanted: float
    precision: str = "bf16"
    kv_bytes: float = math.inf


@dataclass(frozen=True)
class Proposal:
    """A target, and what it comes to."""

    target: TargetShape
    head_unit: str
    shape: ModelShape
    parameters: int
    nearest: Known
    distance: float

    def weight_bytes(self, precision: str) -> float:
        """Memory of the weights."""
        outer = parameter_count(replace(self.shape, num_layers=0))
        rate = 2 if precision == "bf16" else INT4_BYTES
        return 2 * outer + rate * (self.parameters - outer)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of a token, at bf16."""
        return kv_bytes(self.shape)


def kv_bytes(shape: ModelShape) -> int:
    """Bytes of the keys and values of a token in all layers, at bf16."""
    return 2 * 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels


def propose(source: ModelShape, goal: Goal, tensor: int, most: int = 6) -> list[Proposal]:
    """The targets nearest to known shapes; of each depth and width, and of each known, a few.

    Every one is no larger than the source in any size, keeps its size of a head and its ratio of
    heads to query groups (or, by query heads, its groups), divides by the tensor-parallel ranks,
    and has the wanted figure within TOLERANCE.
    """
    found: dict[tuple[int, int], Proposal] = {}
    for candidate in _candidates(source, goal, tensor):
        key = (candidate.shape.num_layers, candidate.shape.hidden_size)
        if key not in found or candidate.distance < found[key].distance:
            found[key] = candidate
    chosen: list[Proposal] = []
    for each in sorted(found.values(), key=lambda each: (each.distance, each.parameters)):
        alike = sum(other.nearest == each.nearest for other in chosen)
        if alike < ALIKE and len(chosen) < most and _passes(each, source, tensor):
            chosen.append(each)
    return chosen


def _passes(proposal: Proposal, source: ModelShape, tensor: int) -> bool:
    """Whether a run may have it: by the rules that a run is checked by."""
    config = RunConfig(
        stage="prune",
        run_dir="run",
        init_from="source",
        target=proposal.target,
        pruning=PruningConfig(head_unit=proposal.head_unit),
        parallel=ParallelConfig(tensor=tensor),
    )
    run = Run(config, source, None, check_files=False)
    rules = (problem for check in CHECKS for problem in check(run))
    return all(path == "data.seq_length" for path, _ in rules)  # a run's own choice


def _candidates(source: ModelShape, goal: Goal, tensor: int) -> Iterator[Proposal]:
    for head_unit, heads in _heads(source, tensor):
        for hidden in _hidden_sizes(source, heads):
            sizes = TargetShape(1, hidden, heads, source.ffn_hidden_size)
            shape = resolve_target(source, sizes, head_unit)
            for layers in range(max(1, source.num_layers // 4), source.num_layers + 1):
                ffn = _ffn_hidden_size(replace(shape, num_layers=layers), goal, tensor)
                if ffn is not None:
                    yield _proposal(source, TargetShape(layers, hidden, heads, ffn), head_unit)


def _heads(source: ModelShape, tensor: int) -> Iterator[tuple[str, int]]:
    """(head unit, heads) that a target may have, whose query groups divide by the ranks."""
    groups, per_group = source.num_query_groups, source.heads_per_group
    for kept in range(tensor, groups + 1, tensor):
        yield QUERY_GROUP, kept * per_group
    if per_group > 1 and groups % tensor == 0:
        for kept in range(1, per_group):
            yield QUERY_HEAD, kept * groups


def _hidden_sizes(source: ModelShape, heads: int) -> Iterator[int]:
    """Multiples of 128 (64 for small models) near the width of the heads.

    transformers wants of a LLaMA a hidden size that is a multiple of the number of heads.
    """
    width = heads * source.kv_channels
    unit = 128 if source.hidden_size % 128 == 0 else 64
    for hidden in range(unit, source.hidden_size + 1, unit):
        if hidden % heads == 0 and 0.6 <= width / hidden <= 1.7:
            yield hidden


def _ffn_hidden_size(shape: ModelShape, goal: Goal, tensor: int) -> int | None:
    """The size that brings a shape nearest to the goal; None where none does, or none is usual."""
    unit = math.lcm(tensor, 128 if shape.ffn_hidden_size % 128 == 0 else 64)
    low, high = TOLERANCE[goal.kind]
    if goal.kind == "kv-cache":
        if not low <= kv_bytes(shape) / goal.wanted <= high:
            return None
        size = round(8 / 3 * shape.hidden_size / unit) * unit
        return size if 0 < size <= shape.ffn_hidden_size else None
    if kv_bytes(shape) > goal.kv_bytes:
        return None
    at_one, at_two = (_figure(replace(shape, ffn_hidden_size=n * unit), goal) for n in (1, 2))
    steps = 1 + (goal.wanted - at_one) / (at_two - at_one)
    count = math.floor(steps) if high <= 1 else round(steps)
    size = count * unit
    figure = at_one + (count - 1) * (at_two - at_one)
    usual = 2 <= size / shape.hidden_size <= 6  # of the known shapes, 2.6 to 5.9
    fits = 0 < size <= shape.ffn_hidden_size and low <= figure / goal.wanted <= high
    return size if usual and fits else None


def _figure(shape: ModelShape, goal: Goal) -> float:
    """Parameters of a shape, or bytes of its weights."""
    count = parameter_count(shape)
    if goal.kind == "size":
        return count
    outer = parameter_count(replace(shape, num_layers=0))
    return 2 * outer + (2 if goal.precision == "bf16" else INT4_BYTES) * (count - outer)


def _proposal(source: ModelShape, target: TargetShape, head_unit: str) -> Proposal:
    shape = resolve_target(source, target, head_unit)
    parameters = parameter_count(shape)
    distance, nearest = min(
        ((_distance(shape, parameters, known), known) for known in KNOWN), key=lambda pair: pair[0]
    )
    return Proposal(target, head_unit, shape, parameters, nearest, distance)


def _distance(shape: ModelShape, parameters: int, known: Known) -> float:
    """How far a shape is from a known one, in logarithms of ratios: depth to width above all."""
    depth = _apart(shape.hidden_size / shape.num_layers, known.hidden_size / known.num_layers)
    ffn = _apart(
        shape.ffn_hidden_size / shape.hidden_size, known.ffn_hidden_size / known.hidden_size
    )
    width = shape.num_attention_heads * shape.kv_channels
    heads = _apart(width / shape.hidden_size, known.heads_width / known.hidden_size)
    return depth + 0.5 * ffn + heads + 0.25 * _apart(parameters / 1e9, known.billions)


def _apart(one: float, other: float) -> float:
    return abs(math.log(one / other))
