"""Whether to trust a profile at all: the probability that the personal ranking beats the crowd's, and a floor under it.

By its own posterior a personal ranking always looks at least as good as the crowd's: the posterior's mean is what the posterior
expects. What it cannot see is a population that differs less than its prior says. So how far people really are from the crowd is
learned beside the model, from the choices of people it was not fitted on: a person's weights are a draw from N(crowd, kappa S),
S the prior's second moment about the crowd, with kappa one of `KAPPAS`, and kappa = 0 for people who simply are the crowd. The
shares of these kinds are the maximum of their likelihood (EM; Dempster, Laird and Rubin 1977), one imaginary person in all kinds
alike added. A person's probability averages over the kinds by what their own choices say of them (Hoeting et al. 1999).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logsumexp
from scipy.stats import qmc
from torch import Tensor

from palate.adaptation import Profile, pad, pair_design
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError, MismatchError, ModelFileError
from palate.living.profile import LiveProfile
from palate.models import files
from palate.models.base import Newton, RewardModel
from palate.priors import Prior
from palate.solvers import batches

Floats = NDArray[np.float64]

KAPPAS = np.array([0.0, 1 / 64, 1 / 16, 1 / 4, 1.0, 4.0])  # of the prior's spread: how far people may be from the crowd
NOTHING = 1e-8  # a kappa that can be inverted and lets nobody leave the crowd
POOL = 256  # most pairs on which the two rankings are compared
DRAWS = 256  # of a person's weights
RARE = 3e-3  # a kind that a person is less likely to be of is left out
ROUNDS = 1000  # of EM, which stops long before
NAME = "floor.safetensors"


P = TypeVar("P", Profile, LiveProfile)


class _Said(NamedTuple):
    """What U people's choices say of their weights, Gaussian in y where w = crowd + turn y and y ~ N(0, kappa I) by the prior.

    The likelihood is exp(pull . y - sum_k size_k y_k^2 / 2): `turn` is chosen so that its precision is diagonal.
    """

    turn: Floats  # (U, K, K)
    pull: Floats  # (U, K)
    size: Floats  # (U, K)

    def evidence(self) -> Floats:
        """(U, H) logarithm of the marginal likelihood under each of `KAPPAS`, less that of the crowd's weights."""
        kappa = KAPPAS[:, None]
        grown = 1 + kappa * self.size[:, None]
        return np.asarray((kappa * np.square(self.pull[:, None]) / grown - np.log(grown)).sum(2) / 2)


