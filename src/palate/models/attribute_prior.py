"""An attribute prior: what is known of a person beside their choices moves the mean of the prior over their weights.

Age, region, profession: whatever a caller has of real single persons. It helps before the first choice and for the next few, and
after many choices these alone count, as they do in the model around which this one is built.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models import crowd, trials
from palate.models.columns import Column, Table, checked, columns_of, encoded, moments, standard, unknown_words
from palate.models.hierarchical import Hierarchical
from palate.models.validation import surely_below
from palate.priors import Prior
from palate.solvers import Batch, Solution, batches, posterior

Progress = Callable[[float, str], None]  # (share done, what)

EFFECTS = (0.003, 0.03, 0.3)  # prior variances of an effect, in variances of the population
SHOTS = (0, 1, 2, 5, None)  # choices after which held-out users are judged: an attribute says most before the first
ROUNDS = 3  # of Fisher scoring
LEAST_REST = 0.05  # of the population's variance in any direction that attributes leave unexplained


class AttributePrior(Hierarchical):
    """`Hierarchical` with a prior mean that follows the user's attributes: w_i ~ N(m + A a_i, S') instead of N(m, S).

    The crowd, the base rewards and N(m, S) (or a mixture) are those of `Hierarchical`, fitted without attributes. A is fitted on
    the seen users by maximum a posteriori over their choices, their weights integrated out by Laplace's approximation: with
    everything in standard deviations of the population (B of A, v of w), C_i the posterior covariance of v_i, and
    v_i its mean under N(B a_i, I), Fisher scoring solves

        sum_i (v_i - B a_i - (I - C_i) dB a_i) a_i^T = (B + dB) / effect,    B_kl ~ N(0, effect).

    A user of whom little is known hardly counts, and that posterior means are shrunk does not shrink A. S' = S less what the
    attributes explain, A Cov(a) A^T. The prior variance of an effect, 0 (no effect) included, is chosen by the log loss of
    held-out seen users after 0, 1, 2, 5 and half of their choices; an effect has to win by one standard error. (The crowd and the
    population have seen those users; A has not, and only A is chosen.)

    Numbers are standardised, words are one column each, and what fewer than five seen users have is left out: a column of one
    person would be that person. Whatever of a user is unknown, a word unseen in `fit` included, counts as the mean; somebody
    of whom all is unknown gets the population's prior.

    **Attributes of persons are personal data**, often of special kinds (health, origin, religion), and a reward that follows them
    treats people by their group until they have said what they want. Use them only with a lawful ground and consent, and look at
    what they change. The model keeps the names of attributes and words, and A; the table itself is never saved: after loading,
    `model = model.with_attributes(table)`. `adapt` warns where that was not done.

    Args:
        attributes: user id -> attribute -> a finite number or a word, for seen and new users alike; the same attribute is a
            number for everybody or a word for everybody. None leaves everybody unknown, which is `Hierarchical`.
        base: an unfitted `Hierarchical` with the options to use; never a blend of types, whose weights have no mean to move.
        effect: prior variance of an effect in variances of the population, 0 for none; None chooses among `EFFECTS`.

    Raises:
        DataError: no such mapping; attributes that are neither finite numbers nor words, or both; a negative effect; a base that
            is a blend; when fitted, attributes of nobody who chose.
    Cost: that of `Hierarchical`, and a few posteriors of the seen users.
    """

    effect: Tensor
    rest: Tensor
    centre: Tensor
    size: Tensor

    def __init__(self, attributes: Table | None = None, *, base: Hierarchical | None = None, effect: float | None = None):
        options = (base if base is not None else Hierarchical()).options()
        if options.get("blend"):
            raise DataError("base has blend=True; expected a Hierarchical without: the weights of a blend have no mean to move")
        super().__init__(**options | {"blend": False})
        if effect is not None and not 0 <= effect < float("inf"):
            raise DataError(f"effect is {effect}; expected a number of at least 0, or None to choose it on held-out users")
        self.prior_effect = effect
        self.attributes: Table = checked({} if attributes is None else attributes)
        self.given = attributes is not None  # an empty table says that nobody is known, and none says nothing
        self.columns: tuple[Column, ...] = ()
        self.inference = Informed(self)
        for name in ("effect", "rest"):
            self.register_buffer(name, torch.zeros(0, 0))
        for name in ("centre", "size"):
            self.register_buffer(name, torch.zeros(0))

    def options(self) -> dict[str, Any]:
        return {"base": super().options(), "effect": self.prior_effect, "columns": [list(column) for column in self.columns]}

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> Self:
        out = cls(base=Hierarchical.from_options(options["base"]), effect=options["effect"])
        out.columns = tuple(Column(name, word) for name, word in options["columns"])
        return out

    def like(self, state: Mapping[str, Tensor], **options: Any) -> Self:
        out = super().like(state, **options)
        out.attributes, out.given = self.attributes, self.given
        return out

    def with_attributes(self, attributes: Table) -> Self:
        """The same model with this table of attributes, for users to be adapted: a loaded model has none.

        Profiles stay valid: the table changes what a user's weights are thought to be, not what they mean. The record counts how
        many words of the table the model does not know. Raises `DataError` as the constructor does.
        """
        out = self.like(self.state_dict())
        out.attributes, out.given, out.encoder = checked(attributes), True, self.encoder
        unseen = unknown_words(out.attributes, self.columns)
        out.record = self.record | {"attributes_given": {"users": len(out.attributes), "unseen_words": dict(unseen)}}
        return out

    @property
    def lacks(self) -> str | None:
        if self.given or not self.effect.numel():
            return None
        return (
            "this AttributePrior has learned what attributes say and was given none, so that everybody counts as unknown; "
            "expected model.with_attributes(table) after loading, or with_attributes({}) where nothing is known of anybody"
        )

    def expected(self, users: Sequence[str]) -> Tensor:
        """(U, K) the weights of users of whom no choice is known: the crowd's, moved by what is known of them."""
        return self.crowd_weights + self.shifts(users)[0]

    def expected_covariance(self, users: Sequence[str]) -> Tensor | None:
        """(U, K, K) the prior's second moment about `expected`: less where attributes are known."""
        found, prior, informed = self.crowd_covariance, self.prior, self.informed
        if found is None or prior is None or informed is None:
            return found
        known = self.shifts(users)[1]
        return torch.where(known[:, None, None], found - prior.covariance + informed.covariance, found)

    def shifts(self, users: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A a_i (U, K), 0 where nothing is known of a user, and (U,) whether anything is."""
        if self.effect.numel() == 0:
            nobody = torch.zeros(len(users), dtype=torch.bool, device=self.direction.device)
            return self.crowd_weights.expand(len(users), -1), nobody
        table, known = encoded(self.attributes, users, self.columns)
        return standard(table.to(self.centre), self.centre, self.size) @ self.effect.T, known.to(self.direction.device)

    @property
    def informed(self) -> Prior | None:
        """The prior around A a_i of a user of whom something is known: the population's, less what attributes explain."""
        prior = self.prior
        return prior if prior is None or self.effect.numel() == 0 else narrowed(prior, self.rest)

    def fitted(self, data: EmbeddedPairs, *, seed: int, progress: Progress) -> tuple["AttributePrior", None]:
        base = Hierarchical.from_options(self.options()["base"])
        found, _ = base.fitted(data, seed=seed, progress=lambda share, what: progress(0.9 * share, what))
        if self.attributes and not any(user in self.attributes for user in data.user_ids):
            raise DataError(
                f"the attributes are those of {len(self.attributes)} users, such as {next(iter(self.attributes))!r}, and none of "
                f"them made a choice; expected those of the {len(data.user_ids)} users, such as {data.user_ids[0]!r}"
            )
        columns, rare = columns_of(self.attributes, data.user_ids)
        table, known = encoded(self.attributes, data.user_ids, columns)
        record: dict[str, Any] = {"hierarchical": found.record["selection"]}
        record["attributes"] = {"users": int(known.sum()), "columns": len(columns), "rare": dict(rare)}
        numbers = dict(found.state_dict())
        chosen = 0.0
        if found.prior is not None and found.n_weights and columns and bool(known.any()):
            centre, size = moments(table, columns)
            learning = _Learning(found, data, standard(table.double(), centre, size).to(found.direction), known)
            chosen = self._chosen(learning, seed, record) if self.prior_effect is None else self.prior_effect
            if chosen:
                effect, rest = learning.fit(chosen, known)
                numbers |= {"effect": effect, "rest": rest}
                numbers |= {"centre": centre.to(effect), "size": size.to(effect)}
        kept = [list(column) for column in columns] if chosen else []
        out = self.like(numbers, columns=kept, base=found.options())
        out.record["selection"] = record | {"effect": chosen}
        progress(1.0, "attributes")
        return out, None

    def _chosen(self, learning: "_Learning", seed: int, record: dict[str, Any]) -> float:
        """The prior variance of an effect that held-out users surely gain by; 0 for none."""
        data = learning.data
        fold = crowd.user_folds(len(data.user_ids), seed)
        losses = torch.full((1 + len(EFFECTS), len(data.user_ids)), torch.nan, dtype=torch.float64)
        trial = trials.Trial(data, seed)
        for f in range(int(fold.max()) + 1):
            out = (fold == f) & learning.known.cpu()
            found = [learning.fit(effect, learning.known & (fold != f).to(learning.known)) for effect in EFFECTS]
            if bool(out.any()):
                held = torch.nonzero(out)[:, 0].to(data.user_index.device)
                losses[:, out] = learning.judged(trial, held, found)[:, held].cpu().double()
        curve = [trials.mean(row) for row in losses]
        record |= {"effects": [0.0, *EFFECTS], "log_loss": curve}
        best = min(range(len(curve)), key=lambda i: (curve[i] != curve[i], curve[i]))  # what nobody measured comes last
        return (0.0, *EFFECTS)[best] if surely_below(losses[best], losses[0]) else 0.0


class _Learning:
    """The seen users' choices as a fitted `Hierarchical` sees them, and their attributes (U, A), standardised."""

    def __init__(self, base: Hierarchical, data: EmbeddedPairs, table: Tensor, known: Tensor):
        prior = base.prior
        if prior is None:
            raise DataError("the population has no prior; expected a Hierarchical that found people to differ")
        self.prior, self.data, self.table, self.known = prior, data, table, known.to(table.device)
        offset, slopes = base.design(base.features(data.embeddings))
        self.offset = offset[data.chosen] - offset[data.rejected]
        self.slopes = slopes[data.chosen] - slopes[data.rejected]
        self.gaussian = Prior.gaussian(prior.covariance, prior.mean)  # of the same moments, where it is a mixture

    def fit(self, effect: float, learn: Tensor) -> tuple[Tensor, Tensor]:
        """A (K, A), and the matrix that narrows deviations from the population's mean, from the users `learn` (U,)."""
        factor = self.gaussian.factors[0]
        users, table = torch.nonzero(learn)[:, 0], self.table
        found = table.new_zeros(len(factor), table.shape[1])
        counts = self.data.grouped().counts[users]
        parts = [users[rows] for rows in batches(counts, len(factor))]
        for _ in range(ROUNDS):
            pull, gains = -found / effect, []
            for rows in parts:
                mine = table[rows] @ found.T
                solved = posterior(moved(self._batch(rows), mine @ factor.T), self.gaussian, tolerance=1e-4)
                inner = torch.linalg.solve_triangular(factor, (solved.mean - self.gaussian.means[0]).T, upper=False)
                pull = pull + inner @ table[rows]
                if solved.covariance is None:
                    raise DataError("a posterior came without its covariance")
                half = torch.linalg.solve_triangular(factor, solved.covariance, upper=False)
                spread = torch.linalg.solve_triangular(factor, half.mT, upper=False)  # L^-1 C L^-T
                gains.append(torch.eye(len(factor)).to(spread) - spread)
            found = found + _scored(pull, torch.cat(gains), table[torch.cat(parts)], 1 / effect)
        spread = table[users].T @ table[users] / len(users)
        value, axes = torch.linalg.eigh((torch.eye(len(found)).to(found) - found @ spread @ found.T).double())
        root = ((axes * value.clamp(min=LEAST_REST).sqrt()) @ axes.T).to(found)
        rest = torch.linalg.solve_triangular(factor, factor @ root, upper=False, left=False)
        return factor @ found, rest

    def judged(self, trial: trials.Trial, held: Tensor, found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(1 + C, U) losses with no effect and with each of the effects."""
        priors = [narrowed(self.prior, rest) for _, rest in found]

        def solve(batch: Batch, users: Tensor) -> list[Tensor]:
            some = (batch.weight > 0).any(1)[:, None]  # without a choice the crowd's weights, 0, are moved and not the mean
            out = [torch.where(some, posterior(batch, self.prior, tolerance=1e-3, covariance=False).mean, 0.0)]
            for (effect, _), prior in zip(found, priors, strict=True):
                shift = self.table[users] @ effect.T
                solved = posterior(moved(batch, shift), prior, tolerance=1e-3, covariance=False).mean
                out.append(shift + torch.where(some, solved, 0.0))
            return out

        return trial.losses(held, self.offset, self.slopes.__getitem__, self.slopes.shape[1], solve, SHOTS)

    def _batch(self, users: Tensor) -> Batch:
        index, real = self.data.grouped().padded(users)
        tie = self.data.tie[index] if bool(self.data.tie.any()) else None
        return Batch(self.slopes[index], self.offset[index] * real, self.data.weight[index].to(self.slopes) * real, tie)


def _scored(pull: Tensor, gains: Tensor, table: Tensor, precision: float, steps: int = 200) -> Tensor:
    """X (K, A) with sum_i G_i X a_i a_i^T + precision X = pull, by conjugate gradients; G (U, K, K), a (U, A)."""
    out, remains = torch.zeros_like(pull), pull
    ahead, power = remains, remains.square().sum()
    enough = 1e-12 * power
    for _ in range(steps):
        if float(power) <= float(enough):
            break
        pushed = torch.bmm(gains, (table @ ahead.T)[..., None])[..., 0].T @ table + precision * ahead
        length = power / (ahead * pushed).sum()
        out, remains = out + length * ahead, remains - length * pushed
        power, before = remains.square().sum(), power
        ahead = remains + power / before * ahead
    return out


def moved(batch: Batch, shift: Tensor) -> Batch:
    """The same choices as functions of w - shift, (U, K)."""
    return batch._replace(offset=batch.margins(shift))


def narrowed(prior: Prior, rest: Tensor) -> Prior:
    """The prior of mean + rest (w - mean) for w from this prior."""
    mean = prior.mean
    away = Prior(prior.share, prior.means - mean, prior.factors).rotated(rest)
    return Prior(away.share, away.means + mean, away.factors)


class Informed:
    """Laplace posterior under each user's own prior: around A a_i where attributes are known, else the population's."""

    def __init__(self, model: AttributePrior):
        self.model = model

    def solve(self, batch: Batch, prior: Prior | None, users: tuple[str, ...], *, covariance: bool = True) -> Solution:
        informed = self.model.informed
        if prior is None or informed is None:
            raise DataError(
                "a posterior needs a prior over the weights, and this model has none; expected a fitted model with one"
            )
        shift, known = self.model.shifts(users)
        shift = shift.to(batch.slopes)
        if not bool(known.any()):
            return posterior(batch, prior, covariance=covariance)
        own = posterior(moved(batch, shift), informed, covariance=covariance)
        own = own._replace(mean=own.mean + shift)
        others = torch.nonzero(~known)[:, 0]
        if not len(others):
            return own
        theirs = posterior(batch.at(others), prior, covariance=covariance)
        for mine, their in zip(own, theirs, strict=True):
            if mine is not None and their is not None:
                mine[others] = their
        return own
