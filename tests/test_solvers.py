"""The batched solvers against scipy, finite differences and quadrature, one user at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import dblquad, quad
from scipy.optimize import approx_fprime, minimize
from scipy.special import log_expit
from torch import Tensor

from palate import likelihood
from palate.priors import Prior
from palate.solvers import Batch, Laplace, adam_on_logits, batches, newton, posterior, simplex

Floats = NDArray[np.float64]


def some_batch(counts: list[int], k: int, *, seed: int = 0, size: float = 1.0, dtype: torch.dtype = torch.float64) -> Batch:
    """Users with these many pairs, offsets, ties and weights of all sizes, padded with garbage of weight 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(counts), max(*counts, 1))
    slopes = torch.randn(*shape, k, generator=generator, dtype=dtype) * size
    offset = torch.randn(shape, generator=generator, dtype=dtype)
    weight = torch.rand(shape, generator=generator, dtype=dtype) * 2 + 0.1
    tie = torch.rand(shape, generator=generator) < 0.2
    real = torch.arange(shape[1]) < torch.tensor(counts)[:, None]
    return Batch(slopes, offset, weight * real, tie)


def user_loss(batch: Batch, user: int, w: Floats) -> float:
    """Weighted negative log-likelihood of one user, written again in numpy."""
    slopes, offset, weight = (x[user].double().numpy() for x in batch[:3])
    margin = offset + slopes @ w
    tie = np.zeros(len(margin), dtype=bool) if batch.tie is None else batch.tie[user].numpy()
    loss = np.where(tie, -(log_expit(margin) + log_expit(-margin)) / 2, -log_expit(margin))
    return float(weight @ loss)


def log_prior(prior: Prior, w: Floats) -> float:
    parts = []
    for share, mean, factor in zip(prior.share.numpy(), prior.means.numpy(), prior.factors.numpy(), strict=True):
        u = np.linalg.solve(factor, w - mean)
        log_det = np.log(np.diagonal(factor)).sum()
        parts.append(math.log(share) - u @ u / 2 - log_det - len(w) / 2 * math.log(2 * math.pi))
    return float(np.logaddexp.reduce(parts))


def gaussian(k: int, seed: int = 1) -> Prior:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(k, k, generator=generator, dtype=torch.float64)
    return Prior.gaussian(root @ root.T / k + 0.3 * torch.eye(k), torch.randn(k, generator=generator, dtype=torch.float64))


# -- newton and the posterior


def test_mode_covariance_and_convergence_against_scipy() -> None:
    batch, prior = some_batch([0, 1, 2, 7, 15], 3), gaussian(3)
    solved = posterior(batch, prior)
    assert solved.covariance is not None
    assert bool(solved.converged.all())
    for user in range(5):

        def objective(w: Floats, user: int = user) -> float:
            return user_loss(batch, user, w) - log_prior(prior, w)

        mode = minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
        np.testing.assert_allclose(solved.mean[user], mode, atol=1e-5)
        hessian = approx_fprime(mode, lambda w, f=objective: approx_fprime(w, f, 1e-5), 1e-4)
        np.testing.assert_allclose(solved.covariance[user], np.linalg.inv(hessian), rtol=1e-2, atol=1e-3)


def test_covariance_to_precision_against_the_exact_hessian() -> None:
    batch, prior = some_batch([1, 4, 9], 2, seed=4), gaussian(2, seed=2)
    solved = posterior(batch, prior)
    assert solved.covariance is not None
    for user, w in enumerate(solved.mean):
        margin = batch.margins(solved.mean)[user]
        slopes = batch.slopes[user].numpy()
        sigma = 1 / (1 + np.exp(-margin.numpy()))
        hessian = slopes.T @ (slopes * (batch.weight[user].numpy() * sigma * (1 - sigma))[:, None])
        hessian += np.linalg.inv(prior.covariance.numpy())
        np.testing.assert_allclose(solved.covariance[user], np.linalg.inv(hessian), rtol=1e-9)
        assert torch.isfinite(w).all()


