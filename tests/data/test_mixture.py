"""Domain weights: the rules against the paper's figures and numpy, and what they refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megashear.config.schema import DataConfig, Domain
from megashear.data.mixture import Mixture, Segment, updated_weights, within_bounds
from megashear.errors import CheckpointError, DataError

NAMES = ("cc", "github", "book")
REFERENCES = {"cc": 1.9643, "github": 0.7459, "book": 2.1393}


def make_mixture(rule: str = "paper") -> Mixture:
    return Mixture(NAMES, (0.6, 0.3, 0.1), REFERENCES, rule=rule)


losses_of_three = st.lists(st.floats(0.0, 20.0), min_size=3, max_size=3)
shares = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3)


@given(losses=losses_of_three, shares=shares, eta=st.floats(0.1, 5), c=st.floats(0.0, 0.5))
@pytest.mark.parametrize("rule", ["paper", "reference_code"])
def test_the_rules_are_the_written_formulas(
    rule: str, losses: list[float], shares: list[float], eta: float, c: float
) -> None:
    old = np.array(shares) / np.sum(shares)
    gap = np.array(losses) - np.array([REFERENCES[name] for name in NAMES])
    if rule == "paper":
        gap = np.where(gap > 0, gap, 0)
    expected = old * np.exp(eta * gap)
    expected = (1 - c) * expected / expected.sum() + c / 3
    by_name = dict(zip(NAMES, losses, strict=True))
    new = updated_weights(tuple(old), by_name, REFERENCES, NAMES, rule, eta, c)
    np.testing.assert_allclose(new, expected, rtol=1e-12)
    assert abs(sum(new) - 1) < 1e-12


def test_a_domain_below_its_reference_moves_weights_only_by_the_reference_code() -> None:
    losses = {"cc": 1.9643, "github": 0.2, "book": 2.1393}
    weights = (0.6, 0.3, 0.1)
    assert updated_weights(weights, losses, REFERENCES, NAMES, "paper", 1.0, 0.0) == pytest.approx(
        weights
    )
    moved = updated_weights(weights, losses, REFERENCES, NAMES, "reference_code", 1.0, 0.0)
    assert moved[1] < 0.3 and moved[0] > 0.6


@pytest.mark.parametrize("gap", [1e3, 1e6, -1e6])
def test_gaps_beyond_the_range_of_exp_give_finite_weights(gap: float) -> None:
    losses = {"cc": 1.9643 + gap, "github": 0.7459, "book": 2.1393}
    new = updated_weights((0.6, 0.3, 0.1), losses, REFERENCES, NAMES, "reference_code", 1.0, 1e-4)
    expected = [1.0, 0.0, 0.0] if gap > 0 else [0.0, 0.75, 0.25]
    np.testing.assert_allclose(new, (1 - 1e-4) * np.array(expected) + 1e-4 / 3, rtol=1e-9)


def test_a_domain_without_weight_does_not_swallow_the_others() -> None:
    losses = {"cc": 5000.0, "github": 0.7459, "book": 2.1393}
    new = updated_weights((0.0, 0.5, 0.5), losses, REFERENCES, NAMES, "paper", 1.0, 1e-4)
    np.testing.assert_allclose(new, [1e-4 / 3, *[(1 - 1e-4) / 2 + 1e-4 / 3] * 2], rtol=1e-12)


@pytest.mark.parametrize("rule", ["paper", "reference_code"])
def test_every_domain_without_a_finite_figure_is_named_and_nothing_changes(rule: str) -> None:
    mixture = make_mixture(rule)
    del mixture.references["book"]
    with pytest.raises(DataError) as raised:
        mixture.update(640, {"cc": math.nan, "github": math.inf})
    message = str(raised.value)
    assert "cc: validation loss is nan" in message
    assert "github: validation loss is inf" in message
    assert "book: validation loss is missing" in message
    assert "book: reference loss is missing" in message
    assert mixture.segments == (Segment(0, (0.6, 0.3, 0.1)),)


def bisected(weights: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """clip(lambda * w) that sums to 1, by halving an interval of log lambda."""
    least, most = -50.0, 50.0
    for _ in range(200):
        middle = (least + most) / 2
        total = np.clip(np.exp(middle) * weights, low, high).sum()
        least, most = (middle, most) if total < 1 else (least, middle)
    return np.clip(np.exp(most) * weights, low, high)


@given(
    data=st.lists(
        st.tuples(st.floats(1e-6, 1), st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=7
    )
)
def test_bounds_scale_alike_what_they_do_not_hold(data: list[tuple[float, float, float]]) -> None:
    shares, a, b = np.array(data).T
    weights = shares / shares.sum()
    low, high = np.minimum(a, b), np.maximum(a, b)
    low /= max(1, low.sum())
    high = np.minimum(1, high / min(1, high.sum()))
    assume(high.sum() >= 1)
    new = np.array(within_bounds(tuple(weights), tuple(low), tuple(high)))
    np.testing.assert_allclose(new, bisected(weights, low, high), rtol=1e-9, atol=1e-12)
    assert abs(new.sum() - 1) < 1e-12
    assert (low <= new).all() and (new <= high).all()


def test_weights_within_their_bounds_stay_bit_for_bit() -> None:
    weights = (0.1 + 0.2, 0.3, 0.4)  # which sum to a little more than 1
    assert within_bounds(weights, (0.0, 0.3, 0.1), (1.0, 0.3, 0.5)) == weights


def test_a_domain_without_weight_takes_what_the_others_may_not() -> None:
    held = within_bounds((1.0, 0.0, 0.0), (0.0, 0.0, 0.25), (0.5, 1.0, 1.0))
    assert held == pytest.approx((0.5, 0.25, 0.25))
    assert within_bounds((0.6, 0.4, 0.0), (0.0, 0.0, 0.0), (0.5, 1.0, 1.0)) == pytest.approx(
        (0.5, 0.5, 0.0), abs=1e-12
    )


def test_a_weight_comes_to_its_bounds_and_leaves_them_again() -> None:
    bounds = [(0.0, 1.0), (0.2, 1.0), (0.0, 0.3)]
    mixture = Mixture(NAMES, (0.6, 0.3, 0.1), REFERENCES, bounds=bounds)
    high = {"cc": 1.9643, "github": 0.7459, "book": 4.1393}
    for sample in (8, 16, 24):
        mixture.update(sample, high)
    assert mixture.weights[2] == 0.3
    mixture.update(32, {**high, "cc": 5.0, "book": 2.0})
    mixture.update(40, {**high, "cc": 5.0, "book": 2.0})
    assert mixture.weights[1] == 0.2 and mixture.weights[2] < 0.3
    mixture.update(48, {**REFERENCES, "github": 2.0})
    assert mixture.weights[1] > 0.2 and abs(sum(mixture.weights) - 1) < 1e-12


def test_an_update_appends_a_segment() -> None:
    mixture = make_mixture()
    losses = {"cc": 2.5, "github": 0.7, "book": 2.9}
    mixture.update(640, losses)
    expected = updated_weights((0.6, 0.3, 0.1), losses, REFERENCES, NAMES, "paper", 1.0, 1e-4)
    assert mixture.segments == (Segment(0, (0.6, 0.3, 0.1)), Segment(640, expected))
    assert mixture.weights == expected != (0.6, 0.3, 0.1)


def test_constant_weights_need_no_references_and_never_move() -> None:
    mixture = Mixture(NAMES, (0.6, 0.3, 0.1), {}, rule="constant")
    mixture.update(640, {"cc": math.nan})
    assert mixture.segments == (Segment(0, (0.6, 0.3, 0.1)),)


def test_the_state_survives_json_bit_for_bit() -> None:
    mixture = make_mixture()
    for step in range(1, 5):
        mixture.update(640 * step, {"cc": 3 - 0.17 * step, "github": 1.1 / step, "book": 2.3})
    loaded = make_mixture()
    loaded.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    assert loaded.segments == mixture.segments


def test_the_state_of_other_domains_is_refused() -> None:
    state = make_mixture().state_dict()
    other = Mixture(("cc", "book", "github"), (0.6, 0.3, 0.1), REFERENCES)
    with pytest.raises(CheckpointError, match="cc, github, book"):
        other.load_state_dict(state)
    assert other.weights == (0.6, 0.3, 0.1)


def test_a_mixture_follows_its_configuration() -> None:
    domains = (
        Domain("cc", "t", "v", 0.75, 1.9, max_weight=0.8),
        Domain("wiki", "t", "v", 0.25, min_weight=0.1),
    )
    config = DataConfig(rule="reference_code", eta=2.0, smoothing=0.01, domains=domains)
    mixture = Mixture.from_config(config)
    assert mixture.names == ("cc", "wiki") and mixture.weights == (0.75, 0.25)
    assert mixture.references == {"cc": 1.9}
    assert (mixture.rule, mixture.eta, mixture.smoothing) == ("reference_code", 2.0, 0.01)
    assert (mixture.lower, mixture.upper) == ((0.0, 0.1), (0.8, 1.0))
