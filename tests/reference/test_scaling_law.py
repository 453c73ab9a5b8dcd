"""Scaling laws against the paper's table, laws known in advance, and a search by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megashear.errors import DataError
from megashear.pruning.counting import parameter_count
from megashear.reference.scaling_law import EXPONENTS, fit, fit_domains
from tests.support.published import LOSSES, PARAMETERS, REFERENCES

MODELS = [PARAMETERS[name][1] for name in ("7B", "13B", "70B")]


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_have_the_published_parameters(name: str) -> None:
    shape, count = PARAMETERS[name]
    assert parameter_count(shape) == count


@pytest.mark.parametrize("name", REFERENCES)
def test_the_papers_references_follow_from_its_losses(name: str) -> None:
    """All of the table to its 4 decimals; of all domains only cc has a negative E."""
    fits = fit_domains(MODELS, LOSSES)
    found = {domain: round(law.loss(PARAMETERS[name][1]), 4) for domain, law in fits.items()}
    assert found == REFERENCES[name]
    assert {domain for domain, law in fits.items() if law.flag} == {"cc"}
    assert fits["cc"].flag.startswith("unphysical: E = -2.8 is negative")
    assert max(abs(r) for law in fits.values() for r in law.residuals) < 1e-12


LAW = {
    "limit": st.floats(0.1, 3.0),
    "A_at_1e9": st.floats(0.05, 3.0),
    "b": st.floats(0.02, 1.0),
    "smallest": st.floats(1e7, 1e10),
    "steps": st.lists(st.floats(1.5, 8.0), min_size=2, max_size=6),
}


@settings(max_examples=60, deadline=None)
@given(**LAW)
def test_a_law_is_found_again(
    limit: float, A_at_1e9: float, b: float, smallest: float, steps: list[float]
) -> None:
    sizes = smallest * np.cumprod([1.0, *steps])
    law = fit(sizes.tolist(), (limit + A_at_1e9 * (sizes / 1e9) ** -b).tolist())
    fallen = A_at_1e9 * ((sizes[0] / 1e9) ** -b - (sizes[-1] / 1e9) ** -b)
    for parameters in (sizes[0] / 5, sizes[1], 3 * sizes[-1]):
        expected = limit + A_at_1e9 * (parameters / 1e9) ** -b
        assert law.loss(parameters) == pytest.approx(expected, abs=1e-6 * max(fallen, 1e-3))
    assert max(map(abs, law.residuals)) < 1e-9
    if fallen > 0.01:
        assert law.b == pytest.approx(b, rel=1e-4)
        assert abs(law.E - limit) < 1e-4
        assert law.flag == ""


def squared_residuals(sizes: np.ndarray, losses: np.ndarray, b: float) -> float:
    """Of the best E and A for an exponent, by numpy's own regression."""
    columns = np.stack([np.ones_like(sizes), (sizes / sizes.mean()) ** -b], axis=1)
    best = np.linalg.lstsq(columns, losses, rcond=None)[0]
    return float(((losses - columns @ best) ** 2).sum())


@pytest.mark.parametrize("seed", range(6))
def test_of_more_points_no_other_exponent_fits_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.sort(10 ** rng.uniform(8, 11, 7))
    losses = 1.2 + 0.8 * (sizes / 1e9) ** -0.3 + rng.normal(0, 0.01, 7)
    law = fit(sizes.tolist(), losses.tolist())
    found = sum(residual**2 for residual in law.residuals)
    assert found > 1e-5
    grid = np.geomspace(*EXPONENTS, 4000)
    assert found <= min(squared_residuals(sizes, losses, b) for b in grid) * (1 + 1e-9)
    assert found == pytest.approx(squared_residuals(sizes, losses, law.b), rel=1e-6)


def test_a_loss_that_falls_faster_than_log_n_is_flagged_and_still_followed() -> None:
    sizes = [1e9, 4e9, 16e9]
    law = fit(sizes, [2.0, 1.8, 1.5])
    assert "by log N or faster" in law.flag and law.b == pytest.approx(EXPONENTS[0], rel=1e-3)
    assert law.loss(0.25e9) == pytest.approx(2.0 + 0.25, abs=0.04)  # the line in log N
    straight = fit(sizes, [2.0, 1.8, 1.6])
    assert straight.loss(0.25e9) == pytest.approx(2.2, abs=1e-3)


def test_an_exponent_that_the_points_do_not_tell_is_flagged() -> None:
    assert "b is not identifiable" in fit([1e9, 4e9, 16e9], [2.0, 1.5, 1.5]).flag


def test_losses_that_no_law_fits_are_flagged() -> None:
    sizes = [16e9, 1e9, 4e9]
    assert fit(sizes, [1.79, 2.0, 1.8]).flag == ""
    rising = fit(sizes, [1.81, 2.0, 1.8]).flag
    assert rising.startswith("does not fit: the loss rises from 4,000,000,000.0 to 16,000,000,000")
    assert "residuals" not in rising
    law = fit([1e9, 2e9, 4e9, 8e9], [2.0, 1.9, 1.7, 1.69])
    assert law.flag == f"does not fit: residuals of up to {law.misfit:.3f}" and law.misfit > 0.02


def test_too_few_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="2 sizes of models are fewer than the 3 parameters"):
        fit_domains([1e9, 4e9, 4e9], {"cc": [2.0, 1.5, 1.6]})


def test_losses_that_do_not_fall_are_refused_by_name() -> None:
    losses = {"cc": [2.0, 1.8, 1.7], "wiki": [1.0, 1.1, 1.2], "c4": [2.0, 2.0, 2.0]}
    with pytest.raises(DataError) as refused:
        fit_domains([1e9, 4e9, 16e9], losses)
    lines = str(refused.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["wiki", "c4"]