def test_zero_pairs_give_the_prior() -> None:
    prior = gaussian(4)
    solved = posterior(some_batch([0, 0], 4), prior)
    assert solved.covariance is not None
    torch.testing.assert_close(solved.mean, prior.mean.expand(2, -1))
    torch.testing.assert_close(solved.covariance, prior.covariance.expand(2, -1, -1))
    assert solved.log_evidence is not None
    torch.testing.assert_close(solved.log_evidence, torch.zeros(2, dtype=torch.float64))


def test_log_evidence_against_quadrature_in_one_dimension() -> None:
    batch, prior = some_batch([0, 3, 8, 40], 1), gaussian(1)
    found = posterior(batch, prior).log_evidence
    assert found is not None
    for user in range(4):
        exact = quad(lambda w, u=user: math.exp(log_prior(prior, np.array([w])) - user_loss(batch, u, np.array([w]))), -9, 9)[0]
        assert float(found[user]) == pytest.approx(math.log(exact), abs=0.03)  # Laplace's own error is of this size


def test_log_evidence_against_quadrature_in_two_dimensions() -> None:
    batch, prior = some_batch([2, 12], 2, seed=3), gaussian(2)
    found = posterior(batch, prior).log_evidence
    assert found is not None
    for user in range(2):

        def density(a: float, b: float, user: int = user) -> float:
            w = np.array([a, b])
            return math.exp(log_prior(prior, w) - user_loss(batch, user, w))

        exact = dblquad(density, -8, 8, -8, 8, epsabs=1e-6, epsrel=1e-4)[0]
        assert float(found[user]) == pytest.approx(math.log(exact), abs=0.06)


def test_mixture_posterior_against_quadrature() -> None:
    means, factors = torch.tensor([[-2.0], [1.5]]).double(), torch.tensor([[[0.5]], [[0.4]]]).double()
    prior = Prior(torch.tensor([0.7, 0.3], dtype=torch.float64), means, factors)
    batch = some_batch([0, 1, 3, 10], 1, seed=6)
    solved = posterior(batch, prior)
    assert solved.covariance is not None
    assert solved.log_evidence is not None
    grid = np.linspace(-6, 6, 4001)
    for user in range(4):
        log = np.array([log_prior(prior, np.array([w])) - user_loss(batch, user, np.array([w])) for w in grid])
        density = np.exp(log)
        mass = np.trapezoid(density, grid)
        mean = np.trapezoid(density * grid, grid) / mass
        variance = np.trapezoid(density * (grid - mean) ** 2, grid) / mass
        assert float(solved.mean[user, 0]) == pytest.approx(mean, abs=0.03)
        assert float(solved.covariance[user, 0, 0]) == pytest.approx(variance, abs=0.03)
        assert float(solved.log_evidence[user]) == pytest.approx(math.log(mass), abs=0.03)


def test_a_mixture_of_equal_components_is_the_component() -> None:
    batch, one = some_batch([0, 2, 6], 3), gaussian(3)
    twice = Prior(torch.tensor([0.3, 0.7], dtype=torch.float64), one.means.expand(2, -1), one.factors.expand(2, -1, -1))
    for a, b in zip(posterior(batch, one)[:3], posterior(batch, twice)[:3], strict=True):
        torch.testing.assert_close(a, b)


def test_walls_are_choices_that_everybody_made() -> None:
    batch, walls = some_batch([6, 1, 0], 3), torch.tensor([[3.0, 0.0, 0.0], [0.0, -2.0, 5.0]], dtype=torch.float64)
    plain = gaussian(3)
    found = posterior(batch, Prior(plain.share, plain.means, plain.factors, walls))
    for user in range(3):

        def objective(w: Floats, user: int = user) -> float:
            return user_loss(batch, user, w) - log_prior(plain, w) - float(log_expit(walls.numpy() @ w).sum())

        solved = minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(found.mean[user], solved.x, atol=1e-5)
    assert found.covariance is not None
    assert bool(found.converged.all())
    assert float(found.covariance[2].diagonal().sum()) < float(plain.covariance.diagonal().sum())


