"""Ways of choosing: a score of every pair of a pool for every user.

On people whose answers can be predicted, those that weigh what an answer would say under the whole posterior
(`MutualInformation`, `InformationGain`) need 1 to 6.5 answers where random questions need 10: 1 or 2 where people come in groups,
about 4.3 on Polis, about 6 where all traits are alike; docs/questions.md and `python -m benchmarks questions --data groups`.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from palate import likelihood
from palate.errors import DataError
from palate.questions.belief import Belief, Pool, explained, information

SURE = 64.0  # standard deviations from which a side is certain: its doubt rounds to 0, and nothing on the way overflows


class Question(Protocol):
    """A way of choosing: a score of every pair for every user. `generator` is for those that draw."""

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class MutualInformation:
    """H(E sigma(m)) - E H(sigma(m)), m ~ N(margin, v^T C v): what the answer says of the weights, in nats, at most log 2.

    The mutual information of the answer and the weights (BALD; Houlsby et al. 2011, arXiv 1112.5745, eq. 2), by quadrature
    over the margin (`NODES`), without the linearisation of `InformationGain`. Raises `DataError` for a method without a
    covariance. O(U Q (K^2 + 51)).
    """

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        return information(pool.margins(belief.mean), belief.spread(pool))


@dataclass(frozen=True)
class InformationGain:
    """sigma'(m) v^T C v, C the posterior covariance with the prior's precision in it: PReF's score, put right.

    One more answer about v multiplies the determinant of the Laplace precision by 1 + sigma'(m) v^T C v, so half the logarithm of
    it is the information to be gained, in nats, and this score puts the pairs in the same order (MacKay 1992, Neural Computation
    4: 590-604). Raises `DataError` for a method without a covariance.
    """

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        return likelihood.curvature(pool.margins(belief.mean)) * belief.spread(pool)


@dataclass(frozen=True)
class Targeted:
    """What an answer says of the margins that will have to be predicted: sum_t I(answer; which side of pair t is better).

    With z_t = margin_t / s_t of target t the probability that its first text is better is Phi(z_t). An answer about a pair v
    moves the mean of margin_t by a standard deviation of s_t rho_t sqrt(g), rho_t the posterior correlation of the two margins
    and g the share of the variance of m that the answer explains (`explained`); to second order in that the information is
    g rho_t^2 phi(z_t)^2 / (2 Phi(z_t) Phi(-z_t)), in nats, and 0 where s_t is: that side is certain. Its sum over targets is
    (g / s^2) v^T C M C v with one K x K matrix M for all pairs. Compare EPIG (Bickford Smith et al. 2023, arXiv 2304.08151),
    which predicts answers rather than sides.

    It pays where the targets are about few of the weights; where they are like the pool it needs as many answers as
    `MutualInformation`, or a few more.

    Args:
        targets: the margins that matter, such as `pairs_among` the responses to be ranked, or pairs like those to come.
    """

    targets: Pool

    def __post_init__(self) -> None:
        if not self.targets.n_pairs:
            raise DataError("there are 0 targets; expected at least one pair whose order matters")

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        variance, targets = belief.spread(pool), self.targets.to(pool.slopes)
        assert belief.covariance is not None  # `spread` has seen to it
        away, tiny = belief.spread(targets), torch.finfo(variance.dtype).tiny
        z = (targets.margins(belief.mean) / away.clamp(min=tiny).sqrt()).clamp(-SURE, SURE)
        # phi^2 / (Phi(z) Phi(-z)): both vanish together, as |z| e^(-z^2 / 2), and the logarithm knows how.
        doubt = torch.exp(-z.square() - math.log(2 * math.pi) - torch.special.log_ndtr(z) - torch.special.log_ndtr(-z))
        weighed = targets.slopes * torch.where(away > 0, doubt / away.clamp(min=tiny), 0.0)[..., None]  # (U, T, K)
        matter = weighed.mT @ targets.slopes
        gain = pool.spread(belief.covariance @ matter @ belief.covariance)
        share = explained(pool.margins(belief.mean), variance)
        return share * gain / (2 * variance.clamp(min=tiny))


@dataclass(frozen=True)
class Thompson:
    """|sigma(m') - sigma(m'')| for two draws w', w'' of the weights: the pair whose answer two guesses of the user differ about.

    Two draws of the posterior, as in double Thompson sampling for duelling bandits (Wu and Liu 2016, arXiv 1604.07101). Raises
    `DataError` for a method without a covariance.
    """

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        if belief.covariance is None:
            raise DataError("Thompson sampling needs a covariance of the weights, and this method has none; use one with a prior")
        users, k = belief.mean.shape
        values, vectors = torch.linalg.eigh(belief.covariance.double())  # a factor that rounding below zero does not stop
        drawn = torch.randn(2, users, k, generator=generator, dtype=torch.float64).to(values)
        away = ((drawn * values.clamp(min=0).sqrt())[:, :, None] @ vectors.mT)[:, :, 0].to(belief.mean)
        first, second = (likelihood.probability(pool.margins(belief.mean + one)) for one in away)
        return (first - second).abs()


@dataclass(frozen=True)
class HessianUncertainty:
    """sigma'(m)^2 v^T H^-1 v with H = floor I + sum_answered sigma'(m_s) v_s v_s^T: as PReF's published code scores.

    H knows of no prior, so `floor` stands for one, whatever the scale of the weights. With sigma' squared outside, the pairs that
    the current weights call even are preferred twice over.
    """

    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not self.floor > 0:
            raise DataError(f"floor is {self.floor}; expected a positive number: it stands for the prior")

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        hessian = belief.information()
        hessian.diagonal(dim1=1, dim2=2).add_(self.floor)
        inverse = torch.linalg.inv(hessian.double()).to(hessian)
        return likelihood.curvature(pool.margins(belief.mean)).square() * pool.spread(inverse)


@dataclass(frozen=True)
class DOptimal:
    """v^T (S^-1 + 1/4 sum_answered v_s v_s^T)^-1 v: the linear D-optimal design, which never looks at an answer.

    Every answer counts as if its margin were 0, where the curvature is 1/4. Raises `DataError` for a method without a prior.
    """

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        if belief.prior is None:
            raise DataError(
                "a D-optimal design needs a prior of the weights and the pairs that were asked, which a profile's mean and "
                "covariance do not hold; give a living profile, or a Belief with `prior` and `said`, of a method with a prior, "
                "or choose by MutualInformation()"
            )
        precision = torch.linalg.inv(belief.prior.covariance.double())
        quarter = None if belief.said is None else torch.full_like(belief.said.offset, 0.25)
        information = belief.information(quarter).double()
        return pool.spread(torch.linalg.inv(precision + information).to(pool.slopes))


@dataclass(frozen=True)
class Random:
    """Any pair, each as likely as another."""

    def score(self, belief: Belief, pool: Pool, generator: torch.Generator) -> Tensor:
        return torch.rand(len(belief.mean), pool.n_pairs, generator=generator).to(belief.mean)
