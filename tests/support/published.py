"""What Sheared LLaMA published: shapes with their parameters, losses, and references from them."""

from __future__ import annotations

from dataclasses import replace

from megashear.config.schema import ModelShape

LLAMA2_7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    ffn_hidden_size=11008,
    vocab_size=32000,
)


def _shape(layers: int, hidden: int, heads: int, ffn: int, groups: int = 0) -> ModelShape:
    return replace(
        LLAMA2_7B,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        num_query_groups=groups,
        kv_channels=128,
    )


PARAMETERS = {
    "7B": (LLAMA2_7B, 6_738_415_616),
    "13B": (_shape(40, 5120, 40, 13824), 13_015_864_320),
    "70B": (_shape(80, 8192, 64, 28672, groups=8), 68_976_648_192),
    "2.7B": (_shape(32, 2560, 20, 6912), 2_701_560_320),
    "1.3B": (_shape(24, 2048, 16, 5504), 1_345_423_360),
}

LOSSES = {
    "cc": (1.7520, 1.6680, 1.4621),
    "github": (0.6216, 0.5791, 0.4890),
    "book": (1.9063, 1.8242, 1.6450),
    "stackexchange": (1.4482, 1.3936, 1.2805),
    "wiki": (1.4844, 1.3945, 1.2118),
    "arxiv": (1.2637, 1.2109, 1.1148),
    "c4": (1.9219, 1.8486, 1.6848),
}
"""Of 7B, 13B and 70B (nats per token)."""

REFERENCES = {
    "1.3B": dict(
        zip(LOSSES, (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251), strict=True)
    ),
    "2.7B": dict(
        zip(LOSSES, (1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328), strict=True)
    ),
}