def test_the_posterior_of_a_blend_is_bounded_by_its_walls() -> None:
    k = 4
    batch = some_batch([0, 1, 5], k, size=0.3)._replace(tie=None)
    prior = Prior.blend(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))
    found = posterior(batch, prior)
    assert found.covariance is not None
    for user in range(3):
        w, margin = found.mean[user], (batch.slopes[user] @ found.mean[user] + batch.offset[user])
        curved = torch.sigmoid(margin) * torch.sigmoid(-margin) * batch.weight[user]
        precision = torch.linalg.inv(prior.factors[0] @ prior.factors[0].T) + batch.slopes[user].T @ (
            curved[:, None] * batch.slopes[user]
        )
        barrier = torch.diag(1 / w.clamp(min=1e-3) ** 2)  # of -log w; a wall's slope is 1,000
        torch.testing.assert_close(found.covariance[user], torch.linalg.inv(precision + barrier), atol=1e-9, rtol=1e-3)
    torch.testing.assert_close(found.covariance[0], prior.covariance, atol=2e-3, rtol=0.1)  # of a user without choices


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("pairs", "size"), [(9, 1.0), (45, 2.0), (3, 5.0)])
def test_a_blend_is_the_likelihood_on_the_simplex(pairs: int, size: float, dtype: torch.dtype) -> None:
    k = 6
    batch = some_batch([pairs] * 20, k, seed=pairs, size=size, dtype=dtype)._replace(tie=None)
    batch = batch._replace(offset=torch.zeros_like(batch.offset), weight=torch.ones_like(batch.weight))
    found = posterior(batch, Prior.blend(torch.full((k,), 1 / k, dtype=dtype)))
    exact = simplex(batch)
    assert bool(found.converged.all())
    assert float(found.mean.min()) > 0
    assert float((found.mean.sum(1) - 1).abs().max()) < 0.03
    # Where the likelihood is flat the two may stand apart: what counts is how well they fit.
    assert float(((batch.loss(found.mean) - batch.loss(exact.mean)) / pairs).max()) < 0.05
    if pairs == 45:
        assert float((found.mean - exact.mean).abs().max()) < 0.05


def test_without_covariance_nothing_else_changes() -> None:
    batch, prior = some_batch([1, 5], 2), gaussian(2)
    bare = posterior(batch, prior, covariance=False)
    assert bare.covariance is None
    torch.testing.assert_close(bare.mean, posterior(batch, prior).mean)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
    st.integers(1, 5),
    st.sampled_from([1e-3, 1.0, 30.0, 1e3, 1e5]),
    st.sampled_from([0.0, 1.0, 1e2, 1e4]),
    st.integers(0, 1000),
)
def test_newton_converges_for_any_slopes_and_offsets(counts: list[int], k: int, size: float, away: float, seed: int) -> None:
    batch = some_batch(counts, k, seed=seed, size=size)
    batch = batch._replace(offset=batch.offset * away)
    mode, value, converged = newton(batch)
    assert bool(converged.all())
    torch.testing.assert_close(value, batch.loss(mode) + mode.square().sum(1) / 2)
    # No point nearby is better by more than the tolerance allows, whatever the scale.
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        other = mode + torch.randn(mode.shape, generator=generator, dtype=mode.dtype) * 10 ** (
            4 * torch.rand(1, generator=generator) - 3
        )
        assert bool((value <= batch.loss(other) + other.square().sum(1) / 2 + 1e-9 * value.abs()).all())
    if size <= 30:  # the Hessian is at least the identity, so a gradient this small is a distance this small
        slope = likelihood.gradient(batch.margins(mode), batch.tie) * batch.weight
        pull = torch.bmm(batch.slopes.mT, slope[..., None])[..., 0] + mode
        assert float(pull.norm(dim=1).max()) < 1e-4


@settings(max_examples=30)
@given(st.sampled_from([1e-3, 1.0, 30.0, 1e3]), st.sampled_from([0.0, 1.0, 1e2, 1e4]), st.integers(0, 1000))
def test_newton_converges_in_single_precision(size: float, away: float, seed: int) -> None:
    batch = some_batch([3, 0, 6, 1], 4, seed=seed, size=size, dtype=torch.float32)
    mode, value, converged = newton(batch._replace(offset=batch.offset * away))
    assert bool(converged.all())
    assert bool(torch.isfinite(mode).all())
    assert bool(torch.isfinite(value).all())


