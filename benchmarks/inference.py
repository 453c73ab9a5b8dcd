"""Why the target's shape is uniform: tokens/s of models by transformers, and who takes them.

Four models with random weights: the source; a uniform target; one whose layers differ, as masks
without a target shape for each layer leave them (every layer its own number of heads and of
intermediate units, in all as many: the same parameters); and that one padded to its largest layer,
for engines that want one shape. Prefill is a prompt of 128 tokens, decode 32 tokens after it, by
greedy choice with a cache, on one thread a core. In brackets: quartiles.

    OMP_NUM_THREADS=1 python benchmarks/inference.py     # 3 minutes; LLaMA-2-7B to 2.7B on a GPU
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from harness import Report, devices, interleaved, parser, ratio, take_device
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.utils import logging

from megashear.console import run

PROMPT, NEW, BATCHES, TILE = 128, 32, (1, 8), 128


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; of each layer its heads and its intermediate units."""

    hidden: int
    heads: tuple[int, ...]
    intermediate: tuple[int, ...]
    vocabulary: int
    head_size: int

    @property
    def parameters(self) -> int:
        """Embedding, output head, norms, and the projections of all layers."""
        of_layers = 4 * self.head_size * sum(self.heads) + 3 * sum(self.intermediate)
        norms = 2 * len(self.heads) + 1
        return self.hidden * (2 * self.vocabulary + norms + of_layers)

    @property
    def tiled(self) -> float:
        """Columns of the layers' projections in whole tiles of a GPU's product, by columns."""
        columns = [*(self.head_size * heads for heads in self.heads), *self.intermediate]
        return sum(-(-column // TILE) * TILE for column in columns) / sum(columns)

    @property
    def one_cache(self) -> float:
        """Size of keys and values in one tensor for all layers, by what they need."""
        return max(self.heads) * len(self.heads) / sum(self.heads)

    def padded(self) -> Shape:
        """Every layer as large as the largest."""
        layers = len(self.heads)
        return Shape(
            self.hidden,
            (max(self.heads),) * layers,
            (max(self.intermediate),) * layers,
            self.vocabulary,
            self.head_size,
        )

    def uneven(self) -> Shape:
        """The same sums, spread over the layers at random: between about 1/4 and twice the mean."""
        rng = np.random.default_rng(0)
        spread = rng.uniform(0.25, 2, len(self.heads))
        other = rng.uniform(0.25, 2, len(self.heads))
        heads, intermediate = _shares(self.heads, spread), _shares(self.intermediate, other)
        return Shape(self.hidden, heads, intermediate, self.vocabulary, self.head_size)


def _shares(sizes: tuple[int, ...], weights: np.ndarray) -> tuple[int, ...]:
    """Whole numbers from 1 on with the sum of the sizes, about in proportion to the weights."""
    found = np.maximum(1, np.floor(weights / weights.sum() * sum(sizes))).astype(int)
    for number in range(sum(sizes) - int(found.sum())):
        found[number % len(found)] += 1
    assert found.sum() == sum(sizes)
    return tuple(int(each) for each in found)


def uniform(layers: int, hidden: int, heads: int, intermediate: int, vocabulary: int) -> Shape:
    """A shape whose layers are alike, with heads of 128, or of 64 in small models."""
    size = 128 if hidden >= 1024 else 64
    return Shape(hidden, (heads,) * layers, (intermediate,) * layers, vocabulary, size)


SHAPES = {  # source and uniform target
    "cpu": (uniform(12, 512, 8, 1408, 8192), uniform(12, 320, 5, 864, 8192)),
    "cuda": (uniform(32, 4096, 32, 11008, 32000), uniform(32, 2560, 20, 6912, 32000)),
}


def variants(device: str) -> dict[str, Shape]:
    """The four models."""
    source, target = SHAPES[device]
    uneven = target.uneven()
    return {
        "source": source,
        "uniform": target,
        "non-uniform": uneven,
        "non-uniform, padded": uneven.padded(),
    }


def build(shape: Shape, device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A LLaMA of transformers; where its layers differ, each is built to its own sizes."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=len(shape.heads),
        num_attention_heads=1,
        head_dim=shape.head_size,
        max_position_embeddings=4096,
    )
    layers = len(shape.heads)  # it says the mean of the layers; checks heads only when it is made
    config.num_attention_heads = config.num_key_value_heads = sum(shape.heads) // layers
    config.intermediate_size = sum(shape.intermediate) // layers
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config)
        for number, layer in enumerate(model.model.layers):
            own = deepcopy(model.config)
            own.num_attention_heads = own.num_key_value_heads = shape.heads[number]
            own.intermediate_size = shape.intermediate[number]
            if own.to_dict() != model.config.to_dict():
                layer.self_attn, layer.mlp = LlamaAttention(own, number), LlamaMLP(own)
    torch.set_default_dtype(torch.float32)
    return model.eval()


@torch.inference_mode()
def seconds(model: LlamaForCausalLM, batch: int, decode: bool) -> float:
    """Of a prompt, or of the tokens after it."""
    tokens, cache = torch.zeros(batch, PROMPT, dtype=torch.int64, device=model.device), None
    began = time.perf_counter()
    for number in range(1 + NEW * decode):
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens, cache = out.logits.argmax(-1), out.past_key_values
        if decode and number == 0:
            tokens.cpu()  # waits for the device
            began = time.perf_counter()
    tokens.cpu()
    return time.perf_counter() - began


def main() -> None:
    """Measure, and ask who takes the models."""
    args = parser(__doc__, rounds=5)
    take_device(args)
    given = args.parse_args()
    measured = devices(given.device)
    report = Report("inference_cuda" if given.device == "cuda" else "inference", __doc__ or "")
    for device in SHAPES:
        _shapes(report, device, variants(device))
    for device in measured:
        _device(report, device, given.rounds)
    if "cuda" not in measured:
        report.table("cuda, bfloat16: LLaMA-2-7B and 2.7B", ("model", "tok/s"), [("all", None)])
    report.write(given.out)


def _device(report: Report, device: str, rounds: int) -> None:
    """Speeds on it; on the CPU also who takes the models."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = variants(device)
    models = {name: build(shape, device, dtype) for name, shape in shapes.items()}
    assert all(models[name].num_parameters() == shapes[name].parameters for name in shapes)
    _speeds(report, models, rounds)
    if device == "cpu":
        _takers(report, models)


def _shapes(report: Report, device: str, shapes: dict[str, Shape]) -> None:
    rows = [
        (
            name,
            f"{shape.parameters:,}",
            f"{min(shape.heads)} to {max(shape.heads)}",
            f"{min(shape.intermediate)} to {max(shape.intermediate)}",
            len(set(zip(shape.heads, shape.intermediate, strict=True))),
            f"{shape.tiled:.3f}",
            f"{shape.one_cache:.2f}",
        )
        for name, shape in shapes.items()
    ]
    report.table(
        f"{device}: layers that differ; columns of products in whole tiles of {TILE}, by columns; "
        "keys and values in one tensor for all layers, by those needed",
        ("model", "parameters", "heads", "intermediate", "kinds of layer", "tiles", "one cache"),
        rows,
    )


def _speeds(report: Report, models: dict[str, LlamaForCausalLM], rounds: int) -> None:
    rows = []
    for batch in BATCHES:
        for decode in (False, True):
            cases = {name: partial(seconds, model, batch, decode) for name, model in models.items()}
            found = interleaved(cases, rounds)
            tokens = batch * (NEW if decode else PROMPT)
            what = f"{'decode' if decode else 'prefill'}, batch {batch}"
            for name, of in found.items():
                speed = f"{tokens / median(of):,.0f}"
                rows.append((what, name, speed, ratio(found["uniform"], of)))
    header = ("what", "model", "tok/s", "speed / uniform")
    one = models["uniform"]
    dtype = str(one.dtype).removeprefix("torch.")
    report.table(f"{one.device.type}, {dtype}: speed by transformers", header, rows)


def _takers(report: Report, models: dict[str, LlamaForCausalLM]) -> None:
    """Whether what `save_pretrained` writes can be read, and converted for an engine."""
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in ("uniform", "non-uniform"):
            path = Path(directory) / name
            models[name].save_pretrained(path)
            _tokenizer(models[name].config.vocab_size).save_pretrained(path)
            rows += [(name, what, _outcome(call, path)) for what, call in TAKERS.items()]
    report.table("a saved model, read by", ("model", "by", "outcome"), rows)


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Without one CTranslate2's converter takes no model."""
    words = WordLevel({str(number): number for number in range(size)}, unk_token="0")
    special = {"unk_token": "0", "bos_token": "1", "eos_token": "2"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)


def _outcome(call: Callable[[Path], None], path: Path) -> str:
    try:
        call(path)
    except Exception as error:  # whatever a reader says of it is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return "taken"


def _read(path: Path) -> None:
    LlamaForCausalLM.from_pretrained(path)


def _convert(path: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(path)).convert(str(path / "ctranslate2"))


TAKERS = {"transformers": _read, "CTranslate2": _convert}


if __name__ == "__main__":
    run(main)
