"""Learning to adapt: the inner loop that turns a user's choices into weights, and the outer loop that learns where it starts.

The inner loop sees K numbers a pair and never the D of the embeddings; it is written with closed-form gradients, batched over
users, and is itself differentiable, so the meta-gradient is one ordinary backward pass. The outer loop is a plain generator of
epochs whose state can be saved and resumed to the same bits: a draw is keyed by seed and epoch, never by the draws before it.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.function import FunctionCtx

from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError, ModelFileError
from palate.models import files
from palate.models.crowd import Rescaled
from palate.models.objectives import Objective
from palate.solvers import Batch, Laplace, newton

Numbers = dict[str, Tensor]  # by name: what is learned, and constants
LEARNED = ("bases", "hidden", "start")


class Inner(Protocol):
    """How a user's choices move the K numbers from where everybody starts; differentiable in the slopes and in the start."""

    def moved(self, support: Batch, start: Tensor, spread: Tensor, *, simplex: bool) -> Tensor: ...


@dataclass(frozen=True)
class GradientSteps:
    """`steps` steps at `rate` on the mean loss of the support, from the common start: MRM's inner loop.

    w <- w - rate g (gradient descent) or a fresh Adam (betas .9 and .999, eps 1e-8; Kingma and Ba 2015), where g is the gradient
    of mean_j nll(margin_j) in the K numbers (logits of the mixture where it is a simplex). With one Adam step and K = 2 on the
    simplex this is w0 +- rate (1, -1): one bit of the user. `second_order` differentiates through g, otherwise g is a constant
    to the meta-gradient. O(steps U n K).
    """

    rate: float = 1e-3
    steps: int = 1
    adam: bool = True
    second_order: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 < self.rate < math.inf:
            raise DataError(
                f"steps is {self.steps} and rate {self.rate}; expected no negative number of steps, a finite rate > 0"
            )

    def moved(self, support: Batch, start: Tensor, spread: Tensor, *, simplex: bool) -> Tensor:
        """(U, K) numbers of every user; a user without support stays at the start."""
        share = support.weight / support.weight.sum(1, keepdim=True).clamp(min=1e-12)
        point = start.expand(len(share), -1)
        first = second = torch.zeros_like(point)
        for step in range(1, self.steps + 1):
            weights = point.softmax(1) if simplex else point
            slope = likelihood.gradient(support.margins(weights), support.tie) * share
            pull = torch.bmm(support.slopes.mT, slope[..., None])[..., 0]
            if simplex:
                pull = weights * (pull - (weights * pull).sum(1, keepdim=True))
            if not self.second_order:
                pull = pull.detach()
            if self.adam:
                first, second = 0.9 * first + 0.1 * pull, 0.999 * second + 0.001 * pull.square()
                # The root has no slope at zero: a gradient that underflows must be no step, not NaN.
                seen = second > 0
                size = torch.where(seen, second, torch.ones_like(second)).div(1 - 0.999**step).sqrt() + 1e-8
                pull = torch.where(seen, first / (1 - 0.9**step) / size, torch.zeros_like(first))
            point = point - self.rate * pull
        return point


@dataclass(frozen=True)
class ExactSolve:
    """The most likely weights under w ~ N(w0, diag(spread^2)): MAP by Newton's method, what infinitely many steps tend to.

    The meta-gradient is that of the solution by the implicit function theorem, dw = -H^-1 d(gradient), H the Hessian at the
    solution: one differentiable Newton step from the solution, which moves nothing and carries the derivative. Without
    `implicit` the solution is a constant (first order). Costs as `solvers.newton`.
    """

    implicit: bool = True

    def moved(self, support: Batch, start: Tensor, spread: Tensor, *, simplex: bool) -> Tensor:
        """(U, K) weights of every user; a user without support stays at the start."""
        white = Batch(support.slopes * spread, support.offset + support.slopes @ start, support.weight, support.tie)
        known = Batch(white.slopes.detach(), white.offset.detach(), white.weight, white.tie)
        point = newton(known, tolerance=1e-3)[0]
        if self.implicit:
            slope = likelihood.gradient(white.margins(point), white.tie) * white.weight
            unrest = torch.bmm(white.slopes.mT, slope[..., None])[..., 0] + point
            point = point - (Laplace.at(known, point).covariance() @ unrest[..., None])[..., 0]
        return start + spread * point if self.implicit else (start + spread * point).detach()