def test_newton_survives_slopes_at_which_the_identity_drowns_in_rounding() -> None:
    for seed in range(5):
        mode, value, _ = newton(some_batch([3, 0, 6, 1], 4, seed=seed, size=1e5, dtype=torch.float32))
        assert bool(torch.isfinite(mode).all())
        assert bool(torch.isfinite(value).all())


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(5, 8), st.integers(0, 100))
def test_the_path_over_pairs_equals_the_path_over_weights(pairs: int, k: int, seed: int) -> None:
    few = some_batch([pairs, max(pairs - 1, 0)], k, seed=seed, size=2.0)
    extra = torch.zeros(2, k)
    more = Batch(
        torch.cat([few.slopes, torch.ones(2, k, k, dtype=torch.float64)], dim=1),
        torch.cat([few.offset, extra.double()], dim=1),
        torch.cat([few.weight, extra.double()], dim=1),
        None if few.tie is None else torch.cat([few.tie, extra.bool()], dim=1),
    )
    for a, b in zip(newton(few), newton(more), strict=True):
        torch.testing.assert_close(a, b)
    mode = newton(few)[0]
    left, right = Laplace.at(few, mode), Laplace.at(more, mode)
    assert left.complement
    assert not right.complement
    torch.testing.assert_close(left.covariance(), right.covariance())
    torch.testing.assert_close(left.log_det, right.log_det)
    share = torch.tensor([0.25, 2.0], dtype=torch.float64)
    for curved in (left, right):
        torch.testing.assert_close(curved.total(share), torch.einsum("u,uij->ij", share, curved.covariance()))


def test_newton_says_when_it_has_not_converged_and_takes_a_start() -> None:
    batch = some_batch([6, 6], 3, size=5.0)
    mode, _, converged = newton(batch, max_steps=1)
    assert not bool(converged.any())
    best, _, converged = newton(batch, start=mode)
    assert bool(converged.all())
    torch.testing.assert_close(best, newton(batch)[0], atol=1e-5, rtol=1e-5)


# -- the simplex


def average_loss(batch: Batch, user: int, w: Floats) -> float:
    return user_loss(batch, user, w) / float(batch.weight[user].sum())


def simplex_gap(batch: Batch, w: Tensor) -> Tensor:
    """Duality gap w.g - min g of each user, zero exactly at an optimum (Karush-Kuhn-Tucker on the simplex)."""
    share = batch.weight / batch.weight.sum(1, keepdim=True)
    slope = likelihood.gradient(batch.margins(w), batch.tie) * share
    g = torch.bmm(batch.slopes.mT, slope[..., None])[..., 0]
    return (w * g).sum(1) - g.amin(1)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_simplex_against_sequential_quadratic_programming(k: int) -> None:
    """Acceptance 9: |dw| < 1e-4 of every user's own convex solution."""
    batch = some_batch([20, 35, 12], k, seed=k)
    solved = simplex(batch)
    assert bool(solved.converged.all())
    assert solved.covariance is None
    for user in range(3):
        start = np.full(k, 1 / k)
        found = minimize(
            lambda w, u=user: average_loss(batch, u, w),
            start,
            method="SLSQP",
            bounds=[(0, 1)] * k,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert float(np.abs(solved.mean[user].numpy() - found.x).max()) < 1e-4


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 8), min_size=2, max_size=5),
    st.integers(2, 8),
    st.sampled_from([0.01, 1.0, 10.0, 200.0]),
    st.integers(0, 1000),
)
def test_simplex_satisfies_the_optimality_conditions(counts: list[int], k: int, size: float, seed: int) -> None:
    batch = some_batch(counts, k, seed=seed, size=size)
    solved = simplex(batch)
    assert bool(solved.converged.all())
    torch.testing.assert_close(solved.mean.sum(1), torch.ones(len(counts), dtype=torch.float64))
    assert float(solved.mean.min()) >= 0
    assert float(simplex_gap(batch, solved.mean).max()) < 1e-6 * max(1.0, size)


