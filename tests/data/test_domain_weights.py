"""Domain weights: the rules against the paper's figures and numpy, and what they refuse."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megashear.config.schema import DataConfig, Domain
from megashear.data.domain_weights import DomainWeights, Segment, updated_weights, within_bounds
from megashear.errors import CheckpointError, DataError

NAMES = ("cc", "github", "book")
REFERENCES = {"cc": 1.9643, "github": 0.7459, "book": 2.1393}


def make_domain_weights(rule: str = "paper") -> DomainWeights:
    return DomainWeights(NAMES, (0.6, 0.3, 0.1), REFERENCES, rule=rule)


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
    domain_weights = make_domain_weights(rule)
    del domain_weights.references["book"]
    with pytest.raises(DataError) as raised:
        domain_weights.update(640, {"cc": math.nan, "github": math.inf})
    message = str(raised.value)
    assert "cc: validation loss is nan" in message
    assert "github: validation loss is inf" in message
    assert "book: validation loss is missing" in message
    assert "book: reference loss is missing" in message
    assert domain_weights.segments == (Segment(0, (0.6, 0.3, 0.1)),)


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
    domain_weights = DomainWeights(NAMES, (0.6, 0.3, 0.1), REFERENCES, bounds=bounds)
    high = {"cc": 1.9643, "github": 0.7459, "book": 4.1393}
    for sample in (8, 16, 24):
        domain_weights.update(sample, high)
    assert domain_weights.weights[2] == 0.3
    domain_weights.update(32, {**high, "cc": 5.0, "book": 2.0})
    domain_weights.update(40, {**high, "cc": 5.0, "book": 2.0})
    assert domain_weights.weights[1] == 0.2 and domain_weights.weights[2] < 0.3
    domain_weights.update(48, {**REFERENCES, "github": 2.0})
    assert domain_weights.weights[1] > 0.2 and abs(sum(domain_weights.weights) - 1) < 1e-12


def test_an_update_appends_a_segment() -> None:
    domain_weights = make_domain_weights()
    losses = {"cc": 2.5, "github": 0.7, "book": 2.9}
    domain_weights.update(640, losses)
    expected = updated_weights((0.6, 0.3, 0.1), losses, REFERENCES, NAMES, "paper", 1.0, 1e-4)
    assert domain_weights.segments == (Segment(0, (0.6, 0.3, 0.1)), Segment(640, expected))
    assert domain_weights.weights == expected != (0.6, 0.3, 0.1)


def test_constant_weights_need_no_references_and_never_move() -> None:
    domain_weights = DomainWeights(NAMES, (0.6, 0.3, 0.1), {}, rule="constant")
    domain_weights.update(640, {"cc": math.nan})
    assert domain_weights.segments == (Segment(0, (0.6, 0.3, 0.1)),)


def test_the_state_survives_json_bit_for_bit() -> None:
    domain_weights = make_domain_weights()
    for step in range(1, 5):
        domain_weights.update(
            640 * step, {"cc": 3 - 0.17 * step, "github": 1.1 / step, "book": 2.3}
        )
    loaded = make_domain_weights()
    loaded.load_state_dict(json.loads(json.dumps(domain_weights.state_dict())))
    assert loaded.segments == domain_weights.segments


def test_the_state_of_other_domains_is_refused() -> None:
    state = make_domain_weights().state_dict()
    other = DomainWeights(("cc", "book", "github"), (0.6, 0.3, 0.1), REFERENCES)
    with pytest.raises(CheckpointError, match="cc, github, book"):
        other.load_state_dict(state)
    assert other.weights == (0.6, 0.3, 0.1)


def test_a_mixture_follows_its_configuration() -> None:
    domains = (
        Domain("cc", "t", "v", 0.75, 1.9, max_weight=0.8),
        Domain("wiki", "t", "v", 0.25, min_weight=0.1),
    )
    config = DataConfig(rule="reference_code", eta=2.0, smoothing=0.01, domains=domains)
    domain_weights = DomainWeights.from_config(config)
    assert domain_weights.names == ("cc", "wiki") and domain_weights.weights == (0.75, 0.25)
    assert domain_weights.references == {"cc": 1.9}
    assert (domain_weights.rule, domain_weights.eta, domain_weights.smoothing) == (
        "reference_code",
        2.0,
        0.01,
    )
    assert (domain_weights.lower, domain_weights.upper) == ((0.0, 0.1), (0.8, 1.0))
