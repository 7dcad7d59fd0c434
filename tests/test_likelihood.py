"""The one log-sigmoid: values by hand and from scipy, derivatives by finite differences, and what must hold at any margin."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import expit, log_expit

from palate import likelihood

MARGINS = torch.tensor([-800.0, -30.0, -3.5, -0.2, 0.0, 1.0, 2.5, 40.0, 900.0], dtype=torch.float64)


def test_nll_by_hand_and_by_scipy() -> None:
    assert float(likelihood.nll(torch.tensor(0.0))) == pytest.approx(math.log(2))
    assert float(likelihood.nll(torch.tensor(math.log(3.0)))) == pytest.approx(math.log(4 / 3), rel=1e-6)  # sigma(log 3) = 3/4
    np.testing.assert_allclose(likelihood.nll(MARGINS), -log_expit(MARGINS.numpy()), rtol=1e-12)
    np.testing.assert_allclose(likelihood.probability(MARGINS), expit(MARGINS.numpy()), rtol=1e-12)


def test_a_tie_is_the_mean_of_both_orders() -> None:
    tie = torch.tensor([True, False] * 4 + [True])
    mixed = likelihood.nll(MARGINS, tie)
    both = (likelihood.nll(MARGINS) + likelihood.nll(-MARGINS)) / 2
    torch.testing.assert_close(mixed, torch.where(tie, both, likelihood.nll(MARGINS)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tied", [None, torch.tensor([True, False, False, True, True, False, True])])
def test_derivatives_against_finite_differences(tied: torch.Tensor | None) -> None:
    m, h = torch.linspace(-6, 5, 7, dtype=torch.float64), 1e-5
    slope = (likelihood.nll(m + h, tied) - likelihood.nll(m - h, tied)) / (2 * h)
    bend = (likelihood.gradient(m + h, tied) - likelihood.gradient(m - h, tied)) / (2 * h)
    torch.testing.assert_close(likelihood.gradient(m, tied), slope, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(likelihood.curvature(m), bend, rtol=1e-7, atol=1e-9)


@given(st.floats(-1e30, 1e30), st.booleans())
def test_finite_at_any_margin(margin: float, tied: bool) -> None:
    m, tie = torch.tensor(margin), torch.tensor(tied)
    for value in (likelihood.nll(m, tie), likelihood.gradient(m, tie), likelihood.curvature(m), likelihood.probability(m)):
        assert bool(torch.isfinite(value))
    assert float(likelihood.nll(m, tie)) >= 0
    assert 0 <= float(likelihood.curvature(m)) <= 0.25 + 1e-7
    assert float(likelihood.probability(m) + likelihood.probability(-m)) == pytest.approx(1)


@given(st.floats(-8, 8), st.floats(0, 30))
def test_expected_probability_against_the_integral(mean: float, variance: float) -> None:
    def integrand(x: float) -> float:
        return float(expit(mean + math.sqrt(variance) * x)) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    exact = quad(integrand, -9, 9, limit=200)[0]
    found = float(likelihood.expected_probability(torch.tensor(mean), torch.tensor(variance)))
    assert found == pytest.approx(exact, abs=0.02)
    plain = float(expit(mean))
    assert min(plain, 0.5) - 1e-6 <= found <= max(plain, 0.5) + 1e-6


def test_damped_by_hand() -> None:
    assert float(likelihood.damped(torch.tensor(3.0), torch.tensor(8 / math.pi * 3))) == pytest.approx(1.5)  # sqrt(1 + 3) = 2
    assert float(likelihood.damped(torch.tensor(-2.0), torch.tensor(0.0))) == -2.0
