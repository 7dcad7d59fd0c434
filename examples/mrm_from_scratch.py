"""Meta Reward Modeling from scratch: learning where to start, in one file of plain torch, one user at a time.

    python examples/mrm_from_scratch.py

Meta Reward Modeling (MRM, arXiv 2601.18731) mixes a few base rewards for every person, like LoRe (`from_scratch.py`), but keeps
no weights of anybody. It learns one start w0 for all, and base rewards V, such that a step or two from w0 on a person's own
choices (the inner loop) leads to a reward that tells the person's *other* choices well (the outer loop):

    reward of person i for text e:  r_i(e) = softmax(w_i) . (V^T e),   w_i = inner_loop(w0, some choices of person i)

A choice is stored as z = e(chosen) - e(rejected), its margin is softmax(w_i) . (V^T z), P(chosen preferred) = sigmoid(margin).

`PUBLISHED` are the settings of the code that the authors published. With them a new person's mixture moves by at most half of
the inner rate, .0005, whatever the person chose: one Adam step has a length of its own, and two base rewards that start almost
alike stay alike. `ABLE` are settings with which the same algorithm does personalise: base rewards that start apart, and an inner
loop that can leave its start. `main` shows both on planted people. Two more things to know before copying the published
objective: it differentiates through its own threshold, so a person can be *un*-learned, and it is a sum, so the step grows with
the number of people in it. The library has a corrected one beside it; here it stands as it was published.

The library does the same in batches over users; its tests compare it with this file. There is no validation, no covariance and
no file format here.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

SCALE = 0.01  # of the embeddings, in the published code


class Settings(NamedTuple):
    inner_rate: float
    inner_steps: int
    outer_rate: float
    people_a_step: int
    epochs: int
    support: float  # share of a person's choices; the rest is query


PUBLISHED = Settings(inner_rate=1e-3, inner_steps=1, outer_rate=1e-3, people_a_step=2, epochs=200, support=0.1)
ABLE = Settings(inner_rate=0.5, inner_steps=5, outer_rate=0.5, people_a_step=20, epochs=30, support=0.5)


def inner_loop(projected: Tensor, w0: Tensor, rate: float, steps: int) -> Tensor:
    """Logits (K,) after `steps` of a fresh Adam from w0 on the mean loss of some choices, V^T z of which is `projected` (n, K).

    Differentiable: the outer loop sees how w0 and V change where this ends.
    """
    w, m, v = w0, torch.zeros_like(w0), torch.zeros_like(w0)
    for t in range(1, steps + 1):
        loss = softplus(-(projected @ w.softmax(0))).mean()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        if not bool((v > 0).all()):  # the root of zero has no slope: where nothing was felt, stay
            v = torch.where(v > 0, v, torch.ones_like(v))
        w = w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return w


def rpo(losses: Tensor, rho: float = 0.5, gamma: float = 0.5) -> Tensor:
    """The published objective: people above the (1 - rho) quantile of the losses count more. Nothing is detached or divided."""
    threshold = torch.quantile(losses, 1 - rho)
    return (((losses - threshold) / gamma).sigmoid() * losses).sum()


def schedule(step: int, total: int, warmup: float = 0.05) -> float:
    """Share of the outer rate: up over the first 5 % of the steps, then half a cosine down to nothing."""
    rise = int(warmup * total)
    if step < rise:
        return step / rise
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))))


def train(
    people: Sequence[Tensor],
    V: Tensor,
    w0: Tensor,
    settings: Settings,
    order: Callable[[int], Sequence[int]],
    split: Callable[[int, int], tuple[Tensor, Tensor]],
    objective: Callable[[Tensor], Tensor] = rpo,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Base rewards V (D, K) and start w0 (K,) from the choices z (n_i, D) of many people, from the given starts.

    `order(epoch)` says who comes when, `split(person, epoch)` which of the person's choices (rows) the inner loop sees and which
    ones judge it; both are drawn anew each epoch. `watch(epoch, V, w0)` is called after each: to test new people as it goes on.
    """
    V, w0 = V.clone().requires_grad_(), w0.clone().requires_grad_()
    total = math.ceil(len(people) / settings.people_a_step) * settings.epochs
    adam = torch.optim.Adam([V, w0], lr=settings.outer_rate)
    rates = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: schedule(step, total))
    for epoch in range(settings.epochs):
        waiting: list[Tensor] = []
        last = len(people) - 1
        for place, i in enumerate(order(epoch)):
            support, query = split(i, epoch)
            projected = SCALE * people[i] @ V
            w = inner_loop(projected[support], w0, settings.inner_rate, settings.inner_steps)
            waiting.append(softplus(-(projected[query] @ w.softmax(0))).mean())
            if len(waiting) == settings.people_a_step or place == last:  # who is left over makes a step too
                adam.zero_grad()
                objective(torch.stack(waiting)).backward()
                torch.nn.utils.clip_grad_norm_([V, w0], 1.0)
                adam.step()
                rates.step()
                waiting = []
        if watch is not None:
            watch(epoch, V.detach(), w0.detach())
    return V.detach(), w0.detach()