@dataclass(frozen=True)
class Outer:
    """How the shared numbers are learned: Adam at `rate` over batches of users.

    Args:
        rate: the peak of the schedule.
        batch: users a step.
        epochs: passes over the users.
        schedule: "cosine" to zero or "constant", after a linear rise over the share `warmup` of the steps.
        clip: most norm of the gradient.
        ridge: added to the gradient of the matrices of the bases, times themselves: ridge / 2 |V|^2 in the objective.
    """

    rate: float = 1e-3
    batch: int = 2
    epochs: int = 200
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    ridge: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.rate < math.inf and self.clip > 0) or self.batch < 1 or self.epochs < 0 or not 0 <= self.warmup < 1:
            raise DataError(f"{self}; expected positive rate, batch and clip, no negative epochs, warmup in [0, 1)")
        if self.schedule not in ("cosine", "constant"):
            raise DataError(f"schedule is {self.schedule!r}; expected 'cosine' or 'constant'")

    def at(self, step: int, n_users: int) -> float:
        """The rate of step 0, 1, ...: 0 at first where there is a warm-up, as in the published schedule."""
        total = -(-n_users // self.batch) * self.epochs  # users left over at the end of an epoch make a step too
        rise = int(self.warmup * total)
        if step < rise:
            return self.rate * step / rise
        if self.schedule == "constant":
            return self.rate
        done = (step - rise) / max(1, total - rise)
        return self.rate * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, eq=False)
class State:
    """Where training stands: enough to go on to the same bits.

    Attributes:
        epoch, steps: passes and steps done.
        numbers: what is learned, Adam's two moments of each (`first.` and `second.` before the name), and the constants.
        head: what the run belongs to (seed, data, options, plan): JSON-able.
    """

    epoch: int
    steps: int
    numbers: Numbers
    head: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. It holds no user."""
        # One key, because safetensors writes several in random order and the same state should be the same bytes.
        head = {"format": "palate-training", "version": 1, "epoch": self.epoch, "steps": self.steps, "head": self.head}
        meta = {"state": json.dumps(head)}
        files.write_tensors(path, self.numbers, meta)

    @classmethod
    def load(cls, path: str | Path) -> "State":
        """Read a file written by `save`. Raises `ModelFileError` for anything else."""
        try:
            with safe_open(str(path), framework="pt") as opened:
                found = opened.metadata() or {}
            meta = json.loads(found["state"]) if "state" in found else found
            # A clone, because products of numbers that begin elsewhere in memory can differ in the last bit.
            numbers = {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
            if (meta.get("format"), meta.get("version")) != ("palate-training", 1):
                raise ValueError(f"it is {meta.get('format', 'a foreign file')} version {meta.get('version')}")
            return cls(int(meta["epoch"]), int(meta["steps"]), numbers, dict(meta["head"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelFileError(f"{path} cannot be read as training ({error}); expected a file of State.save") from error


class Project(torch.autograd.Function):
    """z V for all pairs, with z^T G as its derivative: D enters once forward and once back."""

    @staticmethod
    def forward(ctx: FunctionCtx, bases: Tensor, design: Rescaled) -> Tensor:
        ctx.design = design  # type: ignore[attr-defined]
        return design.project(bases)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.design.back(gradients[0]), None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Shape:
    """The base rewards: linear for no `hidden` widths, else an MLP with ReLU whose K outputs they are.

    The first layer is `bases` (D, F); everything after it is one flat vector `hidden`: bias, matrix, bias, matrix ... The last
    layer needs no bias: it cancels in every difference.
    """

    n_bases: int
    hidden: tuple[int, ...] = ()
    bias: bool = False
    simplex: bool = False

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Shapes inside the flat vector, in order."""
        out: list[tuple[int, ...]] = []
        for width, following in zip(self.hidden, (*self.hidden, self.n_bases)[1:], strict=True):
            out += ([(width,)] if self.bias else []) + [(width, following)]
        return out

    def after(self, first: Tensor, flat: Tensor) -> Tensor:
        """(N, F) outputs of the first layer -> (N, K) base rewards."""
        numbers = torch.split(flat, [math.prod(size) for size in self.sizes])
        parts = [part.view(size) for part, size in zip(numbers, self.sizes, strict=True)]
        out = first
        while parts:
            out = torch.relu(out + parts.pop(0) if self.bias else out) @ parts.pop(0)
        return out


