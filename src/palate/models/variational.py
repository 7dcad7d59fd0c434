"""A user as a latent z: the networks of `VPL()` (arXiv 2408.10075), and how they are learned.

The decoder is reward(e, z) = mu . e + z . psi(e) + M(e, z) - M(e, 0): the crowd's reward, a part linear in z, and a hidden layer
that reads text and z together. At z = 0, the mean of the prior, it is the crowd's reward to the bit.

The encoder rests on two facts. Choices are independent given z, so the posterior is the prior times one factor for each choice
(a product of Gaussian experts; arXiv 1802.05335): their order is forgotten, their number is not, and no choice leaves the prior.
And a choice speaks of z only through a difference of two rewards, so its factor follows from d = chi(chosen) - chi(rejected) and
the margin m foreseen so far: precision c(m) d d^T and pull -g(m) d, the curvature and the gradient of its loss. A few rounds let
every factor see the margins that all of them predict, which is what attention among the choices is for. No parameter of a user is
ever fitted to the user's choices: chi is learned from choices that the encoder was not given.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import leaky_relu

from palate import likelihood
from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.models import pulls
from palate.models.meta import keyed_order
from palate.models.validation import halves, position

Numbers = dict[str, Tensor]  # by name: what is learned

SLOPE = 0.2  # of the leaky rectifier below zero, as published
ROUNDS = 3  # of the encoder; six change no accuracy on votes by more than .002
SIZES = (1, 2, 5, None)  # choices in a context; None is half of a user's
MARGIN_VARIANCE = 4.0  # of the personal part before any learning, in squared log-odds
PENALISED = ("first", "psi", "chi")


@dataclass(frozen=True)
class Settings:
    """What is learned and how.

    Args:
        latent: K, the size of z.
        hidden: units of the hidden layer; 0 leaves a reward linear in the embedding for every z.
        ridge: ridge / 2 |V|^2 of the first layer, psi and chi, on features scaled to rows of norm about one.
        kl: beta, what a nat of KL counts against a nat of a query's loss; 1 is the evidence bound.
        rate: of Adam for the first layer; what is not as wide as the embeddings learns at a fifth of it.
        batch: users a step.
    """

    latent: int = 16
    hidden: int = 64
    ridge: float = 3e-4
    kl: float = 0.3
    rate: float = 0.05
    batch: int = 64


class Onto(torch.autograd.Function):
    """x W for the rows x = e * scale of a table, with x^T G as its derivative: D enters once forward and once back."""

    @staticmethod
    def forward(ctx: FunctionCtx, directions: Tensor, table: Embeddings, scale: Tensor) -> Tensor:
        ctx.table, ctx.scale = table, scale  # type: ignore[attr-defined]
        return table.project(scale[:, None] * directions)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        back: Tensor = ctx.table.back(gradients[0])  # type: ignore[attr-defined]
        return ctx.scale[:, None] * back, None, None  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Texts:
    """What the networks make of texts before z is known; any leading shape."""

    common: Tensor  # (...,) the crowd's reward
    psi: Tensor  # (..., K) the part of the decoder that is linear in z
    chi: Tensor  # (..., K) what the encoder reads
    units: Tensor  # (..., H) inputs of the hidden layer, to which z is added

    @classmethod
    def read(cls, common: Tensor, first: Tensor, numbers: Numbers) -> "Texts":
        """From the crowd's reward (N,) and the outputs (N, K + H) of the first layer."""
        k = len(numbers["log_spread"])
        straight, units = first[:, :k], first[:, k:] + numbers["bias"]
        bent = leaky_relu(units, SLOPE)
        return cls(common, straight + bent @ numbers["psi"], straight + bent @ numbers["chi"], units)

    def packed(self) -> Tensor:
        """(..., 1 + 2 K + H): side by side."""
        return torch.cat([self.common[..., None], self.psi, self.chi, self.units], dim=-1)

    @classmethod
    def unpacked(cls, packed: Tensor, k: int) -> "Texts":
        return cls(packed[..., 0], packed[..., 1 : 1 + k], packed[..., 1 + k : 1 + 2 * k], packed[..., 1 + 2 * k :])

    def __getitem__(self, rows: Tensor) -> "Texts":
        return Texts(self.common[rows], self.psi[rows], self.chi[rows], self.units[rows])

    def rewards(self, z: Tensor, numbers: Numbers) -> Tensor:
        """(...,) the decoder at z (..., K)."""
        out = self.common + (self.psi * z).sum(-1)
        if not self.units.shape[-1]:
            return out
        moved = leaky_relu(self.units + z @ numbers["joint"], SLOPE) - leaky_relu(self.units, SLOPE)
        return out + moved @ numbers["out"]