def accuracy(support: Sequence[Tensor], test: Sequence[Tensor], V: Tensor, w0: Tensor, settings: Settings) -> float:
    """Mean over new people of the share of test choices told rightly (a tie is half), after adapting to all of their support."""
    shares = []
    for known, asked in zip(support, test, strict=True):
        w = inner_loop(SCALE * known @ V, w0.clone().requires_grad_(), settings.inner_rate, settings.inner_steps)
        margin = asked @ V @ w.detach().softmax(0)
        shares.append(float(((margin > 0).double() + (margin == 0).double() / 2).mean()))
    return sum(shares) / len(shares)


def choices(taste: Tensor, n: int, generator: torch.Generator) -> list[Tensor]:
    """`n` choices of each person between two random texts: z (n, D). `taste` (U, D) holds the true rewards."""
    out = []
    for reward in taste:
        a, b = torch.randn(2, n, len(reward), generator=generator)
        prefers_a = torch.rand(n, generator=generator) < ((a - b) @ reward).sigmoid()
        out.append(torch.where(prefers_a[:, None], a - b, b - a))
    return out


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    n_seen, n_new, dim, n = 60, 40, 8, 30

    # Planted truth: half of the people have the reward crowd + d, the others crowd - d.
    crowd, d = 1.1 * torch.linalg.qr(torch.randn(dim, 2, generator=generator))[0].T
    sides = torch.where(torch.arange(n_seen + n_new) % 2 == 0, 1.0, -1.0)
    taste = crowd + sides[:, None] * d
    people = choices(taste[:n_seen], n, generator)
    support, test = choices(taste[n_seen:], n, generator), choices(taste[n_seen:], 200, generator)

    def order(epoch: int) -> list[int]:
        return torch.randperm(n_seen, generator=generator).tolist()

    results = {}
    for name, settings in (("published", PUBLISHED._replace(epochs=20, outer_rate=1e-2)), ("able", ABLE)):

        def split(person: int, epoch: int, settings: Settings = settings) -> tuple[Tensor, Tensor]:
            rows = torch.randperm(n, generator=generator)
            first = round(settings.support * n)
            return rows[:first], rows[first:]

        if name == "published":
            V = (2 * torch.rand(dim, 2, generator=generator) - 1) / dim**0.5
            objective: Callable[[Tensor], Tensor] = rpo
        else:
            V, objective = torch.randn(dim, 2, generator=generator) / SCALE**0.5, torch.mean
        w0 = torch.randn(2, generator=generator) if name == "published" else torch.zeros(2)
        V, w0 = train(people, V, w0, settings, order, split, objective)
        results[name] = accuracy(support, test, V, w0, settings)
    right = [float(((z @ reward) > 0).double().mean()) for z, reward in zip(test, taste[n_seen:], strict=True)]
    same = [float(((z @ crowd) > 0).double().mean()) for z in test]
    print(f"{n_new} new people, {n} choices known of each, accuracy on 200 others")
    print(f"  the true reward of the crowd, for everybody   {sum(same) / n_new:.3f}")
    print(f"  MRM, an inner loop as published               {results['published']:.3f}")
    print(f"  MRM, an inner loop that can move              {results['able']:.3f}")
    print(f"  their true rewards                            {sum(right) / n_new:.3f}")
    assert results["published"] < sum(same) / n_new + 0.02, "one Adam step of .001 should not tell people apart"
    assert results["able"] > results["published"] + 0.05, "an inner loop that moves should"


if __name__ == "__main__":
    main()
