"""VPL as published (arXiv 2408.10075), on frozen features: an attending encoder of pairs, and a reward that reads z.

    u_j = MLP(e(chosen_j), e(rejected_j))                        2 D -> H -> H -> K, leaky below zero by .2
    a_j = sum_l softmax_l(q(u_j) . k(u_l) / sqrt(K)) v(u_l)      one head, no residual, no norm
    mean = clamp(A mean_j a_j), log variance = clamp(B mean_j a_j)      to [-1, 1]
    z = sqrt(K) s / |s|, s = mean + exp(log variance / 2) noise, in training; z = mean in use
    r(e, z) = MLP(e, z)                                          D + K -> H -> H -> 1

What is as wide as the embeddings, the first layers of both networks, is applied once to each text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from palate import likelihood
from palate.data.embeddings import Embeddings
from palate.data.pairs import EmbeddedPairs
from palate.errors import DataError
from palate.models.variational import SLOPE, Numbers, active_units

PERIOD = 10**4  # of the annealing, in steps
BATCH, WARMUP, DECAY = 32, 0.03, 1e-3


@dataclass(frozen=True)
class Published:
    """The arguments of `VPL.faithful`."""

    latent: int
    hidden: int
    kl: float
    rate: float
    epochs: int
    copies: int
    contexts: tuple[int, int]


def sizes(way: Published) -> dict[str, tuple[int, ...]]:
    """Shapes of all numbers after the first layers, whose biases they begin with."""
    h, k = way.hidden, way.latent
    layers = {"pair2": (h, h), "pair3": (h, k), "query": (k, k), "key": (k, k), "value": (k, k), "mean": (k, k), "width": (k, k)}
    layers |= {"reward2": (h, h), "reward3": (h, 1)}
    out: dict[str, tuple[int, ...]] = {"pair1 bias": (h,), "reward1 z": (k, h), "reward1 bias": (h,)}
    for name, size in layers.items():
        out |= {name: size, f"{name} bias": (size[1],)}
    return out


def encoded(first: Tensor, real: Tensor, numbers: Numbers, way: Published) -> tuple[Tensor, Tensor]:
    """Mean and log variance (U, K) of z, from what the first layer makes of the M real pairs, in the order of the mask (U, n).

    Zero, the prior's N(0, I), for a user without pairs.

    Args:
        first: (M, H), without its bias. real: (U, n) which places hold a pair, M of them.
    """
    pairs = leaky_relu(first + numbers["pair1 bias"], SLOPE)
    pairs = _layer(leaky_relu(_layer(pairs, "pair2", numbers), SLOPE), "pair3", numbers)
    pairs, query, key = (_placed(part, real) for part in (pairs, _layer(pairs, "query", numbers), _layer(pairs, "key", numbers)))
    some = real.any(1)
    heard = real | ~some[:, None]  # a softmax over nothing is no number; its user is set to the prior below
    match = (query @ key.mT / math.sqrt(way.latent)).masked_fill(~heard[:, None, :], -torch.inf)
    # The mean over pairs and the values are linear, and shares sum to one: the values can come last, of one row a user.
    share = (match.softmax(-1) * heard[..., None]).sum(1) / heard.sum(1, keepdim=True)
    pooled = _layer((share[:, None] @ pairs)[:, 0], "value", numbers)
    mean, width = (_layer(pooled, name, numbers).clamp(-1, 1) * some[:, None] for name in ("mean", "width"))
    return mean, width


def _placed(values: Tensor, real: Tensor) -> Tensor:
    """(M, K) -> (U, n, K), zero where there is no pair."""
    out = values.new_zeros(*real.shape, values.shape[1])
    out[real] = values
    return out


def decoded(first: Tensor, z: Tensor, numbers: Numbers, way: Published) -> Tensor:
    """(...,) the reward of texts, whose first layer gave (..., H), at z (..., K)."""
    hidden = leaky_relu(first + (z @ numbers["reward1 z"] + numbers["reward1 bias"]), SLOPE)
    return _layer(leaky_relu(_layer(hidden, "reward2", numbers), SLOPE), "reward3", numbers)[..., 0]


def drawn(mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """z in training: a draw, brought to length sqrt(K)."""
    z = mean + (log_variance / 2).exp() * noise
    length: Tensor = z.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return z / length * math.sqrt(z.shape[-1])


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(U,) KL(N(mean, exp(log variance)) || N(0, I)) in nats."""
    return -(1 + log_variance - mean.square() - log_variance.exp()).sum(-1) / 2


def annealed(step: int) -> float:
    """a(t): from .1 to 1 in every 10^4 steps, and back to .1 at once."""
    return 0.1 + 0.9 * (math.cos(math.pi * (step % PERIOD / PERIOD - 1)) + 1) / 2


