"""Hard concrete masks against float64 recomputation in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.pruning import hard_concrete

# Inside the clamp of +-4.6, at its edge and far outside.
LOG_ALPHA = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)
SEED = st.integers(0, 2**31)


def _noise(count: int, seed: int) -> torch.Tensor:
    return hard_concrete.noise((count,), hard_concrete.generator(seed, 0))


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1 / (1 + np.exp(-np.abs(x))), 1 - 1 / (1 + np.exp(-np.abs(x))))


@settings(deadline=None, max_examples=50)
@given(LOG_ALPHA, SEED)
def test_samples_and_their_gradients(values: list[float], seed: int) -> None:
    log_alpha = torch.tensor(values, requires_grad=True)
    u = _noise(len(values), seed)
    z = hard_concrete.sample(log_alpha, u)
    z.sum().backward()

    a64, u64 = np.array(values), u.numpy().astype(np.float64)
    s = _sigmoid((np.log(u64) - np.log(1 - u64) + a64) * 1.5)
    stretched = 1.2 * s - 0.1
    np.testing.assert_allclose(z.detach().numpy(), np.clip(stretched, 0, 1), atol=2e-6)
    slope = 1.2 * 1.5 * s * (1 - s)
    clear = np.minimum(np.abs(stretched), np.abs(stretched - 1)) > 1e-5  # not on a kink
    expected = np.where((stretched > 0) & (stretched < 1), slope, 0.0)
    np.testing.assert_allclose(_gradient(log_alpha).numpy()[clear], expected[clear], atol=5e-6)


@settings(deadline=None, max_examples=50)
@given(LOG_ALPHA)
def test_probability_kept_and_its_gradient(values: list[float]) -> None:
    log_alpha = torch.tensor(values, requires_grad=True)
    kept = hard_concrete.probability_kept(log_alpha)
    kept.sum().backward()

    removed = _sigmoid(2 / 3 * np.log(1 / 11) - np.array(values))
    clipped = np.clip(removed, 1e-6, 1 - 1e-6)
    np.testing.assert_allclose(kept.detach().numpy(), 1 - clipped, atol=2e-7)
    slope = np.where(removed == clipped, removed * (1 - removed), 0.0)
    np.testing.assert_allclose(_gradient(log_alpha).numpy(), slope, atol=2e-6)


@pytest.mark.parametrize("log_alpha", [-4.5, -1.6, 0.0, 2.0])
def test_samples_are_positive_as_often_as_probability_kept_says(log_alpha: float) -> None:
    draws = 200_000
    z = hard_concrete.sample(torch.tensor(log_alpha), _noise(draws, seed=7))
    p = float(hard_concrete.probability_kept(torch.tensor(log_alpha)))
    assert abs(float((z > 0).float().mean()) - p) < 5 * (p * (1 - p) / draws) ** 0.5


def test_no_gradient_where_a_sample_is_clamped() -> None:
    log_alpha = torch.tensor([-4.6, 4.6, 0.0], requires_grad=True)
    z = hard_concrete.sample(log_alpha, torch.tensor([0.01, 0.99, 0.5]))
    z.sum().backward()
    assert z.tolist() == [0.0, 1.0, 0.5]
    gradient = _gradient(log_alpha)
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert gradient[2] > 0


def test_samples_are_finite_at_the_ends_of_the_noise() -> None:
    log_alpha = torch.tensor([-4.6, 4.6], requires_grad=True)
    for u in (1e-6, 1 - 1e-6):
        z = hard_concrete.sample(log_alpha, torch.full((2,), u))
        z.sum().backward()
        assert z.isfinite().all()
        assert _gradient(log_alpha).isfinite().all()


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 30), SEED, st.booleans(), st.booleans())
def test_deterministic_masks(rows: int, units: int, seed: int, tied: bool, per_row: bool) -> None:
    generator = np.random.default_rng(seed)
    values = generator.uniform(-7, 7, (rows, units))
    if tied:
        values = values.round() / 4  # -1.75 to 1.75 in quarters: many equal values
    log_alpha = values.astype(np.float32)
    removed = generator.integers(0, units + 1, rows if per_row else 1)
    z = hard_concrete.deterministic(
        torch.from_numpy(log_alpha), torch.from_numpy(removed) if per_row else int(removed[0])
    )

    expected = _sigmoid(0.8 * 1.5 * log_alpha.astype(np.float64))
    for row in range(rows):  # the smallest goes first; of equals, the one with the higher index
        order = sorted(range(units), key=lambda unit: (log_alpha[row, unit], -unit))
        expected[row, order[: removed[row % len(removed)]]] = 0
    np.testing.assert_allclose(z.numpy(), expected, atol=1e-6)
    assert ((z.numpy() == 0) == (expected == 0)).all()


def test_equal_units_are_kept_from_the_lowest_index() -> None:
    z = hard_concrete.deterministic(torch.zeros(2, 40), torch.tensor([10, 0]))
    assert z[0].nonzero().flatten().tolist() == list(range(30))
    assert z[1].count_nonzero() == 40


def test_noise_is_a_function_of_seed_and_step() -> None:
    def draw(seed: int, step: int) -> torch.Tensor:
        return hard_concrete.noise((1000,), hard_concrete.generator(seed, step))

    first = draw(1, 2)
    assert torch.equal(first, draw(1, 2))
    # A seed beyond 32 bits counts too: torch's own CPU generator would ignore what is above.
    for other in (draw(1, 3), draw(2, 1), draw(1 + 2**32, 2), draw(12, 0)):
        assert not torch.equal(first, other)
    assert abs(float(first.mean()) - 0.5) < 0.05


def test_noise_stays_off_its_ends() -> None:
    u = hard_concrete.noise((2_000_000,), hard_concrete.generator(0, 0)).double()
    assert 0.99e-6 < u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1 - 0.95e-6