def test_simplex_with_one_weight_and_without_pairs() -> None:
    assert simplex(some_batch([3, 0], 1)).mean.tolist() == [[1.0], [1.0]]
    solved = simplex(some_batch([0, 2], 4))
    torch.testing.assert_close(solved.mean[0], torch.full((4,), 0.25, dtype=torch.float64))
    assert bool(solved.converged.all())


def test_simplex_of_ties_alone_and_of_equal_bases_is_the_middle() -> None:
    batch = some_batch([4], 3)
    same = batch._replace(slopes=batch.slopes[..., :1].expand(-1, -1, 3))
    torch.testing.assert_close(simplex(same).mean, torch.full((1, 3), 1 / 3, dtype=torch.float64), atol=1e-6, rtol=0)
    slopes = torch.tensor([[[2.0, -2.0], [-2.0, 2.0]]]).double()
    tied = Batch(slopes, torch.zeros(1, 2).double(), torch.ones(1, 2).double(), torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(simplex(tied).mean, torch.full((1, 2), 0.5, dtype=torch.float64), atol=1e-6, rtol=0)


def test_simplex_weight_two_is_a_pair_said_twice() -> None:
    once = some_batch([6], 3, seed=9)
    heavy = once._replace(weight=torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0, 1.0]]).double())
    index = torch.tensor([0, 0, 1, 2, 3, 4, 5])
    assert once.tie is not None
    repeated = Batch(once.slopes[:, index], once.offset[:, index], torch.ones(1, 7).double(), once.tie[:, index])
    torch.testing.assert_close(simplex(heavy).mean, simplex(repeated).mean, atol=1e-6, rtol=0)


# -- Adam


def test_adam_on_logits_against_torch() -> None:
    batch = some_batch([1, 4, 9], 3, seed=2)
    start = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = adam_on_logits(batch, start, steps=60, rate=0.3)
    assert not bool(found.converged.any())
    assert found.covariance is None
    for user in range(3):
        logits = start[user].clone().requires_grad_()
        adam = torch.optim.Adam([logits], lr=0.3)
        one = batch.at(torch.tensor([user]))
        for _ in range(60):
            (logits.grad,) = torch.autograd.grad((one.loss(logits.softmax(0)[None]) / one.weight.sum()).sum(), logits)
            adam.step()
        torch.testing.assert_close(found.mean[user], logits.detach().softmax(0), atol=1e-8, rtol=0)


def test_adam_without_pairs_stays_where_it_starts() -> None:
    start = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(adam_on_logits(some_batch([0], 3), start, steps=20, rate=0.5).mean, start.softmax(1))


# -- batching


@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 12), st.sampled_from([200, 5000, 2**24]))
def test_batches_hold_everybody_once_and_keep_to_their_size(counts: list[int], width: int, numbers: int) -> None:
    held = list(batches(torch.tensor(counts, dtype=torch.int64), width, numbers))
    assert sorted(torch.cat(held).tolist() if held else []) == list(range(len(counts)))
    for rows in held:
        longest = max(max(counts[u] for u in rows.tolist()), 1)
        assert len(rows) == 1 or len(rows) * (longest * (width + 4) + width * width) <= numbers


def test_the_others_in_a_batch_change_nothing() -> None:
    batch, prior = some_batch([2, 9, 5], 3, seed=8), gaussian(3)
    together = posterior(batch, prior)
    for user in range(3):
        alone = posterior(batch.at(torch.tensor([user])), prior)
        torch.testing.assert_close(together.mean[user], alone.mean[0])
        torch.testing.assert_close(simplex(batch).mean[user], simplex(batch.at(torch.tensor([user]))).mean[0], atol=1e-6, rtol=0)


def test_padding_of_weight_zero_is_not_there() -> None:
    padded, prior = some_batch([3], 2, seed=5), gaussian(2)
    slopes, offset = (torch.cat([x, torch.full_like(x[:, :2], 7)], dim=1) for x in (padded.slopes, padded.offset))
    wide = Batch(slopes, offset, torch.nn.functional.pad(padded.weight, (0, 2)), None)
    bare = padded._replace(tie=None)
    for a, b in zip(posterior(bare, prior)[:3], posterior(wide, prior)[:3], strict=True):
        torch.testing.assert_close(a, b)
