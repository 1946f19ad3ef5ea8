"""Power laws, against SciPy and exact curves; over-scaling by the paper's formula."""

import numpy as np
import pytest
from scipy import optimize

from evaluation.statistics import power_laws

SIZES = np.array([1e6, 4e6, 2e7, 8e7])


def curves(exponent, *pairs):
    return np.array([floor + scale * SIZES**-exponent for floor, scale in pairs])


def test_exact_curves_are_found_again():
    losses = curves(0.3, (2.0, 90.0), (1.5, 120.0), (0.0, 200.0))
    fit = power_laws.fit_power_laws(SIZES, losses)
    assert float(fit.exponent) == pytest.approx(0.3, rel=1e-2)
    larger = 1e9
    truth = [2 + 90 * larger**-0.3, 1.5 + 120 * larger**-0.3, 200 * larger**-0.3]
    assert fit.at(larger) == pytest.approx(np.array(truth), abs=5e-3)
    assert float(fit.size_of(fit.at(3e7)[0], curve=0)) == pytest.approx(3e7, rel=1e-6)


def test_against_scipy_on_noisy_curves():
    rng = np.random.default_rng(0)
    losses = curves(0.4, (2.0, 500.0), (1.0, 900.0)) + rng.normal(0, 0.01, (2, 4))

    def residuals(parameters):
        exponent, floors, scales = parameters[0], parameters[1:3], parameters[3:]
        made = floors[:, None] + np.exp(scales)[:, None] * (SIZES / 1e7) ** -exponent
        return (made - losses).ravel()

    start = np.array([0.5, 1.0, 1.0, 0.0, 0.0])
    expected = optimize.least_squares(residuals, start, xtol=1e-14, ftol=1e-14)
    fit = power_laws.fit_power_laws(SIZES, losses)
    made = np.stack([fit.at(size) for size in SIZES], axis=1)
    assert ((made - losses) ** 2).sum() <= 2 * expected.cost * (1 + 1e-4)
    assert float(fit.exponent) == pytest.approx(expected.x[0], rel=2e-2)


def test_draws_are_fitted_one_by_one():
    rng = np.random.default_rng(1)
    draws = curves(0.3, (2.0, 90.0), (1.5, 120.0)) + rng.normal(0, 0.02, (50, 2, 4))
    together = power_laws.fit_power_laws(SIZES, draws)
    alone = power_laws.fit_power_laws(SIZES, draws[17])
    assert together.at(1e9)[17] == pytest.approx(alone.at(1e9), rel=1e-12)
    assert (together.floor >= 0).all() and (together.scale >= 0).all()


def test_a_missing_point_leaves_the_others():
    losses = curves(0.3, (2.0, 90.0), (1.5, 120.0))
    losses[1, 3] = np.nan
    fit = power_laws.fit_power_laws(SIZES, losses)
    assert fit.at(8e7)[1] == pytest.approx(1.5 + 120 * 8e7**-0.3, abs=5e-3)


def test_a_loss_below_the_floor_has_no_size():
    fit = power_laws.fit_power_laws(SIZES, curves(0.3, (2.0, 90.0)))
    assert np.isinf(fit.size_of(np.array(1.0)))


def test_two_sizes_have_no_floor_and_one_is_refused():
    losses = 50 * SIZES[:2] ** -0.2
    fit = power_laws.fit_power_laws(SIZES[:2], losses[None])
    assert fit.floor == 0 and float(fit.exponent) == pytest.approx(0.2, rel=1e-2)
    with pytest.raises(ValueError, match="at least two"):
        power_laws.fit_power_laws(SIZES[:1], losses[None, :1])


def test_over_scaling():
    # Halfway to the next size on one metric, and past it on the other.
    found = power_laws.over_scaling(
        np.array([3.5, 1.8]), np.array([4.0, 2.0]), np.array([3.0, 1.9])
    )
    assert found == pytest.approx((50 + 200) / 2)
    full, larger = np.array([4.0]), np.array([3.0])
    assert power_laws.over_scaling(full, full, larger) == 0
    assert power_laws.over_scaling(larger, full, larger) == 100
    # Qualities, where more is better, work alike: the paper has both.
    assert power_laws.over_scaling(np.array([82.0]), np.array([80.0]), np.array([84.0])) == 50


def test_winners():
    losses = np.array([[1, 2, 3], [2, 1, 3], [1, 3, 2], [1, 5, 5]])
    assert power_laws.winners(losses).tolist() == [0.75, 0.25, 0.0]
