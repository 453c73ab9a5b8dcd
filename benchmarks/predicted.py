"""What a step on GPUs should come to, by the model of `megashear plan`; nothing of it is measured.

For each model, cluster and number of GPUs: the fastest layout that fits, and what its step's time
goes into. Assumed, for all alike: arithmetic at 30% of the peak (what the paper's three runs came
to), collectives at 70% of a link's bandwidth and 20 us each within a node, once more for each
doubling of the nodes; 10% of the memory left free; Transformer Engine's layers, bf16, AdamW. Masks:
20 bytes of memory traffic for each scaled weight that is folded, 50 for each that is owned (no pass
stays in a cache), and 5 us for each small kernel.
"""

from __future__ import annotations

from dataclasses import replace

from harness import LLAMA_2, ROOT, Report

from megashear.config.loader import load_config
from megashear.config.schema import QUERY_HEAD, ModelShape, RunConfig, TargetShape
from megashear.hardware import GPUS
from megashear.planning.communication import CONTEXT, DATA, MASK_GRADIENTS, PIPELINE, TENSOR
from megashear.planning.layouts import Layout, allowed, layout_of, ranked, usable_bytes
from megashear.planning.setup import TRANSFORMER_ENGINE
from megashear.planning.throughput import (
    KERNEL,
    Cluster,
    exposed_seconds,
    mask_bytes,
    mask_kernels,
    step_time,
)
from megashear.pruning.counting import flops_per_token

CONFIGS = ROOT / "examples" / "configs"
TARGET_70B = TargetShape(num_layers=40, hidden_size=4096, num_attention_heads=32,
                         ffn_hidden_size=14336)  # fmt: skip
CLUSTERS = {  # and the network of a GPU, in Gbit/s
    "A100": ("a100-80gb", 200),
    "H100": ("h100-80gb", 400),
    "H200": ("h200-141gb", 400),
}
RUNS = {  # model, sequences of 4096 tokens in a step, GPUs
    "7B": (LLAMA_2["7B"], 32, (8, 64)),
    "70B": (LLAMA_2["70B"], 256, (64, 512)),
}
COMMUNICATION = (TENSOR, CONTEXT, PIPELINE, DATA)
PUBLISHED = (  # recipe, stage, model, GPUs, tok/s
    ("1.3b", "prune", LLAMA_2["7B"], 8, 14_750),
    ("1.3b", "continue", LLAMA_2["1.3B"], 16, 138_945),
    ("2.7b", "continue", ModelShape(32, 2560, 20, 6912, 32000), 16, 79_306),
)


def cluster_of(name: str) -> Cluster:
    """One of CLUSTERS: 8 GPUs a node."""
    gpu, network = CLUSTERS[name]
    return Cluster(next(each for each in GPUS if each.name == gpu), network=network * 1e9 / 8)


def config_of(shape: ModelShape, batch: int) -> RunConfig:
    """Pruning as the paper does it, with batches of this many sequences."""
    config = load_config(CONFIGS / "llama2-7b-to-1.3b" / "prune.yaml", check_files=False)
    config = replace(config, trainer=replace(config.trainer, global_batch_size=batch))
    if shape == LLAMA_2["70B"]:
        pruning = replace(config.pruning, head_unit=QUERY_HEAD)  # keeps its 8 k/v heads
        config = replace(config, target=TARGET_70B, pruning=pruning)
    return config


