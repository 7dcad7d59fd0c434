"""Profiles that outlive their model: what was learned of people, written in the base rewards of another model.

A grown model (`growing`) keeps the old base rewards, so a profile needs no more than the new weights' prior; a model in other
coordinates needs a change of bases; a population that is another one changes what is believed of everybody.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from palate.adaptation import Profiles, check_profiles
from palate.errors import DataError, MismatchError
from palate.models.base import Newton, RewardModel
from palate.models.factored import LoRe
from palate.models.hierarchical import Hierarchical
from palate.models.mrm import MRM
from palate.models.pref import PReF
from palate.priors import Prior

SHARED = ("frequencies", "phases", "amplitudes")  # of a crowd's reward that bends
SPANS = 1e-3  # of the length of a base: what may be left of it outside the new bases
BLOCK = 2**22  # numbers of covariances that are inverted at once


class Linear(NamedTuple):
    """A model that is linear in the embedding, up to what it shares: reward = shared(e) + e . direction + w . (bases^T e)."""

    direction: Tensor  # (D,)
    bases: Tensor  # (D, K)
    prior: Prior | None  # None: there is no base yet


@torch.no_grad()
def carry(profiles: Profiles, old: RewardModel, new: RewardModel) -> Profiles:
    """The profiles of `old` as profiles of `new`, without the choices that they were learned from.

    Where the new bases begin with the old ones, the mean and the covariance are padded: the new weights have their prior's mean
    and covariance, and go with no other. Otherwise the old rewards are written in the new bases, w' = T w + c with
    V' T = V and V' c = mu - mu' (the crowd's directions), which must be possible: w' gets T C T', and the prior's share where
    T does not reach. Rewards are the same as before, up to rounding, as long as the population of the old weights is the same.

    Where it is another one (and both are single Gaussians, and the profiles have covariances), the old prior is taken out of the
    posterior and the new one put in: C'^-1 = C^-1 - S^-1 + S'^-1, C'^-1 w' = C^-1 w - S^-1 m + S'^-1 m'. For a mixture a mean
    and a covariance are not enough for that: they stay as they are. Adapting again from the same choices is always better, and
    is what this approximates. On the simplex (`LoRe`), new bases get weight 0.

    Raises:
        MismatchError: the profiles are not of `old`, or the models are of different classes or encoders.
        DataError: models whose rewards cannot be written in each other's bases.
    Cost: O(U K^3) at most.
    """
    check_profiles(old, profiles)
    if type(old) is not type(new) or (old.encoder is not None and new.encoder is not None and old.encoder != new.encoder):
        raise MismatchError(
            f"profiles of a {type(old).__name__} carried to a {type(new).__name__}, encoders {(old.encoder or '?')[:12]} and "
            f"{(new.encoder or '?')[:12]}; expected two models of one method and one encoder: adapt again"
        )
    if isinstance(old, LoRe) and isinstance(new, LoRe):
        k = old.bases.shape[1]
        if not torch.equal(new.bases[:, :k], old.bases):
            raise DataError("the new LoRe does not begin with the base rewards of the old one; expected those: adapt again")
        more = profiles.mean.new_zeros(len(profiles), new.bases.shape[1] - k)
        return _carried(profiles, torch.cat([profiles.mean, more], dim=1), None, new)
    turn, shift = _change(old, new)
    before, after = linear(old).prior, linear(new).prior
    if after is None:
        return _carried(profiles, profiles.mean, profiles.covariance, new)
    turn, shift = turn.to(profiles.mean.device), shift.to(profiles.mean.device)
    left = torch.linalg.qr(turn, mode="complete")[0][:, turn.shape[1] :] if turn.shape[1] else torch.eye(len(turn)).to(turn)
    free = left @ left.T  # onto what the old weights cannot reach
    m, s = after.mean.double(), after.covariance.double()
    mean = profiles.mean.double() @ turn.T + shift + free @ m
    if profiles.covariance is None:
        return _carried(profiles, mean.to(after.means), None, new)
    covariance = turn @ profiles.covariance.double() @ turn.T + free @ s @ free
    m_old, s_old = shift + free @ m, free @ s @ free
    if before is not None:
        m_old, s_old = m_old + turn @ before.mean.double(), s_old + turn @ before.covariance.double() @ turn.T
    same = torch.allclose(s_old, s, rtol=1e-4, atol=1e-6 * float(s.diagonal().max())) and torch.allclose(m_old, m, atol=1e-5)
    if not same and after.n_components == 1 and (before is None or before.n_components == 1):
        mean, covariance = _exchanged(mean, covariance, (m_old, s_old), (m, s))
    return _carried(profiles, mean.to(after.means), covariance.to(after.means), new)


def _carried(profiles: Profiles, mean: Tensor, covariance: Tensor | None, new: RewardModel) -> Profiles:
    return Profiles(profiles.user_ids, mean, covariance, profiles.n_pairs, profiles.converged, new.fingerprint())


def linear(model: RewardModel) -> Linear:
    """The numbers of a model that can grow. Raises `DataError` for others, with the reason."""
    if not model.is_fitted:
        raise DataError(f"this {type(model).__name__} is not fitted; call palate.fit(data, model) and use what it returns")
    if isinstance(model, LoRe):
        raise DataError(
            "LoRe mixes its base rewards on a simplex, where whoever takes a new one gives up some of the others; it cannot be "
            "added alone: fit LoRe again on everybody, or grow a Hierarchical or PReF"
        )
    if isinstance(model, Hierarchical) and model.blend:
        raise DataError(
            "this Hierarchical found people to be blends of types, whose weights sum to one: no base reward can be added alone; "
            "fit it again on everybody"
        )
    if not isinstance(model, Hierarchical | PReF | MRM):
        raise DataError(f"{type(model).__name__} cannot grow; expected a Hierarchical, PReF or MRM")
    if not isinstance(model.inference, Newton) or (isinstance(model, MRM) and len(model.hidden)):
        raise DataError(
            f"this {type(model).__name__} has hidden layers, or users without a prior ({type(model.inference).__name__}); "
            "expected linear base rewards and an exact solve: fit it again on everybody"
        )
    own = model.direction if len(model.direction) else torch.zeros_like(model.bases[:, 0])
    return Linear(own, model.bases, model.prior if model.bases.shape[1] else None)


def _change(old: RewardModel, new: RewardModel) -> tuple[Tensor, Tensor]:
    """T (K', K) and c (K',) such that the old reward with weights w is the new one with T w + c."""
    before, after = linear(old), linear(new)
    d, k = before.bases.shape
    if len(after.bases) != d:
        raise DataError(f"the old model reads {d} features and the new one {len(after.bases)}; expected the same: adapt again")
    rest = [name for name, value in old.state_dict().items() if name in SHARED and not torch.equal(value, new.state_dict()[name])]
    if rest:
        raise DataError(
            f"the crowd's rewards of the two models differ in their {', '.join(rest)}; expected the same: adapt again"
        )
    if torch.equal(after.bases[:, :k], before.bases) and torch.equal(after.direction, before.direction):
        start = torch.eye(after.bases.shape[1], k, dtype=torch.float64)
        return start, start.new_zeros(len(start))
    wanted = torch.cat([before.bases, (before.direction - after.direction)[:, None]], dim=1).double()
    crowd = before.direction if bool(before.direction.any()) else after.direction  # the old model may have none (`Hierarchical`)
    # Rows by their length, because features come in any unit.
    size = torch.cat([before.bases, after.bases, crowd[:, None]], dim=1).double().norm(dim=1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    inside = after.bases.double() / size
    # On the processor, the only place that has a driver for columns which depend on each other.
    found = torch.linalg.lstsq(inside.cpu(), (wanted / size).cpu(), driver="gelsd").solution.to(inside)
    left = (inside @ found - wanted / size).norm(dim=0)
    length = torch.cat([before.bases, crowd[:, None]], dim=1).double().div(size).norm(dim=0)
    if bool((left > SPANS * length).any()):
        worst = int((left / length.clamp(min=1e-30)).argmax())
        what = "the crowd's direction" if worst == k else f"base {worst + 1}"
        raise DataError(
            f"{float(left[worst] / length[worst].clamp(min=1e-30)):.1%} of {what} of the old model lies outside the new bases; "
            "expected bases in which the old rewards can be written: adapt again"
        )
    return found[:, :k], found[:, k]


def _exchanged(mean: Tensor, covariance: Tensor, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Gaussian posteriors (U, K), (U, K, K) under the prior `new` instead of `old`, each a mean and a covariance."""
    before, after = (torch.linalg.inv(spread) for _, spread in (old, new))
    pull = after @ new[0] - before @ old[0]
    means, spreads = [], []
    step = max(1, BLOCK // len(after) ** 2)
    for w, c in zip(torch.split(mean, step), torch.split(covariance, step), strict=True):
        precision = torch.linalg.inv(c)
        spread = torch.linalg.inv(precision - before + after)
        means.append((spread @ ((precision @ w[..., None])[..., 0] + pull)[..., None])[..., 0])
        spreads.append((spread + spread.mT) / 2)
    return torch.cat(means), torch.cat(spreads)