def rate_at(step: int, total: int) -> float:
    """The share of the peak rate at step 0, 1, ...: a linear rise over 3 % of the steps, then a cosine to zero."""
    rise = math.ceil(WARMUP * total)
    if step < rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def published(data: EmbeddedPairs, way: Published, seed: int, progress: Callable[[float], None]) -> tuple[Numbers, Tensor, int]:
    """The numbers of `sizes`, the first layers (D, 3 H), and how many coordinates of z tell the seen users apart.

    Raises:
        DataError: no user has two strict choices, one to ask and one to tell.
    """
    strict = data[~data.tie]
    grouped = strict.grouped()
    asked = torch.nonzero(grouped.counts[strict.user_index] > 1)[:, 0]
    if not len(asked):
        raise DataError(f"{len(strict)} strict choices of {len(strict.user_ids)} users, no two of one user; expected some")
    generator = torch.Generator().manual_seed(seed)
    numbers, first = _start(data.embeddings, way, generator)
    numbers = {name: value.requires_grad_() for name, value in (numbers | {"first": first}).items()}
    optimiser = torch.optim.AdamW(numbers.values(), lr=way.rate, weight_decay=DECAY, fused=True)
    per_epoch = -(-len(asked) * way.copies // BATCH)
    total = per_epoch * way.epochs
    for step in range(total):
        if step % per_epoch == 0:
            order = asked.repeat(way.copies)[torch.randperm(len(asked) * way.copies, generator=generator)]
            progress(step / total)
        query = order[step % per_epoch * BATCH :][:BATCH]
        context, real = _contexts(strict, query, way.contexts, generator)
        noise = torch.randn(len(query), way.latent, generator=generator).to(first)
        with torch.enable_grad():
            loss = step_loss(strict, numbers, query, context, real, noise, way, way.kl * annealed(step))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.param_groups[0]["lr"] = way.rate * rate_at(step, total)
        optimiser.step()
    numbers = {name: value.detach() for name, value in numbers.items()}
    first = numbers.pop("first")
    return numbers, first, _active(strict, numbers, first, way)


def step_loss(
    data: EmbeddedPairs, numbers: Numbers, query: Tensor, context: Tensor, real: Tensor, noise: Tensor, way: Published, kl: float
) -> Tensor:
    """Mean -log sigma of the queries (B,) + kl times the mean KL, z drawn from what the contexts (B, n) say."""
    reward, chosen, rejected = torch.split(numbers["first"], way.hidden, dim=1)

    def through(rows: Tensor, layer: Tensor) -> Tensor:
        found: Tensor = data.embeddings.rows(rows.flatten()).to(layer) @ layer
        return found.view(*rows.shape, -1)

    told = context[real]
    mean, width = encoded(through(data.chosen[told], chosen) + through(data.rejected[told], rejected), real, numbers, way)
    asked = through(torch.stack([data.chosen[query], data.rejected[query]]), reward)
    good, bad = decoded(asked, drawn(mean, width, noise), numbers, way)
    return likelihood.nll(good - bad).mean() + kl * divergence(mean, width).mean()


def _layer(values: Tensor, name: str, numbers: Numbers) -> Tensor:
    return values @ numbers[name] + numbers[f"{name} bias"]


def _start(table: Embeddings, way: Published, generator: torch.Generator) -> tuple[Numbers, Tensor]:
    """Every layer at U(-1, 1) / sqrt(inputs), weights and bias, as PyTorch begins."""

    def uniform(size: tuple[int, ...], inputs: int) -> Tensor:
        found: Tensor = (2 * torch.rand(*size, generator=generator) - 1) / math.sqrt(inputs)
        return found.to(table.device, table.dtype)

    width = table.shape[1]
    into_reward, into_pair = width + way.latent, 2 * width
    shapes = sizes(way)
    inputs = {name: shapes[name.removesuffix(" bias")][0] for name in shapes if not name.startswith(("pair1", "reward1"))}
    inputs |= {"reward1 z": into_reward, "reward1 bias": into_reward, "pair1 bias": into_pair}
    first = [uniform((width, way.hidden), n) for n in (into_reward, into_pair, into_pair)]
    return {name: uniform(size, inputs[name]) for name, size in shapes.items()}, torch.cat(first, dim=1)


def _contexts(data: EmbeddedPairs, query: Tensor, most: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, n) other choices of each query's user, drawn without repetition, and the mask of the real ones."""
    index, real = data.grouped().padded(data.user_index[query])
    real = real & (index != query[:, None])
    noise = torch.rand(index.shape, generator=generator).to(data.weight) + ~real
    place = noise.argsort(1)[:, : most[1]]
    sizes = torch.randint(most[0], most[1] + 1, (len(query), 1), generator=generator).to(query.device)
    taken = torch.arange(place.shape[1], device=query.device) < sizes
    return index.gather(1, place), real.gather(1, place) & taken


def _active(data: EmbeddedPairs, numbers: Numbers, first: Tensor, way: Published) -> int:
    means = []
    chosen, rejected = torch.split(data.embeddings.project(first[:, way.hidden :]), way.hidden, dim=1)
    for users in torch.split(torch.arange(len(data.user_ids), device=first.device), 64):
        index, real = data.grouped().padded(users)
        told = index[real]
        means.append(encoded(chosen[data.chosen[told]] + rejected[data.rejected[told]], real, numbers, way)[0])
    return active_units(torch.cat(means), first.new_ones(way.latent))