@dataclass(frozen=True, eq=False)
class Floor:
    """How far people are from the crowd, and the pairs on which a personal ranking is compared with the crowd's.

    Attributes:
        share: (H,) of the people by `KAPPAS`.
        offset, slopes: (Q,), (Q, K) of the pairs.
        crowd, mean, covariance: the crowd's weights (K,), and the moments of the prior under which profiles are learned.
        n_users: people whom `share` was learned from.
        model: fingerprint of the model.
    """

    share: Floats
    offset: Floats
    slopes: Floats
    crowd: Floats
    mean: Floats
    covariance: Floats
    n_users: int
    model: str

    def __post_init__(self) -> None:
        away = self.mean - self.crowd
        wide = np.linalg.cholesky(self.covariance + np.outer(away, away))
        noise = qmc.MultivariateNormalQMC(np.zeros(len(self.crowd)), rng=np.random.default_rng(0)).random(DRAWS)
        parts = {"_root": np.linalg.cholesky(self.covariance), "_wide": wide, "_noise": noise}
        for name, part in parts.items():
            object.__setattr__(self, name, part)

    @classmethod
    @torch.no_grad()
    def fit(cls, model: RewardModel, data: EmbeddedPairs) -> "Floor":
        """Learn the shares from people whom the model was not fitted on, and keep up to 256 of their pairs to compare on.

        The people that the model was fitted on will not do: the prior was made to suit them, and they always confirm it.

        Args:
            model: a fitted model with a prior.
            data: their choices; some fifty people, with as many choices each as people are expected to have.

        Raises:
            DataError: no choices, or a model without a prior or without weights.
            MismatchError: choices embedded by another encoder than the model's.
        Cost: that of adapting everybody six times.
        """
        prior, how = model.prior, model.inference
        if prior is None or not model.n_weights or not isinstance(how, Newton):
            raise DataError(
                f"{type(model).__name__} with {model.n_weights} weights and {type(how).__name__} has no posterior under one "
                "prior for everybody; a floor needs a method with one"
            )
        if not len(data):
            raise DataError("0 choices; expected those of people whom the model was not fitted on")
        model.check(data.embeddings, data.encoder)
        offset, slopes = (part.double() for part in pair_design(model, data))
        rows = np.unique(np.linspace(0, len(offset) - 1, min(POOL, len(offset))).round().astype(np.int64))
        return cls(
            share=_shares(_evidence(model, prior, data, offset, slopes)),
            offset=offset[rows].cpu().numpy(),
            slopes=slopes[rows].cpu().numpy(),
            crowd=model.crowd_weights.double().cpu().numpy(),
            mean=prior.mean.double().cpu().numpy(),
            covariance=prior.covariance.double().cpu().numpy(),
            n_users=len(data.user_ids),
            model=model.fingerprint(),
        )

    def with_share(self, share: Any) -> "Floor":
        """The same with other shares (H,) of the people by `KAPPAS`; they have to sum to 1."""
        given = np.asarray(share, dtype=np.float64)
        if given.shape != KAPPAS.shape or not (given >= 0).all() or abs(given.sum() - 1) > 1e-6:
            raise DataError(f"shares are {given.tolist()}; expected {len(KAPPAS)} numbers of at least 0 that sum to 1")
        return replace(self, share=given)

    def better_than_crowd(self, profile: Profile | LiveProfile) -> float:
        """The probability that ranking by the profile's mean predicts this person's choices better than ranking by the crowd.

        P(sum_q d_q (2 sigma(m_q(w)) - 1) > 0) over the pairs q that the two rank differently, d_q the side that the profile's
        mean takes and m_q the margin under weights w, which are drawn from the posterior of each kind of people. 1/2 where the
        rankings are the same on all pairs.

        Raises:
            DataError: a profile without a covariance.
            MismatchError: a profile of another model.
        Cost: O(K^3), and up to five times 256 draws (of Sobol's sequence) for each pair on which the two differ: milliseconds.
        """
        mean, covariance = self._moments(profile)
        side = np.sign(self.offset + self.slopes @ mean)
        differ = np.flatnonzero(side != np.sign(self.offset + self.slopes @ self.crowd))
        if not len(differ):
            return 0.5
        said = self._said(mean[None], covariance[None])
        with np.errstate(divide="ignore"):
            log = np.log(self.share) + said.evidence()[0]
        kind = np.exp(log - logsumexp(log))
        offset = (self.offset[differ] + self.slopes[differ] @ self.crowd) * side[differ]
        slopes = self.slopes[differ] @ said.turn[0] * side[differ, None]
        chance = 0.0
        for kappa, share in zip(KAPPAS, kind, strict=True):
            if kappa == 0 or share < RARE:
                continue  # to somebody who is the crowd, the crowd's ranking is the best there is
            grown = 1 + kappa * said.size[0]
            y = kappa * said.pull[0] / grown + self._draws * np.sqrt(kappa / grown)
            gain = (expit(offset + y @ slopes.T) - 0.5).sum(1)
            chance += share * float((gain > 0).mean())
        return chance

    def floored(self, profile: P, at_least: float = 0.5) -> P | None:
        """The profile, or None, which everywhere stands for the crowd, where `better_than_crowd` is below `at_least`."""
        if not 0 <= at_least <= 1:
            raise DataError(f"at_least is {at_least}; expected a probability")
        return profile if self.better_than_crowd(profile) >= at_least else None

    def save(self, folder: str | Path) -> None:
        """Write `floor.safetensors` into the folder of the model, whole or not at all. It holds no person."""
        names = ("share", "offset", "slopes", "crowd", "mean", "covariance")
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in names}
        meta = {"format": "palate-floor", "version": "1", "model": self.model, "n_users": json.dumps(self.n_users)}
        files.write_tensors(Path(folder) / NAME, tensors, meta)

    @classmethod
    def load(cls, folder: str | Path, model: RewardModel | None = None) -> "Floor":
        """What `save` wrote. Raises `ModelFileError` for anything else, and `MismatchError` where it is not of this `model`."""
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / NAME
        try:
            with safe_open(str(path), framework="numpy") as opened:
                meta: Mapping[str, str] = opened.metadata() or {}
                if (meta.get("format"), meta.get("version")) != ("palate-floor", "1"):
                    raise ModelFileError(f"{path} is {meta.get('format', 'a foreign file')}; expected palate-floor version 1")
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            out = cls(**arrays, n_users=int(json.loads(meta["n_users"])), model=meta["model"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
            if isinstance(error, ModelFileError):
                raise
            raise ModelFileError(f"{path} cannot be read as a floor ({error}); write it with Floor.save") from error
        if model is not None and out.model != model.fingerprint():
            raise MismatchError(
                f"{path} belongs to model {out.model[:12]}, not to {model.fingerprint()[:12]}; make it again with Floor.fit"
            )
        return out

    def _moments(self, profile: Profile | LiveProfile) -> tuple[Floats, Floats]:
        own = profile.population.fingerprint if isinstance(profile, LiveProfile) else profile.model
        if own != self.model:
            raise MismatchError(f"a profile of model {own[:12]} given to the floor of model {self.model[:12]}; adapt again")
        if profile.covariance is None:
            raise DataError("the profile has no covariance; adapt with covariance=True, and by a method that has one")
        if isinstance(profile, LiveProfile):
            return profile.mean, profile.covariance
        return profile.mean.double().cpu().numpy(), profile.covariance.double().cpu().numpy()

    def _said(self, mean: Floats, covariance: Floats) -> _Said:
        """The likelihood behind posteriors (U, K), (U, K, K): what has to be multiplied with the prior to have them.

        Where a posterior is wider than the prior, as between two types of people, the choices are taken to say nothing.
        """
        root, wide = self.__dict__["_root"], self.__dict__["_wide"]
        inverse = np.linalg.inv(root)
        variance, turn = np.linalg.eigh(inverse @ covariance @ inverse.T)  # in units of the prior's, about its mean
        variance = variance.clip(min=1e-9)
        precision = (1 / variance - 1).clip(min=0)
        to_own = turn.swapaxes(1, 2) @ inverse  # x = to_own (w - mean), in which all is diagonal
        pull = np.where(precision > 0, np.einsum("uij,uj->ui", to_own, mean - self.mean) / variance, 0)
        pull = pull - precision * (to_own @ (self.crowd - self.mean))  # about the crowd
        along = to_own @ wide
        size, turned = np.linalg.eigh(np.einsum("uji,uj,ujk->uik", along, precision, along))
        return _Said(wide @ turned, np.einsum("uji,ukj,uk->ui", turned, along, pull), size.clip(min=0))

    @property
    def _draws(self) -> Floats:
        draws: Floats = self.__dict__["_noise"]
        return draws


def _evidence(model: RewardModel, prior: Prior, data: EmbeddedPairs, offset: Tensor, slopes: Tensor) -> Floats:
    """(U, H) log evidence of each person's choices under every kind, by the method's own solve (Laplace)."""
    crowd = model.crowd_weights.to(slopes)
    away = prior.mean.to(slopes) - crowd
    spread = prior.covariance.to(slopes) + torch.outer(away, away)
    kinds = [Prior.gaussian(max(kappa, NOTHING) * spread, crowd) for kappa in KAPPAS.tolist()]
    out = np.empty((len(data.user_ids), len(kinds)))
    for rows in batches(data.grouped().counts, model.n_weights):
        batch, ids = pad(data, offset, slopes, rows), tuple(data.user_ids[u] for u in rows.tolist())
        for place, kind in enumerate(kinds):
            evidence = model.inference.solve(batch, kind, ids, covariance=False).log_evidence
            if evidence is None:
                raise DataError(f"{type(model).__name__} has no evidence for a prior; a floor needs a method that has")
            out[rows.cpu().numpy(), place] = evidence.cpu().numpy()
    return out


def _shares(evidence: Floats) -> Floats:
    """(H,) shares of the kinds that make (U, H) log evidences likeliest, one imaginary person in all kinds alike added."""
    n, kinds = evidence.shape
    share = np.full(kinds, 1 / kinds)
    for _ in range(ROUNDS):
        log = np.log(share) + evidence
        belongs = np.exp(log - logsumexp(log, axis=1, keepdims=True)).sum(0)
        new = (belongs + 1 / kinds) / (n + 1)
        done = np.abs(new - share).max() < 1e-9
        share = new
        if done:
            break
    return np.asarray(share)
