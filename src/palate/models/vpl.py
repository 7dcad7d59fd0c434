"""Variational preference learning (VPL, arXiv 2408.10075): a user is a latent z that an encoder reads off the user's choices.

r_i(x, y) = dec(e(x, y), z_i), z_i the mean of q(z | choices of i). Everybody, seen or not, is encoded by one forward pass;
nothing is fitted to a user's own choices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from palate import likelihood
from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import attended, crowd, variational
from palate.models.attended import Published
from palate.models.base import RewardModel
from palate.models.validation import edge, halves, position, surely_below
from palate.models.variational import Numbers, Problem, Settings, Texts
from palate.priors import Prior
from palate.solvers import Sides, Solution, chunks

Progress = Callable[[float, str], None]  # (share done, what)

RIDGES = (3e-4, 3e-3)  # of the first layer, psi and chi
HIDDEN = (0, 64)
STOPS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the epochs, after which held-out users are asked
JUDGES = 2  # most fifths of the users that are held out in turn
SHOTS = ((1, 1 / 6), (2, 1 / 6), (5, 1 / 6), (10**6, 1 / 2))  # choices, and what the error after them counts


class VPL(RewardModel):
    """A variational autoencoder of users on frozen features: r = mu . e + personal(e, z), z = E[z | choices].

    This constructor is the fixed preset, what the paper means: features scaled (`crowd.standard_scale`); one z, the posterior's
    mean, in learning and in use; contexts of 1, 2, 5 or half of a user's choices, whose queries share nothing with them
    (`validation.halves`, drawn anew each epoch); a prior whose spread is learned beside them; ties; and a personal part that is
    zero at the prior's mean, so that somebody who said nothing gets the crowd's reward. `variational` has the networks.

    What is left open is chosen on held-out seen users, encoded from 1, 2, 5 and half of their choices: the ridge, whether there
    is a hidden layer, the size of z, and when to stop. A hidden layer, or a smaller z, has to win by a standard error, and so has
    the personal part over the crowd's reward: where it does not, the model has no z. Where latent, hidden and ridge are all
    given there is nothing to choose, and learning takes all its epochs.

    `record["selection"]["active_units"]` says how many coordinates of z tell seen users apart; 0 is a collapsed posterior.
    `faithful` is the published code.

    Args:
        latent: K, the size of z, or several to choose from.
        hidden: units of the hidden layer, 0 for none; None chooses between them and none.
        ridge: the penalty; None chooses among `RIDGES`.
        kl: beta, what a nat of KL(q || prior) counts against a nat of a query's loss.
        epochs: most passes over the users.

    Cost: O(P D (K + H)) an epoch, O(n K^2) to encode a user of n choices. 640 users x 20 choices, 384 features: 19 seconds of one
    busy core for everything that is chosen; 1,000 users x 9 choices are encoded in .03.
    """

    linear = False

    direction: Tensor
    first: Tensor
    bias: Tensor
    rest: Tensor
    spread: Tensor

    def __init__(
        self,
        latent: int | tuple[int, ...] = (4, 16),
        *,
        hidden: int | None = None,
        ridge: float | None = None,
        kl: float = 0.3,
        epochs: int = 40,
    ):
        super().__init__()
        sizes = (latent,) if isinstance(latent, int) else tuple(latent)
        if not sizes or min(sizes) < 1:
            raise DataError(f"latent is {latent}; expected a positive size of z, or several to choose from")
        if hidden is not None and hidden < 0:
            raise DataError(f"hidden is {hidden}; expected no negative number of units, or None to choose")
        if ridge is not None and not 0 <= ridge < float("inf"):
            raise DataError(f"ridge is {ridge}; expected a number of at least 0, or None to choose it on held-out users")
        if not 0 <= kl < float("inf"):
            raise DataError(f"kl is {kl}; expected a finite number of at least 0")
        if epochs < 1:
            raise DataError(f"epochs is {epochs}; expected at least one")
        self.latent, self.hidden, self.ridge, self.kl, self.epochs = latent, hidden, ridge, kl, epochs
        self.published: Published | None = None
        for name in ("direction", "bias", "rest", "spread"):
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("first", torch.zeros(0, 0))

    @classmethod
    def faithful(
        cls,
        latent: int = 512,
        *,
        hidden: int = 512,
        kl: float = 3e-6,
        rate: float = 1e-4,
        epochs: int = 2,
        copies: int = 4,
        contexts: tuple[int, int] = (2, 8),
    ) -> Self:
        """The published code on frozen features, with the sizes that LoRe's table 5 gives it (`attended` has the equations).

        1. Raw embeddings. A pair (chosen, rejected) goes through an MLP, 2 D -> 512 -> 512 -> 512, leaky below zero by .2; one
           head of self-attention over the context without residual or norm; the mean over pairs; two linear layers for mean and
           log variance, both clamped to [-1, 1].
        2. In training z = mean + exp(log variance / 2) noise, brought to length sqrt(512); in use z = mean, of any length.
        3. The reward is an MLP on (e, z), D + 512 -> 512 -> 512 -> 1.
        4. Loss: mean of -log sigma over queries + kl a(t) KL(q || N(0, I)), a(t) = .1 + .9 (cos(pi (t / 10^4 - 1)) + 1) / 2 with
           t the steps so far modulo 10^4.
        5. AdamW, weight decay .001, batches of 32 queries, a cosine after 3 % of warm-up, 2 epochs; every query stands in the
           data `copies` times, each with its own context of `contexts[0]` to `contexts[1]` other choices of its user.

        kl is 1e-4 for pets, 0 and 3e-6 for two and four kinds of users of UltraFeedback; `contexts` (1, 8) for two kinds.

        Not applicable here: the language model with its LoRA and its head of D outputs scaled by .01 (the embedding stands in for
        both), bf16, and gradients accumulated over eight batches of four. Departures: the annealing does not advance in
        evaluation, because nothing is evaluated in training; a context never holds its query; ties, which the published data
        resolve by a coin, take no part, and every other choice counts as one, whatever its weight. Somebody who said nothing, for
        whom there is no answer, gets z = 0, the prior's mean.
        """
        out = cls(latent, hidden=hidden, kl=kl, epochs=epochs)
        if not isinstance(latent, int) or hidden < 1:
            raise DataError(f"latent is {latent} and hidden {hidden}; the faithful preset takes one positive number each")
        if not 0 < rate < float("inf") or copies < 1 or not 1 <= contexts[0] <= contexts[1]:
            raise DataError(
                f"rate is {rate}, copies {copies} and contexts {contexts}; expected a positive rate, at least one copy, and a "
                "range of context sizes from at least 1"
            )
        out.published = Published(latent, hidden, kl, rate, epochs, copies, (contexts[0], contexts[1]))
        return out

    def options(self) -> dict[str, Any]:
        latent = self.latent if isinstance(self.latent, int) else list(self.latent)
        published = None if self.published is None else asdict(self.published) | {"contexts": list(self.published.contexts)}
        own = {"hidden": self.hidden, "ridge": self.ridge, "kl": self.kl, "epochs": self.epochs}
        return {"latent": latent, **own, "published": published}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        given = dict(options)
        published = given.pop("published")
        if published is not None:
            return cls.faithful(**{**published, "contexts": tuple(published["contexts"])})
        return cls(**{**given, "latent": given["latent"] if isinstance(given["latent"], int) else tuple(given["latent"])})

    @property
    def n_features(self) -> int:
        return len(self.first)

    @property
    def crowd_weights(self) -> Tensor:
        """The prior's mean, 0. In the fixed preset that is the crowd's reward."""
        return torch.zeros_like(self.spread)

    @property
    def prior(self) -> Prior | None:
        """N(0, diag(spread^2)), learned; None in the faithful preset, which never uses its N(0, I) after training."""
        self._parts()
        return None if self.published is not None or not len(self.spread) else Prior.gaussian(torch.diag(self.spread.square()))

    def features(self, embeddings: Embeddings) -> Tensor:
        """(N, 1 + 2 K + H): what `variational.Texts` holds; in the faithful preset the first layers of decoder and encoder."""
        numbers = self._parts()
        if self.published is not None:
            return embeddings.project(self.first).to(self.first)
        out = embeddings.project(torch.cat([self.direction[:, None], self.first], dim=1)).to(self.first)
        return Texts.read(out[:, 0], out[:, 1:], numbers).packed()

    def score(self, features: Tensor, weights: Tensor) -> Tensor:
        numbers = self._parts()
        if self.published is not None:
            return attended.decoded(features[..., : self.published.hidden], weights, numbers, self.published)
        return Texts.unpacked(features, len(self.spread)).rewards(weights, numbers)

    def solved(self, sides: Sides, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        """The encoder: one forward pass, so nothing that could fail to converge. No covariance in the faithful preset."""
        numbers, done = self._parts(), torch.ones(len(sides.weight), dtype=torch.bool, device=sides.weight.device)
        if self.published is not None:
            real = (sides.weight > 0) if sides.tie is None else (sides.weight > 0) & ~sides.tie
            h = self.published.hidden
            first = sides.chosen[real][:, h : 2 * h] + sides.rejected[real][:, 2 * h :]
            return Solution(attended.encoded(first, real, numbers, self.published)[0], None, None, done)
        chosen, rejected = (Texts.unpacked(side, len(self.spread)) for side in (sides.chosen, sides.rejected))
        margin = chosen.common - rejected.common
        mean, precision = variational.encoded(chosen.chi - rejected.chi, margin, sides.weight, sides.tie, self.spread.to(margin))
        known = torch.cholesky_inverse(torch.linalg.cholesky(precision)) if covariance else None
        return Solution(mean, known, None, done)

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["VPL", None]:
        if self.published is not None:
            numbers, first, active = attended.published(data, self.published, seed, lambda share: progress(share, "VPL"))
            spread = first.new_ones(self.published.latent)
            out = self.like({"first": first, "rest": _flat(numbers.values()), "spread": spread})
            out.record["selection"] = {"active_units": active}
            return out, None
        return _Choice(self, data, seed, progress).run(), None

    def _parts(self) -> Numbers:
        """The numbers by name, as the networks take them."""
        k, h = len(self.spread), len(self.bias)
        if self.published is not None:
            sizes = attended.sizes(self.published)
        else:
            sizes = {"psi": (h, k), "chi": (h, k), "joint": (k, h), "out": (h,)}
        wide = 3 * self.published.hidden if self.published is not None else k + h
        count = sum(torch.Size(size).numel() for size in sizes.values())
        if self.is_fitted and (len(self.rest) != count or self.first.shape[1] != wide):
            raise DataError(
                f"VPL with {k} latent and {h} hidden numbers has a first layer of {self.first.shape[1]} and {len(self.rest)} "
                f"numbers after it; expected {wide} and {count}"
            )
        split = torch.split(self.rest, [torch.Size(size).numel() for size in sizes.values()]) if self.is_fitted else ()
        parts = {name: part.view(size) for (name, size), part in zip(sizes.items(), split, strict=bool(split))}
        return parts | {"bias": self.bias, "log_spread": self.spread.log()}


def _flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


class _Choice:
    """The fixed preset: what held-out seen users say of each setting and of when to stop, then everybody."""

    def __init__(self, model: VPL, data: EmbeddedPairs, seed: int, progress: Progress):
        self.model, self.data, self.seed, self.progress = model, data, seed, progress
        centre, self.scale = crowd.standard_scale(data)
        self.shift = centre * self.scale
        self.fold = crowd.user_folds(len(data.user_ids), seed)
        self.crowd = crowd.fit_crowd(data, crowd.Rescaled(data.differences(), self.scale), self.fold)
        self.sizes = (model.latent,) if isinstance(model.latent, int) else tuple(sorted(set(model.latent)))
        self.record: dict[str, Any] = {"ridge of the crowd": self.crowd.ridge}

    def run(self) -> VPL:
        model = self.model
        hidden = HIDDEN if model.hidden is None else (model.hidden,)
        ridges = RIDGES if model.ridge is None else (model.ridge,)
        settings, epochs = Settings(self.sizes[-1], hidden[0], ridges[0], model.kl), model.epochs
        if len(hidden) + len(ridges) + len(self.sizes) > 3:
            settings, epochs = self._choose(settings, hidden, ridges) if int(self.fold.max()) >= 0 else (settings, epochs // 2)
        if len(self.data.user_ids) < 2:
            epochs = 0
        out = self._learned(settings, epochs)
        self.progress(1.0, "VPL")
        return out

    def _learned(self, settings: Settings, epochs: int) -> VPL:
        problem = Problem(self.data, self.scale, self.shift, self.crowd.direction)
        numbers = variational.start(problem, self.crowd.direction, settings, self.seed)
        if not epochs:
            settings = replace(settings, latent=0, hidden=0)
            numbers = {name: value.new_zeros(_nothing(name, len(self.scale))) for name, value in numbers.items()}
        for after in variational.train(problem, numbers, settings, seed=self.seed, epochs=epochs):
            numbers = after
        spread, first = numbers["log_spread"].exp(), self.scale[:, None] * numbers["first"]
        k, active = len(spread), 0
        if k:
            known = torch.ones(len(self.data), dtype=torch.bool, device=first.device)
            parts = (problem.asked(numbers, users) for users in chunks(self.data.grouped().counts, k))
            active = variational.active_units(torch.cat([part.posterior(numbers, known)[0] for part in parts]), spread)
        out = self.model.like(
            {
                **{"direction": self.scale * self.crowd.direction, "first": first, "spread": spread},
                **{"bias": numbers["bias"] - (self.shift @ numbers["first"])[k:]},
                **{"rest": _flat(numbers[name] for name in ("psi", "chi", "joint", "out"))},
            }
        )
        out.record["selection"] = self.record | asdict(settings) | {"epochs": epochs, "active_units": active}
        return out

    def _choose(self, settings: Settings, hidden: Sequence[int], ridges: Sequence[float]) -> tuple[Settings, int]:
        """The setting and the epochs with the lowest error of held-out users; 0 epochs where the crowd's reward is as good."""
        parts = [_Part(self, f) for f in range(min(JUDGES, int(self.fold.max()) + 1))]
        stops = sorted({max(1, round(share * self.model.epochs)) for share in STOPS})
        alone = torch.cat([part.errors(None) for part in parts])
        curve: list[dict[str, Any]] = [{"crowd": True, "error": _mean(alone)}]
        best, epochs, kept = settings, 0, alone
        trials = len(hidden) * len(ridges) + len(self.sizes) - 1
        for h in hidden:
            rival = kept  # what this width has to beat surely; its own ridges compete freely
            for ridge in ridges:
                trial = replace(settings, hidden=h, ridge=ridge)
                found = self._path(parts, trial, alone, stops, curve)
                self.progress(0.8 * len({(row["hidden"], row["ridge"]) for row in curve[1:]}) / trials, "VPL, what users say")
                for stop, errors in found:
                    if surely_below(errors, rival) and float(errors.nanmean()) < float(kept.nanmean()):
                        best, epochs, kept = trial, stop, errors
        if epochs:
            for size in reversed(self.sizes[:-1]):
                trial, rival = replace(best, latent=size), kept
                for stop, errors in self._path(parts, trial, alone, stops, curve):
                    if surely_below(errors, rival) and float(errors.nanmean()) < float(kept.nanmean()):
                        best, epochs, kept = trial, stop, errors
        self.record["curve"] = curve
        return best, epochs

    def _path(
        self, parts: Sequence["_Part"], settings: Settings, alone: Tensor, stops: Sequence[int], curve: list[dict[str, Any]]
    ) -> list[tuple[int, Tensor]]:
        """(epochs, errors of the held-out users) at the stops, until the error rises, or, after half of the epochs, no longer
        surely falls or is not below the crowd's."""
        paths = [part.path(settings) for part in parts]
        out: list[tuple[int, Tensor]] = []
        done = 0
        for stop in stops:
            numbers = [next(islice(path, stop - done - 1, None)) for path in paths]
            errors = torch.cat([part.errors(now) for part, now in zip(parts, numbers, strict=True)])
            out.append((stop, errors))
            done = stop
            curve.append({"latent": settings.latent, "hidden": settings.hidden, "ridge": settings.ridge, "epochs": stop})
            curve[-1]["error"] = _mean(errors)
            means = [float(found.nanmean()) for _, found in out]
            gaining = len(out) == 1 or surely_below(errors, out[-2][1])
            late = 2 * stop >= self.model.epochs
            if means[-1] > min(means) or (late and not (gaining and means[-1] < float(alone.nanmean()))):
                break
        return out