Split = Callable[[int], tuple[Tensor, Tensor]]  # epoch -> (P,) masks of support and query


class Tasks:
    """Seen users as tasks: padded batches of their pairs, projected by the bases of the moment.

    Args:
        data: training pairs. scale: (D,) of the features. offset: (P,) margins that everybody shares.
    """

    def __init__(self, data: EmbeddedPairs, scale: Tensor, offset: Tensor, shape: Shape):
        self.data, self.scale, self.offset, self.shape = data, scale, offset, shape
        self.design = Rescaled(data.differences(), scale)
        self.tie = data.tie if bool(data.tie.any()) else None
        # Small enough to hold: a step with two users then gathers rows instead of forming them.
        few = not shape.hidden and len(data) * len(scale) <= 2**25
        self.formed = self.design.design.rows(torch.arange(len(data), device=scale.device)) * scale if few else None

    def slopes(self, numbers: Numbers, index: Tensor) -> Tensor:
        """(B, n) pairs -> (B, n, K) differences of the base rewards."""
        if not self.shape.hidden and 2 * index.numel() >= len(self.data):  # about everybody: one pass over the table
            everything: Tensor = Project.apply(numbers["bases"], self.design)  # type: ignore[no-untyped-call]
            return everything[index]
        flat = index.flatten()
        if not self.shape.hidden:
            rows = self.design.design.rows(flat) * self.scale if self.formed is None else self.formed[flat]
            out = rows @ numbers["bases"]
        else:
            table, bases = self.data.embeddings, self.scale[:, None] * numbers["bases"]
            sides = [table.rows(rows[flat]) @ bases for rows in (self.data.chosen, self.data.rejected)]
            good, bad = (self.shape.after(side, numbers["hidden"]) for side in sides)
            out = good - bad
        return out.view(*index.shape, -1)


def adapted(inner: Inner | None, support: Batch, numbers: Numbers, *, simplex: bool) -> Tensor:
    """(U, K) weights as the reward uses them; where there is no inner loop, everybody's."""
    start = numbers["start"]
    moved = start.expand(len(support.offset), -1)
    if inner is not None:
        moved = inner.moved(support, start, numbers["spread"], simplex=simplex)
    return moved.softmax(1) if simplex else moved


def posed(tasks: Tasks, numbers: Numbers, users: Tensor, support: Tensor, query: Tensor) -> tuple[Batch, Tensor]:
    """The users' pairs (B, n), those of the mask `support` (P,) with their weights, and the weights (B, n) of the query."""
    index, real = tasks.data.grouped().padded(users)
    weight = tasks.data.weight[index] * real
    tie = None if tasks.tie is None else tasks.tie[index]
    return Batch(tasks.slopes(numbers, index), tasks.offset[index] * real, weight * support[index], tie), weight * query[index]