def encoded(difference: Tensor, margin: Tensor, weight: Tensor, tie: Tensor | None, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior of z given a user's choices, one user a row: mean (U, K) and precision (U, K, K). O(U n K^2).

    A tie pulls towards equal rewards: its gradient vanishes where the margin does.

    Args:
        difference: (U, n, K) chi(chosen) - chi(rejected). margin: (U, n) of the crowd's reward. weight: (U, n), 0 for no choice.
        spread: (K,) standard deviations of the prior, N(0, diag(spread^2)).
    """
    prior = torch.diag_embed(spread**-2)
    mean, precision = difference.new_zeros(len(difference), difference.shape[2]), prior.expand(len(difference), -1, -1)
    for _ in range(ROUNDS):
        ahead = (difference @ mean[..., None])[..., 0]
        curved = weight * likelihood.curvature(margin + ahead)
        pull = curved * ahead - weight * likelihood.gradient(margin + ahead, tie)
        precision = prior + difference.mT @ (curved[..., None] * difference)
        mean = torch.cholesky_solve(difference.mT @ pull[..., None], torch.linalg.cholesky(precision))[..., 0]
    return mean, precision


def divergence(mean: Tensor, precision: Tensor, spread: Tensor) -> Tensor:
    """(U,) KL(N(mean, precision^-1) || N(0, diag(spread^2))) in nats."""
    factor, narrow = torch.linalg.cholesky(precision), spread**-2
    variance = torch.diagonal(torch.cholesky_inverse(factor), dim1=-2, dim2=-1)
    log_dets = 2 * spread.log().sum() + 2 * torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)
    return (((variance + mean.square()) * narrow).sum(-1) - len(spread) + log_dets) / 2


def active_units(mean: Tensor, spread: Tensor) -> int:
    """Coordinates of z whose posterior mean (U, K) varies over users by more than .01 of the prior's variance (arXiv 1509.00519).

    None of them: the posterior has collapsed, and everybody is told the same.
    """
    return int(((mean / spread).var(0, correction=0) > 0.01).sum()) if len(mean) else 0


class Problem:
    """The choices of some users. Features are x = e * scale - shift."""

    def __init__(self, data: EmbeddedPairs, scale: Tensor, shift: Tensor, direction: Tensor):
        self.data, self.scale, self.shift = data, scale, shift
        self.tie = data.tie if bool(data.tie.any()) else None
        used, where = torch.unique(torch.cat([data.chosen, data.rejected]), return_inverse=True)
        self.table, (self.chosen, self.rejected) = data.embeddings.take(used), where.reshape(2, -1)
        self.common = self.table.project((scale * direction)[:, None])[:, 0]
        self._drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def asked(self, numbers: Numbers, users: Tensor) -> "Asked":
        """All choices of these users with what the networks make of their texts."""
        index, real = self.data.grouped().padded(users)
        rows = index[real]
        wanted, table, common = torch.cat([self.chosen[rows], self.rejected[rows]]), self.table, self.common
        if len(wanted) < len(common):
            used, wanted = torch.unique(wanted, return_inverse=True)
            table, common = table.take(used), common[used]
        first: Tensor = Onto.apply(numbers["first"], table, self.scale)  # type: ignore[no-untyped-call]
        texts = Texts.read(common, first - self.shift @ numbers["first"], numbers)
        return Asked(self, index, real, texts, *wanted.reshape(2, -1))

    def contexts(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """(P,) masks of contexts and queries, which share nothing; of a user's contexts only 1, 2, 5 or all, by chance.

        Remembered: drawing costs as much as learning.
        """
        if (seed, epoch) not in self._drawn:
            data, key = self.data, 1000 * seed + epoch + 1
            support, query = halves(data, key)
            generator = torch.Generator().manual_seed(key)
            most = torch.tensor([len(data) if size is None else size for size in SIZES])
            most = most[torch.randint(len(SIZES), (len(data.user_ids),), generator=generator)].to(query.device)
            self._drawn[seed, epoch] = support & (position(data, support, key) < most[data.user_index]), query
        return self._drawn[seed, epoch]


@dataclass(frozen=True, eq=False)
class Asked:
    """The choices of a batch of B users: padded (B, n), and flat (P,) in the order of their padded places."""

    problem: Problem
    index: Tensor  # (B, n) rows of the data
    real: Tensor  # (B, n)
    texts: Texts
    chosen: Tensor  # (P,) places in `texts`
    rejected: Tensor  # (P,)

    def posterior(self, numbers: Numbers, context: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, K) and precision (B, K, K) of z, given the choices in the mask `context` over all choices of the data."""
        texts, real, data = self.texts, self.real, self.problem.data
        difference = texts.chi.new_zeros(*real.shape, texts.chi.shape[1])
        margin = texts.common.new_zeros(real.shape)
        difference[real] = texts.chi[self.chosen] - texts.chi[self.rejected]
        margin[real] = texts.common[self.chosen] - texts.common[self.rejected]
        tie = None if self.problem.tie is None else self.problem.tie[self.index]
        weight = (data.weight[self.index] * (real & context[self.index])).to(margin)
        return encoded(difference, margin, weight, tie, numbers["log_spread"].exp())

    def margins(self, numbers: Numbers, z: Tensor, kept: Tensor) -> Tensor:
        """(Q,) margins of the choices in the mask `kept` (P,), each at its own user's z (B, K)."""
        own = z[self.owner[kept]]
        good, bad = (self.texts[side[kept]].rewards(own, numbers) for side in (self.chosen, self.rejected))
        return good - bad

    @property
    def rows(self) -> Tensor:
        """(P,) rows of the data."""
        return self.index[self.real]

    @property
    def owner(self) -> Tensor:
        """(P,) users of the batch."""
        return torch.nonzero(self.real)[:, 0]


def objective(problem: Problem, numbers: Numbers, users: Tensor, masks: tuple[Tensor, Tensor], kl: float) -> Tensor:
    """Mean over users of (sum_j nll(margin_j(z)) + kl KL(q || prior)) / n over their n queries, q given the contexts alone.

    z is the mean of q, as it is whenever the model is used. Drawn from q instead, as in the evidence bound, it learns less of a
    user (votes on statements, one split: .864 of unseen choices told after 40 epochs, against .879 after ten).
    """
    context, query = masks
    asked = problem.asked(numbers, users)
    z, precision = asked.posterior(numbers, context)
    kept = query[asked.rows]
    rows, owner = asked.rows[kept], asked.owner[kept]
    weight = problem.data.weight[rows].to(z)
    loss = likelihood.nll(asked.margins(numbers, z, kept), None if problem.tie is None else problem.tie[rows]) * weight
    total = z.new_zeros(len(users)).index_add_(0, owner, loss)
    count = z.new_zeros(len(users)).index_add_(0, owner, weight)
    told = count > 0
    bound = (total + kl * divergence(z, precision, numbers["log_spread"].exp()))[told] / count[told]
    return bound.sum() / max(1, int(told.sum()))


def train(problem: Problem, numbers: Numbers, settings: Settings, *, seed: int, epochs: int) -> Iterator[Numbers]:
    """The numbers after each epoch: Adam (Kingma and Ba 2015), clipped at norm 1, over batches of users in random order."""
    now, steps = dict(numbers), 0
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in numbers.items()}
    for epoch in range(epochs):
        masks = problem.contexts(seed, epoch)
        order = keyed_order(len(problem.data.user_ids), seed, epoch).to(problem.chosen.device)
        for users in torch.split(order, settings.batch):
            with torch.enable_grad():
                leaves = {name: value.detach().requires_grad_() for name, value in now.items()}
                loss = objective(problem, leaves, users, masks, settings.kl)
                loss = loss + settings.ridge / 2 * torch.stack([leaves[name].square().sum() for name in PENALISED]).sum()
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            gradients = {n: torch.zeros_like(now[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            steps += 1
            for name, gradient in gradients.items():
                gradient = gradient * (1 / (norm + 1e-6)).clamp(max=1.0)
                first, second = moments[name]
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
                rate = settings.rate * (1.0 if name == "first" else 0.2) / (1 - 0.9**steps)
                now[name] = now[name] - rate * first / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
                moments[name] = first, second
        yield dict(now)


def start(problem: Problem, direction: Tensor, settings: Settings, seed: int) -> Numbers:
    """Where learning begins: the directions in which users' choices pull away from the crowd's reward.

    The pull of a user is the gradient of their log-likelihood there, sum_j -g(m_j) (y_chosen - y_rejected), over the features and
    the outputs of the hidden layer, which begins at random; the leading right singular vectors of the pulls, centred over users,
    are psi and chi, each with margins of equal variance. The hidden layer's part that z enters begins silent. O(P D), and what
    `pulls.leading` takes.
    """
    data, scale, h = problem.data, problem.scale, settings.hidden
    generator = torch.Generator().manual_seed(seed)
    sizes = ((len(scale), h), (h,), (settings.latent, h))
    drawn, bias, joint = (torch.randn(*size, generator=generator).to(scale) for size in sizes)
    units = problem.table.project(scale[:, None] * drawn) - problem.shift @ drawn + bias  # of about unit size, as |x| is
    wide = leaky_relu(units, SLOPE) / max(1, h) ** 0.5
    margin = problem.common[problem.chosen] - problem.common[problem.rejected]
    slope = -likelihood.gradient(margin, data.tie) * data.weight.to(margin)
    design = data.differences()
    mine, owner = pulls.of_few(data)
    found = slope.new_zeros(int(owner.max()) + 1, len(scale) + h)
    for rows in torch.split(mine, 4096):
        both = [design.rows(rows) * scale, wide[problem.chosen[rows]] - wide[problem.rejected[rows]]]
        found.index_add_(0, owner[rows], torch.cat(both, dim=1) * slope[rows, None])
    axes = pulls.leading(found - found.mean(0), settings.latent)  # (D + H, K)
    k = axes.shape[1]
    told = problem.table.project(scale[:, None] * axes[: len(scale)]) + wide @ axes[len(scale) :]
    told = told[problem.chosen] - told[problem.rejected]
    axes = axes * (MARGIN_VARIANCE / max(1, k) / told.square().mean(0).clamp(min=1e-30)).sqrt()
    bent = axes[len(scale) :] / max(1, h) ** 0.5
    numbers = {"first": torch.cat([axes[: len(scale)], drawn], dim=1), "bias": bias, "psi": bent, "chi": bent.clone()}
    return numbers | {"joint": joint[:k] / max(1, k) ** 0.5, "out": scale.new_zeros(h), "log_spread": scale.new_zeros(k)}