class _Part:
    """The seen users without a fold, and the fold, whose users are encoded and judged as new ones."""

    def __init__(self, choice: _Choice, fold: int):
        held = (choice.fold == fold).to(choice.data.user_index.device)[choice.data.user_index]
        learn, other = choice.data[~held], choice.data[held]
        self.direction, self.seed = choice.crowd.directions[:, fold], choice.seed
        self.learn, self.held = (Problem(part, choice.scale, choice.shift, self.direction) for part in (learn, other))
        self.epochs = choice.model.epochs
        self.support, self.query = halves(other, choice.seed)
        self.place = position(other, self.support, choice.seed)

    def path(self, settings: Settings) -> Iterator[Numbers]:
        numbers = variational.start(self.learn, self.direction, settings, self.seed)
        return variational.train(self.learn, numbers, settings, seed=self.seed, epochs=self.epochs)

    def errors(self, numbers: Numbers | None) -> Tensor:
        """(U,) smoothed error (`validation.edge`) over all shots, NaN for a user without query. None is the crowd's reward."""
        held, data = self.held, self.held.data
        if numbers is None:
            scale = held.scale
            numbers = {
                name: scale.new_zeros(_nothing(name, len(scale))) for name in ("first", "bias", "psi", "chi", "joint", "out")
            }
            numbers["log_spread"] = scale.new_zeros(0)
        parts, strict = [], self.query & ~data.tie
        for users in chunks(data.grouped().counts, len(numbers["log_spread"])):
            asked = held.asked(numbers, users)
            parts.append((users, asked, strict[asked.rows]))
        owner = torch.cat([users[asked.owner[kept]] for users, asked, kept in parts])
        weight = torch.cat([data.weight[asked.rows[kept]] for _, asked, kept in parts])
        out, total = (weight.new_zeros(len(data.user_ids)) for _ in range(2))
        total.index_add_(0, owner, weight)
        for shots, counts in SHOTS:
            known = self.place < shots
            margin = torch.cat([asked.margins(numbers, asked.posterior(numbers, known)[0], kept) for _, asked, kept in parts])
            out.index_add_(0, owner, counts * (likelihood.probability(-margin / edge(margin)) * weight).to(out))
        return out / total


def _nothing(name: str, width: int) -> tuple[int, ...]:
    """The shape of a number of a model without z and without a hidden layer."""
    return {"first": (width, 0), "psi": (0, 0), "chi": (0, 0), "joint": (0, 0)}.get(name, (0,))


def _mean(errors: Tensor) -> float | None:
    """None where nobody can be asked: a failure is no number."""
    known = errors[~torch.isnan(errors)]
    return float(known.mean()) if len(known) else None
