"""Verdicts on simulated studies: a null is not found, a planted effect is.

benchmarks/verdict_error_rates.py simulates 200 studies of every scenario; here are fewer, and the
bounds allow for their number.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
from scipy import stats

FILE = Path(__file__).parents[3] / "benchmarks" / "verdict_error_rates.py"
STUDIES = 30


@pytest.fixture(scope="module")
def simulated():
    spec = importlib.util.spec_from_file_location("verdict_error_rates", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place", range(7))
def test_stated_error_rates_hold(simulated, place):
    scenario = simulated.SCENARIOS[place]
    found = simulated.rates(scenario, STUDIES)
    low, high = scenario.stated
    # A rate within the stated one is rejected in one of a thousand runs.
    most = stats.binom.ppf(0.999, STUDIES, high) / STUDIES
    least = stats.binom.ppf(0.001, STUDIES, low) / STUDIES
    assert least <= found.any <= most
    if low:
        assert found.planted >= least
