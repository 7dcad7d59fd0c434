"""`adapt`: from a user's choices to that user's weights, for one user or a million, in one batched solve.

The embeddings are projected once (`model.features`); after that a user is a few rows of K numbers, and users are rows of a
batch, never iterations of a Python loop. What comes back is a `Profile` per user: mean, covariance, how many choices, and whose
model.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError, MismatchError, ModelFileError, UnknownUserError
from palate.models import files
from palate.models.base import RewardModel
from palate.solvers import Batch, Sides, batches


@dataclass(frozen=True, eq=False)
class Profile:
    """One user: weights with their uncertainty.

    Attributes:
        mean: (K,) posterior mean of the weights.
        covariance: (K, K) posterior covariance, None where the method has none.
        n_pairs: choices it was learned from.
        converged: whether the solver reached its tolerance.
        model: fingerprint of the model that the weights belong to.
    """

    user_id: str
    mean: Tensor
    covariance: Tensor | None
    n_pairs: int
    converged: bool
    model: str


@dataclass(frozen=True, eq=False)
class Profiles(Mapping[str, Profile]):
    """The profiles of U users of one model: a mapping user id -> `Profile`, stored as arrays.

    Attributes:
        user_ids: (U,) ids. mean: (U, K). covariance: (U, K, K) or None. n_pairs: (U,). converged: (U,) bool.
        model: fingerprint of the model.
    """

    user_ids: tuple[str, ...]
    mean: Tensor
    covariance: Tensor | None
    n_pairs: Tensor
    converged: Tensor
    model: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", {user: row for row, user in enumerate(self.user_ids)})
        if len(self._index) != len(self.user_ids) or len(self.mean) != len(self.user_ids):
            raise DataError(f"{len(self.user_ids)} user ids, {len(self._index)} of them distinct, for {len(self.mean)} rows")

    @property
    def _index(self) -> dict[str, int]:
        rows: dict[str, int] = self.__dict__["_rows"]
        return rows

    def __getitem__(self, user_id: str) -> Profile:
        row = self._index.get(user_id)
        if row is None:
            known = ", ".join(self.user_ids[:3])
            raise UnknownUserError(f"no profile for user {user_id!r} among {len(self)} (such as {known}); adapt that user first")
        covariance = None if self.covariance is None else self.covariance[row]
        return Profile(user_id, self.mean[row], covariance, int(self.n_pairs[row]), bool(self.converged[row]), self.model)

    def __iter__(self) -> Iterator[str]:
        return iter(self.user_ids)

    def __len__(self) -> int:
        return len(self.user_ids)

    def __repr__(self) -> str:
        return f"Profiles({len(self)} users x {self.mean.shape[1]} weights, model {self.model[:12]})"

    def rows(self, user_ids: Sequence[str]) -> Tensor:
        """Row of each user, -1 where there is no profile."""
        return torch.tensor([self._index.get(user, -1) for user in user_ids], dtype=torch.int64, device=self.mean.device)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with everything, atomically. Profiles are personal data: treat the file as such."""
        tensors = {"mean": self.mean, "n_pairs": self.n_pairs, "converged": self.converged}
        if self.covariance is not None:
            tensors["covariance"] = self.covariance
        meta = {"format": "palate-profiles", "version": "1", "model": self.model, "user_ids": json.dumps(self.user_ids)}
        files.write_tensors(path, tensors, meta)

    @classmethod
    def load(cls, path: str | Path) -> "Profiles":
        """Read a file written by `save`. Raises `ModelFileError` for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as opened:
                meta = opened.metadata() or {}
            tensors = load_file(str(path))
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{path} cannot be read as profiles: {error}; expected a file written by Profiles.save"
            ) from error
        if meta.get("format") != "palate-profiles" or meta.get("version") != "1":
            raise ModelFileError(
                f"{path} is {meta.get('format', 'a foreign file')} version {meta.get('version')}; "
                "expected palate-profiles version 1"
            )
        try:
            ids = tuple(json.loads(meta["user_ids"]))
            return cls(ids, tensors["mean"], tensors.get("covariance"), tensors["n_pairs"], tensors["converged"], meta["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{path} is no complete file of profiles ({error}); adapt the users again") from error


@torch.no_grad()
def adapt(model: RewardModel, data: EmbeddedPairs, *, covariance: bool = True) -> Profiles:
    """Learn every user of `data` from their own choices, given what the model knows of everybody.

    For the default model this is the Laplace posterior of w_i ~ prior under sum_j nll(margin_ij) (`solvers.posterior`).

    Args:
        model: a fitted model.
        data: choices of any users, seen or not.
        covariance: False leaves the (U, K, K) covariances out, which is most of the memory at large U and K.

    Warns once where the model was not given what it reads beside choices (`AttributePrior.with_attributes`).

    Raises:
        DataError: the model is not fitted, or reads other embeddings.
        MismatchError: the embeddings come from another encoder.
    Cost: one pass over the distinct texts, then a few K x K systems a user; 100,000 users x 10 choices x 8 weights take seconds.
    """
    model.check(data.embeddings, data.encoder)
    if model.lacks is not None:
        warnings.warn(model.lacks, stacklevel=3)  # past the frame of no_grad
    first, second = pair_design(model, data) if model.linear else sides(model, data)
    grouped = data.grouped()
    users, k = len(data.user_ids), model.n_weights
    if k == 0:
        return no_pairs(model, data.user_ids, grouped.counts)
    mean = second.new_empty(users, k)
    spread = second.new_empty(0, k, k) if covariance and not users else None  # made when a first one is there: K may be large
    converged = torch.empty(users, dtype=torch.bool, device=second.device)
    for rows in batches(grouped.counts, k if model.linear else k + 2 * second.shape[1]):
        ids = tuple(data.user_ids[u] for u in rows.tolist())
        if model.linear:
            batch = pad(data, first, second, rows)
            solved = model.inference.solve(batch, model.prior, ids, covariance=covariance)
        else:
            solved = model.solved(pad_sides(data, first, second, rows), ids, covariance=covariance)
        mean[rows], converged[rows] = solved.mean, solved.converged
        if covariance and solved.covariance is not None:
            spread = second.new_empty(users, k, k) if spread is None else spread
            spread[rows] = solved.covariance
    return Profiles(data.user_ids, mean, spread, grouped.counts, converged, model.fingerprint())


def no_pairs(model: RewardModel, user_ids: Sequence[str], n_pairs: Tensor | None = None) -> Profiles:
    """The profiles of users without choices: what the model expects of them, with what is unknown of them as covariance.

    `n_pairs` (U,) is for a model without weights, for which nothing can be learned of a user from any number of choices.
    """
    n, device = len(user_ids), model.crowd_weights.device
    counts = torch.zeros(n, dtype=torch.int64, device=device) if n_pairs is None else n_pairs
    converged, spread = torch.ones(n, dtype=torch.bool, device=device), model.expected_covariance(user_ids)
    return Profiles(tuple(user_ids), model.expected(user_ids), spread, counts, converged, model.fingerprint())


@torch.no_grad()
def margins(model: RewardModel, data: EmbeddedPairs, profiles: Profiles | None = None) -> Tensor:
    """(P,) reward(chosen) - reward(rejected) of every choice for its own user, in natural log-odds.

    A user without a profile gets the crowd's reward. Raises `MismatchError` where the profiles belong to another model.
    """
    return margin_moments(model, data, profiles)[0]


@torch.no_grad()
def margin_moments(model: RewardModel, data: EmbeddedPairs, profiles: Profiles | None = None) -> tuple[Tensor, Tensor]:
    """Posterior mean and variance of every margin, (P,) each: d.w and d' C d with d the difference of the pair's slopes.

    The variance is 0 where the method has no covariance.
    """
    model.check(data.embeddings, data.encoder)
    if not model.linear:
        return _margins_of_sides(model, data, profiles)
    offset, slopes = pair_design(model, data)
    crowd = model.crowd_weights.to(slopes)
    if profiles is None:
        return offset + slopes @ crowd, torch.zeros_like(offset)
    check_profiles(model, profiles)
    if not len(profiles):
        return offset + slopes @ crowd, torch.zeros_like(offset)
    row = profiles.rows(data.user_ids)[data.user_index]
    known = row >= 0
    weights = torch.where(known[:, None], profiles.mean[row].to(slopes), crowd)
    mean = offset + (slopes * weights).sum(1)
    variance = torch.zeros_like(mean)
    if profiles.covariance is not None and slopes.shape[1]:
        step = max(1, 2**24 // slopes.shape[1] ** 2)
        for start in range(0, len(mean), step):
            part = slice(start, start + step)
            spread = profiles.covariance[row[part]].to(slopes)
            variance[part] = torch.einsum("pi,pij,pj->p", slopes[part], spread, slopes[part])
        variance = torch.where(known, variance, torch.zeros_like(variance)).clamp(min=0)
    return mean, variance


def _margins_of_sides(model: RewardModel, data: EmbeddedPairs, profiles: Profiles | None) -> tuple[Tensor, Tensor]:
    """As `margin_moments` for a model that is not linear in its weights: the margin at their mean, and no variance."""
    chosen, rejected = sides(model, data)
    crowd = model.crowd_weights.to(chosen)
    weights = crowd.expand(len(data), -1)
    if profiles is not None:
        check_profiles(model, profiles)
        if len(profiles):
            row = profiles.rows(data.user_ids)[data.user_index]
            weights = torch.where((row >= 0)[:, None], profiles.mean[row].to(crowd), crowd)
    mean = chosen.new_empty(len(data))
    step = max(1, 2**22 // max(1, chosen.shape[1] + weights.shape[1]))
    for start in range(0, len(mean), step):
        part = slice(start, start + step)
        mean[part] = model.score(chosen[part], weights[part]) - model.score(rejected[part], weights[part])
    return mean, torch.zeros_like(mean)


def check_profiles(model: RewardModel, profiles: Profiles | Profile) -> None:
    """Raise `MismatchError` unless the profiles were learned with this very model."""
    own = model.fingerprint()
    if profiles.model != own:
        raise MismatchError(
            f"profiles of model {profiles.model[:12]} given to model {own[:12]}; "
            "weights mean nothing under another model: adapt again"
        )


def pair_design(model: RewardModel, data: EmbeddedPairs) -> tuple[Tensor, Tensor]:
    """Offset (P,) and slopes (P, K) of every choice: the design of the chosen text minus that of the rejected one.

    Only texts that occur in a choice are projected, each once.
    """
    features, chosen, rejected, _ = _projected(model, data)
    offset, slopes = model.design(features)
    return offset[chosen] - offset[rejected], slopes[chosen] - slopes[rejected]


def sides(model: RewardModel, data: EmbeddedPairs) -> tuple[Tensor, Tensor]:
    """Features (P, F) of the chosen and of the rejected text of every choice, for a model that is not linear in its weights.

    Raises:
        DataError: the model reads prompts, and the data have none (`Encoder.embed(pairs, prompts=True)`).
    """
    features, chosen, rejected, prompts = _projected(model, data)
    if not model.reads_prompts:
        return features[chosen], features[rejected]
    if prompts is None:
        raise DataError(
            f"{type(model).__name__} reads prompts, and these {len(data)} choices have no rows of e(prompt); "
            "embed them with encoder.embed(pairs, prompts=True), or give EmbeddedPairs(..., prompts=rows)"
        )
    asked = features[prompts]
    return model.under(features[chosen], asked), model.under(features[rejected], asked)


def _projected(model: RewardModel, data: EmbeddedPairs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Features of the texts that occur, and for every choice the rows of its two texts and of its prompt."""
    table, chosen, rejected = data.embeddings, data.chosen, data.rejected
    prompts = data.prompts if model.reads_prompts else None
    if 2 * len(data) < len(table):
        wanted = [chosen, rejected] if prompts is None else [chosen, rejected, prompts]
        used, where = torch.unique(torch.cat(wanted), return_inverse=True)
        table, (chosen, rejected, *rest) = table.take(used), where.reshape(len(wanted), len(data))
        prompts = rest[0] if rest else None
    return model.features(table), chosen, rejected, prompts


def pad_sides(data: EmbeddedPairs, chosen: Tensor, rejected: Tensor, rows: Tensor) -> Sides:
    """The choices of the users `rows` as a padded batch of both texts; a padded place has weight 0."""
    index, real = data.grouped().padded(rows)
    tie = data.tie[index] if bool(data.tie.any()) else None
    return Sides(chosen[index], rejected[index], data.weight[index].to(chosen) * real, tie)


def pad(data: EmbeddedPairs, offset: Tensor, slopes: Tensor, rows: Tensor) -> Batch:
    """The choices of the users `rows` as a padded batch; a padded place has weight 0."""
    index, real = data.grouped().padded(rows)
    weight = data.weight[index].to(slopes) * real
    tie = data.tie[index] if bool(data.tie.any()) else None
    return Batch(slopes[index], offset[index] * real, weight, tie)
