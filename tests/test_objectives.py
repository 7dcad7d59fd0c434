"""Objectives over users: the published one to the digit, the others by their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from palate.errors import DataError
from palate.models.objectives import RPO, CVaR, Mean, Objective, gradient_weights

LOSSES = st.lists(st.floats(0, 50, allow_nan=False), min_size=1, max_size=12).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def published_weights(losses: np.ndarray, rho: float, gamma: float) -> np.ndarray:
    """d/dL_i of sum_j s_j L_j with s_j = sigma((L_j - t) / gamma) and t the quantile, derived by hand.

    s_i + L_i s_i (1 - s_i) / gamma - dt/dL_i sum_j L_j s_j (1 - s_j) / gamma, where dt/dL_i is not zero for at most two users:
    those of ranks floor(h) and floor(h) + 1 at h = (B - 1)(1 - rho), with weights 1 - frac(h) and frac(h).
    """
    order, height = np.argsort(losses), (len(losses) - 1) * (1 - rho)
    low = int(np.floor(height))
    of_threshold = np.zeros(len(losses))
    of_threshold[order[low]] += 1 - (height - low)
    of_threshold[order[min(low + 1, len(losses) - 1)]] += height - low
    s = expit((losses - losses @ of_threshold) / gamma)
    steep = losses * s * (1 - s) / gamma
    return np.asarray(s + steep - of_threshold * steep.sum())


@pytest.mark.parametrize(
    ("n_users", "spread", "least", "most"),
    [
        *((2, 0.1, "0.45", "0.55"), (2, 0.5, "0.26", "0.74"), (2, 1.5, "-0.03", "1.03"), (2, 3.0, "-0.10", "1.10")),
        *((8, 0.1, "-0.54", "0.89"), (8, 0.5, "-0.54", "1.06"), (8, 1.5, "-0.40", "1.25"), (8, 3.0, "-0.21", "1.24")),
        *((64, 0.1, "-10.2", "0.89"), (64, 0.5, "-10.0", "1.06"), (64, 1.5, "-8.5", "1.25"), (64, 3.0, "-6.3", "1.25")),
    ],
)
def test_the_published_rpo_has_the_known_gradient_weights(n_users: int, spread: float, least: str, most: str) -> None:
    """Losses spread evenly around that of a coin, and never negative."""
    losses = np.linspace(0.69 - spread / 2, 0.69 + spread / 2, n_users).clip(0)
    found = gradient_weights(RPO(0.5, 0.5, published=True), torch.from_numpy(losses))
    np.testing.assert_allclose(found.numpy(), published_weights(losses, 0.5, 0.5), atol=1e-6)
    for figure, printed in ((found.min(), least), (found.max(), most)):
        assert f"{float(figure):.{len(printed.split('.')[1])}f}" == printed
    assert float(found.sum()) == pytest.approx({2: 1, 8: 4, 64: 32}[n_users], rel=0.07)


@given(LOSSES, st.floats(0.05, 1), st.floats(0.05, 5))
def test_the_derivation_above_holds_for_any_losses(losses: torch.Tensor, rho: float, gamma: float) -> None:
    found = gradient_weights(RPO(rho, gamma, published=True), losses).numpy()
    rows = losses.numpy()
    if len(rows) == 1 or np.diff(np.sort(rows)).min() > 1e-6:  # among equals, any may be the threshold
        np.testing.assert_allclose(found, published_weights(rows, rho, gamma), atol=1e-6 * (1 + rows.sum() / gamma))


def test_edges_of_the_published_objective() -> None:
    one = torch.tensor([0.7])
    assert gradient_weights(RPO(published=True), one).tolist() == [0.5]
    assert gradient_weights(RPO(gamma=0, published=True), one).tolist() == [0.0]
    easiest = gradient_weights(RPO(1.0, 0.0, published=True), torch.tensor([0.3, 0.1, 0.5]))
    assert easiest.tolist() == [1.0, 0.0, 1.0]
    equal = torch.ones(4)
    assert float(RPO(gamma=0, published=True)(equal)) == 0.0
    assert [float(RPO(published=True)(torch.ones(n))) for n in (4, 8, 64)] == [2.0, 4.0, 32.0]


OBJECTIVES = [Mean(), RPO(), RPO(0.2, 0.1), RPO(0.5, 0.0), RPO(1.0, 3.0), RPO(0.3, 1e-9), CVaR(0.1), CVaR(), CVaR(1.0)]


@given(LOSSES, st.sampled_from(OBJECTIVES))
def test_nobody_is_unlearned_and_the_weights_are_a_distribution(losses: torch.Tensor, objective: Objective) -> None:
    weight = gradient_weights(objective, losses)
    assert float(weight.min()) >= 0
    assert float(weight.sum()) == pytest.approx(1, abs=1e-9)
    assert float(objective(losses)) == pytest.approx(float((weight * losses).sum()), abs=1e-9)
    assert losses.min() - 1e-9 <= float(objective(losses)) <= losses.max() + 1e-9
    order = torch.argsort(losses, stable=True)
    worse = losses[order].diff() > 1e-9
    assert bool((weight[order].diff()[worse] >= -1e-9).all())  # the worse off, the more; of equals, any


@given(LOSSES)
def test_limits(losses: torch.Tensor) -> None:
    mean, largest = losses.mean(), losses.max()
    for smooth in (RPO(0.5, 1e12), RPO(0.5, float("inf")), CVaR(1.0)):
        torch.testing.assert_close(smooth(losses), mean)
        torch.testing.assert_close(gradient_weights(smooth, losses), torch.full_like(losses, 1 / len(losses)))
    torch.testing.assert_close(CVaR(1 / len(losses))(losses), largest)
    for objective in OBJECTIVES:
        torch.testing.assert_close(objective(losses[:1]), losses[0])  # one user: the plain loss
        torch.testing.assert_close(objective(torch.full((5,), 0.7)), torch.tensor(0.7))  # equal users: theirs


def test_numbers_by_hand() -> None:
    losses = torch.tensor([3.0, 1.0, 2.0, 10.0, 4.0])
    assert float(CVaR(0.4)(losses)) == pytest.approx(7.0)
    assert float(CVaR(0.5)(losses)) == pytest.approx((10 + 4 + 0.5 * 3) / 2.5)  # half of the third counts
    assert float(RPO(0.5, 0.0)(losses)) == pytest.approx(17 / 3)  # the median and above
    threshold, gamma = 3.0, 2.0
    share = np.array([1 / (1 + np.exp(-(loss - threshold) / gamma)) for loss in losses.tolist()])
    assert float(RPO(0.5, gamma)(losses)) == pytest.approx(float(share @ losses.numpy() / share.sum()))


@pytest.mark.parametrize("rho", [0.0, -0.5, 1.5, float("nan")])
def test_shares_outside_their_range_are_refused(rho: float) -> None:
    with pytest.raises(DataError, match=f"rho is {rho}; expected a share of users above 0"):
        RPO(rho)
    with pytest.raises(DataError, match=f"q is {rho}; expected a share of users above 0"):
        CVaR(rho)


@pytest.mark.parametrize("objective", [Mean(), RPO(), CVaR()])
def test_what_is_no_loss_of_users_is_refused(objective: Objective) -> None:
    with pytest.raises(DataError, match=r"losses have shape \(0,\); expected \(B,\) with at least one user"):
        objective(torch.zeros(0))
    with pytest.raises(DataError, match=r"losses have shape \(2, 3\)"):
        objective(torch.zeros(2, 3))
    with pytest.raises(DataError, match="gamma is NaN"):
        RPO(gamma=float("nan"))