def tables(report: Report) -> None:
    """Put all of it into a report."""
    published(report)
    speeds, parts, masks = [], [], []
    for model, (shape, batch, numbers) in RUNS.items():
        for gpus in numbers:
            for name in CLUSTERS:
                row = (model, gpus, name)
                cluster = cluster_of(name)
                layouts = allowed(config_of(shape, batch), shape, gpus, cluster, TRANSFORMER_ENGINE)
                fitting = ranked(layouts, usable_bytes(cluster))
                if not fitting:
                    speeds.append((*row, f"{batch * 4096 / 1e6:.2f} M", "fits nowhere", *4 * "-"))
                    continue
                best = fitting[0]
                speeds.append((*row, *_speed(best, cluster, gpus)))
                parts.append((*row, *_parts(best, cluster)))
                masks.append((*row, *_masks(best, cluster)))
    run = ("model", "GPUs", "GPU")
    report.table(
        "predicted: a pruning step in the fastest layout that fits (tensor x pipeline (chunks) x "
        "context x data, micro-batch, recomputation)",
        (*run, "tokens a step", "layout", "GiB", "s/step", "tok/s", "MFU"),
        speeds,
    )
    kinds = ("arithmetic", "weights", "update", "bubble", *COMMUNICATION, MASK_GRADIENTS)
    header = (*run, *kinds, "communication visible", *(f"{kind} GB" for kind in COMMUNICATION))
    report.table(
        "predicted: seconds of that step by what they go into (communication: what no arithmetic "
        "hides), and what a GPU sends",
        header,
        parts,
    )
    report.table(
        "predicted: what masks add to that step (one all-reduce of the gradients of log_alpha; "
        "memory traffic of fold and chain rule; small kernels), its time over that without them, "
        "and the same were arithmetic at 50% of the peak",
        (
            *run,
            "sent MB",
            "of all sent",
            "all-reduce ms",
            "traffic ms",
            "kernels ms",
            "prune / dense",
            "at 50%",
        ),
        masks,
    )


def published(report: Report) -> None:
    """The model against what was published of A100s."""
    rows = []
    for recipe, stage, shape, gpus, speed in PUBLISHED:
        file = CONFIGS / f"llama2-7b-to-{recipe}" / f"{stage}.yaml"
        config = load_config(file, check_files=False)
        cluster = cluster_of("A100")
        layout = layout_of(config, shape, gpus, cluster, TRANSFORMER_ENGINE)
        found = layout.tokens_per_second
        run = f"{stage}, {recipe.upper()}"
        rows.append((run, gpus, f"{found:,.0f}", f"{speed:,}", f"{found / speed - 1:+.1%}"))
    report.table(
        "predicted (tok/s) and published: the recipes of examples/configs on A100 80 GB",
        ("run", "GPUs", "predicted", "published", "error"),
        rows,
    )


def _speed(layout: Layout, cluster: Cluster, gpus: int) -> tuple[str, ...]:
    setup, parallel = layout.setup, layout.setup.parallel
    flops = layout.tokens_per_second * flops_per_token(setup.shape, setup.seq_length)
    stages = f"{parallel.pipeline} ({parallel.virtual_pipeline})"
    split = f"{parallel.tensor} x {stages} x {parallel.context} x {setup.data_size}"
    return (
        f"{setup.tokens_per_step / 1e6:.2f} M",
        f"{split}, {setup.micro_batch_size}, {parallel.recompute}",
        f"{layout.memory.total / 2**30:.0f}",
        f"{layout.time.total:.2f}",
        f"{layout.tokens_per_second:,.0f}",
        f"{flops / (gpus * cluster.gpu.bf16_flops):.1%}",
    )


def _parts(layout: Layout, cluster: Cluster) -> tuple[str, ...]:
    time, sent = layout.time, layout.sent
    exposed = exposed_seconds(layout.setup, cluster)
    kinds = ("arithmetic", "weights", "update", "bubble", *COMMUNICATION, MASK_GRADIENTS)
    return (
        *(f"{getattr(time, kind):.3f}" for kind in kinds),
        f"{sum(exposed.values()) / time.total:.1%}",
        *(f"{sent[kind] / 1e9:.2f}" for kind in COMMUNICATION),
    )


def _masks(layout: Layout, cluster: Cluster) -> tuple[str, ...]:
    sent, seconds = layout.sent, exposed_seconds(layout.setup, cluster)[MASK_GRADIENTS]
    traffic = mask_bytes(layout.setup) / cluster.gpu.memory_bandwidth
    kernels = mask_kernels(layout.setup) * KERNEL
    faster = step_time(layout.setup, replace(cluster, mfu=0.5))
    return (
        f"{sent[MASK_GRADIENTS] / 1e6:.2f}",
        f"{sent[MASK_GRADIENTS] / sum(sent.values()):.3%}",
        f"{seconds * 1e3:.2f}",
        f"{traffic * 1e3:.2f}",
        f"{kernels * 1e3:.2f}",
        f"{1 + layout.mask_overhead:.4f}",
        f"{1 + replace(layout, time=faster).mask_overhead:.4f}",
    )
