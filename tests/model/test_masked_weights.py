"""Masks folded into a Megatron model's weights compute what masks on activations compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megashear.checkpoint.torch_dist.state import fill_from_reader
from megashear.config.schema import ModelShape, ParallelConfig
from megashear.model.build import build_model
from megashear.model.masked_weights import MaskedWeights
from megashear.platform.parallel import single_process
from megashear.pruning.masks import Masks
from tests.support.distributed import run_distributed
from tests.support.reference_llama import forward, random_weights
from tests.support.runs import BIASES, GQA, GQA_QUERY_HEAD, MHA, QWEN, masks_of

SHAPES = {
    "mha": MHA,
    "gqa": GQA,
    "mha-tied": replace(MHA, tied_embeddings=True),
    "gqa-tied": replace(GQA, tied_embeddings=True),
    "query-head": GQA_QUERY_HEAD,
    "bias-norms": QWEN,
    "biases": BIASES,
    "attention-biases": replace(BIASES, mlp_bias=False),
    "mlp-biases-tied": replace(GQA, mlp_bias=True, tied_embeddings=True),
}


def sampled_masks(shape: ModelShape) -> tuple[Masks, dict[str, Tensor]]:
    """Masks spread over (0, 1), some exactly 0, one whole layer off; with their graph."""
    masks = masks_of(shape)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for log_alpha in masks.log_alpha.values():
            log_alpha.copy_(1.5 * torch.randn(log_alpha.shape, generator=generator))
        masks.log_alpha["layer"].copy_(torch.tensor([[1.0, -4.0, 1.5]]))
    z = masks.sample(seed=5, step=2)
    assert [value > 0 for value in z["layer"][0].tolist()] == [True, False, True]
    return masks, z


def compute(shape: ModelShape) -> dict[str, Tensor | dict[str, Tensor]]:
    """Logits and gradients of the masked Megatron model and of the oracle, by name."""
    weights = random_weights(shape, seed=0)
    tokens = torch.randint(shape.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, dims=1)
    found: dict[str, Tensor | dict[str, Tensor]] = {}

    masks, z = sampled_masks(shape)
    with single_process() as platform:
        chunks = build_model(shape, platform, ParallelConfig(), seq_length=12)
        (model,) = chunks
        fill_from_reader(chunks, weights.__getitem__, platform)
        masked_weights = MaskedWeights(chunks, platform, head_unit=masks.head_unit)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with masked_weights.masked(z):
            logits = model(tokens, torch.arange(12).expand(2, -1), None)
            functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        found["restored"] = {
            name: (p.detach() != before[name]).sum() for name, p in model.named_parameters()
        }
        for parameter in model.parameters():
            parameter.main_grad = parameter.grad  # type: ignore[attr-defined]  # as Megatron's DDP
        masked_weights.backward()
        found["logits"] = logits.detach()
        found["weights"] = {b.rule.name: b.parameter.main_grad for b in model.bound_rules()}  # type: ignore
        found["masks"] = {name: p.grad for name, p in masks.log_alpha.items()}  # type: ignore[misc]

    masks, z = sampled_masks(shape)
    leaves = {name: weight.requires_grad_() for name, weight in weights.items()}
    expected = forward(shape, leaves, tokens, z)
    functional.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    found["expected_logits"] = expected.detach()
    found["expected_weights"] = {name: leaf.grad for name, leaf in leaves.items()}  # type: ignore
    found["expected_masks"] = {n: p.grad for n, p in masks.log_alpha.items()}  # type: ignore[misc]
    return found


@pytest.fixture(scope="module", params=SHAPES)
def computed(request: pytest.FixtureRequest) -> dict[str, dict[str, Tensor]]:
    return run_distributed(compute, 1, SHAPES[request.param])[0]


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max()
        assert scale > 0, f"{name}: the comparison would be empty"
        assert (ours[name] - value).abs().max() / scale < 1e-5, name


def test_logits_equal_masks_on_activations(computed: dict[str, Tensor]) -> None:
    assert_same({"": computed["logits"]}, {"": computed["expected_logits"]})


def test_weight_gradients_equal_plain_autograd(computed: dict[str, dict[str, Tensor]]) -> None:
    off = "decoder.layers.1."  # its mask is 0: nothing flows there, in either
    assert all(not g.any() for n, g in computed["weights"].items() if n.startswith(off))
    assert all(not g.any() for n, g in computed["expected_weights"].items() if n.startswith(off))
    assert_same(
        {n: g for n, g in computed["weights"].items() if not n.startswith(off)},
        {n: g for n, g in computed["expected_weights"].items() if not n.startswith(off)},
    )


def test_mask_gradients_equal_plain_autograd(computed: dict[str, dict[str, Tensor]]) -> None:
    assert set(computed["masks"]) == {"layer", "hidden", "head", "intermediate"}
    assert_same(computed["masks"], computed["expected_masks"])


def test_weights_are_as_before_bit_for_bit(computed: dict[str, dict[str, Tensor]]) -> None:
    assert not any(computed["restored"].values())


def repeated_indices(shape: ModelShape) -> list[int]:
    """Return how many indices each index_select of a fold repeats."""
    counts = []
    select = Tensor.index_select

    def counting(self: Tensor, dim: int, index: Tensor) -> Tensor:
        counts.append(len(index) - len(index.unique()))
        return select(self, dim, index)

    masks, z = sampled_masks(shape)
    with single_process() as platform:
        chunks = build_model(shape, platform, ParallelConfig(), seq_length=12)
        masked_weights = MaskedWeights(chunks, platform, head_unit=masks.head_unit)
        Tensor.index_select = counting  # type: ignore[method-assign, assignment]
        with masked_weights.masked(z):
            pass
    return counts


def test_no_gradient_of_masks_is_added_in_any_order() -> None:
    """As a GPU would, where an index is repeated; replicas of a model would drift apart."""
    (counts,) = run_distributed(repeated_indices, 1, GQA)
    assert counts and not any(counts)


def fold_and_fail(shape: ModelShape) -> list[bool]:
    weights = random_weights(shape, seed=0)
    _, z = sampled_masks(shape)
    with single_process() as platform:
        chunks = build_model(shape, platform, ParallelConfig(), seq_length=12)
        (model,) = chunks
        fill_from_reader(chunks, weights.__getitem__, platform)
        try:
            with MaskedWeights(chunks, platform).masked(z):
                changed = not torch.equal(
                    model.embedding.word_embeddings.weight,
                    weights["embedding.word_embeddings.weight"],
                )
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        same = [torch.equal(b.parameter, weights[b.rule.name]) for b in model.bound_rules()]
        eps = model.decoder.final_layernorm.eps == shape.layernorm_epsilon
        return [changed, eps, *same]


def test_an_interrupt_inside_leaves_the_weights_whole() -> None:
    assert all(run_distributed(fold_and_fail, 1, MHA)[0])
