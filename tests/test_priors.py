"""Mixtures of Gaussians: moments by independent sums, and what scaling and turning do to them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palate.errors import DataError
from palate.priors import Prior


def some_prior(components: int = 3, k: int = 4, seed: int = 0) -> Prior:
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(components, generator=generator, dtype=torch.float64) + 0.2
    means = torch.randn(components, k, generator=generator, dtype=torch.float64)
    factors = torch.randn(components, k, k, generator=generator, dtype=torch.float64).tril()
    factors.diagonal(dim1=1, dim2=2).abs_().add_(0.3)
    return Prior(share / share.sum(), means, factors)


def moments(prior: Prior) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance as E[w] and E[w w'] - E[w] E[w]'."""
    share, means, factors = (x.numpy() for x in (prior.share, prior.means, prior.factors))
    mean = sum(s * m for s, m in zip(share, means, strict=True))
    second = sum(s * (f @ f.T + np.outer(m, m)) for s, m, f in zip(share, means, factors, strict=True))
    return mean, second - np.outer(mean, mean)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 20))
def test_moments(components: int, k: int, seed: int) -> None:
    prior = some_prior(components, k, seed)
    mean, covariance = moments(prior)
    np.testing.assert_allclose(prior.mean, mean, atol=1e-12)
    np.testing.assert_allclose(prior.covariance, covariance, atol=1e-12)
    assert (prior.n_components, prior.n_weights) == (components, k)


def test_gaussian_keeps_its_covariance_and_mean() -> None:
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    prior = Prior.gaussian(covariance, torch.tensor([1.0, -3.0], dtype=torch.float64))
    torch.testing.assert_close(prior.covariance, covariance)
    assert prior.mean.tolist() == [1.0, -3.0]
    assert Prior.gaussian(covariance).mean.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("kappa", "mean"), [(0.25, 0.5), (1.0, 1.0), (7.0, 1.0)])
def test_scaled_multiplies_every_variance_and_draws_the_mean_in(kappa: float, mean: float) -> None:
    prior = some_prior()
    torch.testing.assert_close(prior.scaled(kappa).covariance, kappa * prior.covariance)
    torch.testing.assert_close(prior.scaled(kappa).mean, mean * prior.mean)


@pytest.mark.parametrize("rows", [2, 4])
def test_rotated_is_the_prior_of_the_product(rows: int) -> None:
    prior, matrix = some_prior(), torch.randn(rows, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    turned = prior.rotated(matrix)
    torch.testing.assert_close(turned.mean, matrix @ prior.mean)
    torch.testing.assert_close(turned.covariance, matrix @ prior.covariance @ matrix.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.factors, turned.factors.tril())


def test_to_follows_the_tensor() -> None:
    prior = some_prior().to(torch.zeros(1, dtype=torch.float32))
    assert {prior.share.dtype, prior.means.dtype, prior.factors.dtype} == {torch.float32}


@pytest.mark.parametrize("k", [2, 5, 12])
def test_an_even_blend_varies_about_as_a_flat_dirichlet_does(k: int) -> None:
    prior = Prior.blend(torch.full((k,), 1 / k, dtype=torch.float64))
    flat = (np.eye(k) / k - np.full((k, k), 1 / k**2)) / (k + 1)  # of Dirichlet(1 ... 1)
    ratio = np.trace(prior.covariance.numpy()) / np.trace(flat)
    assert 0.5 < ratio < 2
    away = torch.full((k,), k**-0.5, dtype=torch.float64)
    assert float((away @ prior.covariance @ away) ** 0.5) < 0.011  # the sum is one
    assert prior.mean.sum() == pytest.approx(1)


def test_walls_add_the_curvature_of_their_barrier_and_those_behind_the_mean_none() -> None:
    plain = Prior.gaussian(torch.diag(torch.tensor([4.0, 9.0], dtype=torch.float64)), torch.tensor([0.5, -1.0]).double())
    walled = plain.positive()
    # -log(walls . w) has second derivative 1 / w^2 whatever the length of the row; w_2 = -1 is outside.
    np.testing.assert_allclose(walled.covariance, np.diag([1 / (1 / 4 + 1 / 0.5**2), 9.0]), rtol=1e-9)
    assert plain.walls is None


def test_walls_go_where_the_weights_go() -> None:
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prior = some_prior().positive()
    turned = prior.rotated(matrix)
    w = torch.randn(4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert prior.walls is not None
    assert turned.walls is not None
    torch.testing.assert_close(turned.walls @ (matrix @ w), prior.walls @ w)
    for same in (prior.scaled(3.0), prior.to(torch.zeros(1))):
        assert same.walls is not None
        assert same.walls.tolist() == prior.walls.tolist()


def test_what_is_no_prior() -> None:
    with pytest.raises(DataError, match=r"walls have shape \(2, 4\); expected \(any number, 3\)"):
        Prior(torch.ones(1), torch.zeros(1, 3), torch.eye(3)[None], torch.zeros(2, 4))
    with pytest.raises(DataError, match=r"prior has shares \(2,\), means \(1, 3\).*expected \(1,\)"):
        Prior(torch.tensor([0.5, 0.5]), torch.zeros(1, 3), torch.eye(3)[None])
    with pytest.raises(DataError, match=r"shares are \[0\.5, 0\.25\]; expected positive numbers that sum to 1"):
        Prior(torch.tensor([0.5, 0.25]), torch.zeros(2, 3), torch.eye(3).expand(2, -1, -1))
    with pytest.raises(DataError, match="not positive definite"):
        Prior.gaussian(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(DataError, match=r"kappa is 0\.0; expected a positive number"):
        some_prior().scaled(0.0)
    with pytest.raises(DataError, match="kappa is nan"):
        some_prior().scaled(float("nan"))