def query_losses(
    tasks: Tasks, inner: Inner | None, numbers: Numbers, users: Tensor, support: Tensor, query: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean loss (B,) of each user's query pairs after adapting to the support pairs, and whether the user has any query."""
    batch, asked = posed(tasks, numbers, users, support, query)
    weights = adapted(inner, batch, numbers, simplex=tasks.shape.simplex)
    total = asked.sum(1)
    losses = (likelihood.nll(batch.margins(weights), batch.tie) * asked).sum(1) / total.clamp(min=1e-12)
    return losses, total > 0


def train(
    tasks: Tasks, inner: Inner | None, outer: Outer, objective: Objective, split: Split, state: State, *, seed: int, until: int
) -> Iterator[tuple[State, float]]:
    """States after each further epoch up to `until`, and the mean query loss of its users: Adam over batches of users.

    Users come in a random order of each epoch; a batch that is not full ends the epoch. The gradient of all numbers together is
    clipped to `outer.clip`.
    """
    numbers, n_users, steps = dict(state.numbers), len(tasks.data.user_ids), state.steps
    for epoch in range(state.epoch, until):
        support, query = split(epoch)
        order = keyed_order(n_users, seed, epoch).to(query.device)
        total, counted = 0.0, 0
        for users in torch.split(order, outer.batch):
            with torch.enable_grad():
                leaves = {name: numbers[name].detach().requires_grad_() for name in LEARNED}
                losses, asked = query_losses(tasks, inner, numbers | leaves, users, support, query)
                if not bool(asked.any()):
                    continue
                loss = objective(losses[asked])
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            gradients = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(LEARNED, found, strict=True)}
            for name in ("bases", "hidden"):
                gradients[name] = gradients[name] + outer.ridge * numbers[name]
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            shrink = (outer.clip / (norm + 1e-6)).clamp(max=1.0)
            rate = outer.at(steps, n_users)
            steps += 1
            for name, gradient in gradients.items():
                if gradient.numel():
                    _adam(numbers, name, gradient * shrink, rate, steps)
            total, counted = total + float(losses.detach()[asked].sum()), counted + int(asked.sum())
        state = State(epoch + 1, steps, dict(numbers), state.head)
        yield state, total / max(counted, 1)


def _adam(numbers: Numbers, name: str, gradient: Tensor, rate: float, step: int) -> None:
    """One step, out of place: the states that were handed out keep their numbers."""
    first = 0.9 * numbers[f"first.{name}"] + 0.1 * gradient
    second = 0.999 * numbers[f"second.{name}"] + 0.001 * gradient.square()
    size = (second / (1 - 0.999**step)).sqrt() + 1e-8
    numbers[name] = numbers[name] - rate / (1 - 0.9**step) * first / size
    numbers[f"first.{name}"], numbers[f"second.{name}"] = first, second


def beginning(numbers: Numbers, head: dict[str, Any]) -> State:
    """The state before the first step."""
    moments = {f"{which}.{name}": torch.zeros_like(numbers[name]) for name in LEARNED for which in ("first", "second")}
    return State(0, 0, numbers | moments, head)


def keyed_order(n: int, seed: int, epoch: int) -> Tensor:
    """A permutation of n that depends on the seed and the epoch alone."""
    return torch.from_numpy(np.random.default_rng([seed, epoch, 1]).permutation(n))


def published_split(data: EmbeddedPairs, seed: int, share: float = 0.9) -> Split:
    """MRM's support and query: whole units (conversations) of a user, drawn anew each epoch with seed + user + 1000 epoch.

    n_query = max(1, floor(share n_units)), the rest is support; with one unit it is both. As published, user 1000 in one epoch
    draws what user 0 draws in the next. Draws are a hash of that number and the unit's place, so users need no loop.
    """
    units, of_pair = torch.unique(torch.stack([data.user_index, data.unit], dim=1), dim=0, return_inverse=True)
    owner = units[:, 0].cpu().numpy()
    counts = np.bincount(owner, minlength=len(data.user_ids))
    first = counts.cumsum() - counts
    place = np.arange(len(owner)) - first[owner]
    n_query = np.maximum(1, np.floor(share * counts + 1e-9).astype(np.int64))

    def drawn(epoch: int) -> tuple[Tensor, Tensor]:
        key = (seed + owner + 1000 * epoch).astype(np.uint64)
        noise = _hashed(_hashed(key) + place.astype(np.uint64))
        order = np.lexsort((noise, owner))
        rank = np.empty(len(owner), dtype=np.int64)
        rank[order] = place
        query = torch.from_numpy(rank < n_query[owner]).to(of_pair.device)
        alone = torch.from_numpy(counts[owner] == 1).to(of_pair.device)
        return (~query | alone)[of_pair], query[of_pair]

    return drawn


def _hashed(value: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """64 bits to 64 bits that look random (the finaliser of SplitMix64; Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out: np.ndarray[Any, Any] = value ^ (value >> np.uint64(31))
    return out


def described(part: Any) -> dict[str, Any] | None:
    """A small frozen object as JSON: its class and its arguments."""
    return None if part is None else {"kind": type(part).__name__, **asdict(part)}
