"""Ideal points: projectors of features, and the weights of prototypes that a user's choices speak for (PAL, arXiv 2406.08469).

A pair is an offset and K slopes; where the reward is a cosine it is also the Gram matrix of the prototypes, whose mixture has to
be divided by its length. Users are rows of a padded batch, and a user's weights are a point of the probability simplex.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

from palate import likelihood
from palate.solvers import Solution

TINY = 1e-12  # least squared length of a mixture: nothing is divided by zero


@dataclass(frozen=True)
class Layers:
    """`parts` projectors of one shape, each linear layers with GELU between them: (N, D) -> (N, parts, width).

    The first layer (D, parts `first`) is the only one that reads the features, so it is kept apart; the rest, from the first
    layer's bias on, is one flat row of numbers.
    """

    hidden: tuple[int, ...]
    width: int
    parts: int = 1

    @property
    def first(self) -> int:
        return (*self.hidden, self.width)[0]

    @property
    def n_rest(self) -> int:
        return self.parts * (self.first + sum(i * o + o for i, o in pairwise((*self.hidden, self.width))))

    def unpacked(self, rest: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """Of every layer its weights (parts, in, out), None for the first one, and its bias (parts, 1, out): views of `rest`."""
        sizes = list(pairwise((*self.hidden, self.width)))
        yield None, rest[: self.parts * self.first].view(self.parts, 1, self.first)
        start = self.parts * self.first
        for i, o in sizes:
            weight = rest[start : start + self.parts * i * o].view(self.parts, i, o)
            start += self.parts * i * o
            yield weight, rest[start : start + self.parts * o].view(self.parts, 1, o)
            start += self.parts * o

    def __call__(self, entered: Tensor, rest: Tensor) -> Tensor:
        """(N, parts first) products of features with the first layer -> (N, parts, width)."""
        out = entered.view(-1, self.parts, self.first).transpose(0, 1)  # (parts, N, first)
        for weight, bias in self.unpacked(rest):
            out = out + bias if weight is None else torch.baddbmm(bias, gelu(out), weight)
        return out.transpose(0, 1)


class Asked(NamedTuple):
    """Choices as functions of weights w on the simplex: margin = offset + slopes . w, divided by sqrt(w' gram w) where given."""

    offset: Tensor  # (...)
    slopes: Tensor  # (..., K)
    gram: Tensor | None  # (..., K, K)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Asked":
        """The same with `change` made to each part."""
        return Asked(change(self.offset), change(self.slopes), None if self.gram is None else change(self.gram))

    def margins(self, w: Tensor) -> Tensor:
        """(..., K) weights -> (...)."""
        inner = (self.slopes * w).sum(-1)
        return self.offset + (inner if self.gram is None else inner / self._length(w)[0])

    def jacobian(self, w: Tensor) -> Tensor:
        """(..., K) d margin / d w."""
        if self.gram is None:
            return self.slopes
        length, pushed = self._length(w)
        inner = (self.slopes * w).sum(-1, keepdim=True)
        return self.slopes / length[..., None] - inner * pushed / length[..., None] ** 3

    def _length(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(w' gram w) (...) and gram w (..., K)."""
        assert self.gram is not None
        pushed = (self.gram @ w[..., None])[..., 0]
        return (pushed * w).sum(-1).clamp(min=TINY).sqrt(), pushed


def cosine(text: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """(N, d) texts of length one, (N, K, d) points -> (N, K) products and the points' (N, K, K) Gram matrices."""
    return torch.einsum("nd,nkd->nk", text, points), points @ points.mT


def normalised(text: Tensor) -> Tensor:
    """(N, d) with rows of length one."""
    return text / text.square().sum(-1, keepdim=True).clamp(min=TINY).sqrt()


def weights_at_mode(
    asked: Asked,
    weight: Tensor,
    tie: Tensor | None,
    centre: Tensor,
    strength: Tensor | float,
    *,
    start: Tensor | None = None,
    max_steps: int = 60,
    tolerance: float = 1e-6,
) -> Solution:
    """Each user's most probable weights under w ~ Dirichlet(1 + strength centre).

    Minimises sum_j weight_j nll(margin_j(w)) - strength sum_k centre_k log w_k over the simplex. The prior's mode is `centre`, so
    that somebody without choices is there exactly, and `strength` counts choices: it says how many speak against leaving the
    centre. Damped Newton steps on logits, Gauss-Newton where the objective is hollow: with margins linear in w the problem is
    convex and its minimum, inside the simplex, is the only stationary point; with a cosine (whose own curvature is left out) it
    is the one that the descent from the centre reaches.

    Args:
        asked: (U, n) choices. weight: (U, n), 0 where there is none. tie: (U, n) bool or None.
        centre: (K,) positive, sums to one. strength: above 0, or (U,) of them.
        start: (U, K) weights to begin at; the centre by default.
    Cost: O(U (n K^2 + K^3)) a step, in float64; about ten steps.
    """
    users, _, k = asked.slopes.shape
    like = asked.slopes
    asked = asked.mapped(Tensor.double)
    weight, centre = weight.double(), (centre.double() / centre.double().sum()).clamp(min=1e-9)
    pull = torch.as_tensor(strength, dtype=torch.float64, device=weight.device).expand(users)[:, None]
    first = centre.expand(users, k) if start is None else start.double().clamp(min=1e-9)
    logits = first.log() - first.log().mean(1, keepdim=True)
    eye = torch.eye(k, dtype=torch.float64, device=weight.device)

    def at(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Objective (U,), weights and margins."""
        log_w = logits.log_softmax(1)
        w = log_w.exp()
        margin = asked.margins(w[:, None])
        return (likelihood.nll(margin, tie) * weight).sum(1) - pull[:, 0] * (log_w @ centre), w, margin

    current, w, margin = at(logits)
    done = torch.zeros(users, dtype=torch.bool, device=weight.device)
    for _ in range(max_steps):
        slope = (likelihood.gradient(margin, tie) * weight)[..., None]
        jacobian = asked.jacobian(w[:, None])
        uneven = w * ((slope * jacobian).sum(1) - ((slope * jacobian).sum(1) * w).sum(1, keepdim=True))
        gradient = uneven + pull * (w - centre)
        root = w[:, None] * (jacobian - (jacobian * w[:, None]).sum(2, keepdim=True))
        root = root * (likelihood.curvature(margin) * weight).sqrt()[..., None]
        spread = torch.diag_embed(w) - w[:, :, None] * w[:, None, :]
        # All ones is the direction that softmax does not see; the small ridge keeps steps finite beside a corner.
        bowl = root.mT @ root + pull[..., None] * (spread + 1 / k**2 + 1e-6 * eye)
        bend = torch.diag_embed(uneven) - uneven[:, :, None] * w[:, None, :] - w[:, :, None] * uneven[:, None, :]
        factor, hollow = torch.linalg.cholesky_ex(bowl + bend)
        if bool(hollow.any()):
            factor = torch.where((hollow > 0)[:, None, None], torch.linalg.cholesky(bowl), factor)
        step = -torch.cholesky_solve(gradient[..., None], factor)[..., 0]
        step = step * (4 / step.abs().amax(1, keepdim=True).clamp(min=4))
        downhill, length = (gradient * step).sum(1), torch.ones_like(current)
        for _ in range(40):
            trial = logits + length[:, None] * step
            reached, ahead, margin = at(trial)
            # Rounding must not read as an increase.
            worse = reached > current + 1e-4 * length * downhill + 1e-13 * (1 + current.abs())
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        done = (ahead - w).abs().amax(1) <= tolerance
        logits, current, w = trial, reached, ahead
        if bool(done.all()):
            break
    return Solution(w.to(like), None, None, done)


class Leaf(NamedTuple):
    """Something to be trained: at which rate, with which L2 penalty in its gradient, and which share of it a step takes away."""

    value: Tensor
    rate: float
    penalty: float = 0.0
    decay: float = 0.0


class Adam:
    """Adam (Kingma and Ba 2015), with the decay of AdamW beside it; `torch.optim` takes seconds to import."""

    def __init__(self, leaves: Sequence[Leaf]):
        self.leaves, self.taken = [leaf._replace(value=leaf.value.requires_grad_()) for leaf in leaves], 0
        self._moments = [(torch.zeros_like(leaf.value), torch.zeros_like(leaf.value)) for leaf in leaves]

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        gradients = torch.autograd.grad(loss, [leaf.value for leaf in self.leaves])
        self.taken += 1
        for leaf, (first, second), gradient in zip(self.leaves, self._moments, gradients, strict=True):
            pull = gradient.add(leaf.value, alpha=leaf.penalty) if leaf.penalty else gradient
            first.lerp_(pull, 0.1)
            second.mul_(0.999).addcmul_(pull, pull, value=0.001)
            size = (second / (1 - 0.999**self.taken)).sqrt_().add_(1e-8)
            leaf.value.mul_(1 - leaf.decay).addcdiv_(first, size, value=-leaf.rate / (1 - 0.9**self.taken))
