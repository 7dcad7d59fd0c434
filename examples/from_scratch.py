"""LoRe from scratch: personal rewards in one file of plain torch, one user at a time, with nothing hidden.

    python examples/from_scratch.py

Low-Rank Reward modelling (LoRe, arXiv 2504.14439) says that everybody's reward is a mixture of the same few base rewards:

    reward of person i for text e:   r_i(e) = softmax(W_i) . (V^T e)          V (D, K) shared, W_i (K,) the person's own
    person i prefers a to b:         P = sigmoid(r_i(a) - r_i(b))             Bradley-Terry

Reward differences are all that a choice shows, so a choice is stored as the vector z = e(chosen) - e(rejected), and its margin is
(z V) . softmax(W_i). The method has two steps, and this file has a function for each: `train` finds V from the choices of many
people, and `few_shot` finds the weights of a new person, of whom a handful of choices is known, with V frozen.

The settings (Adam, .5 for 1,000 steps, then .1 for 500; margins divided by 100; starts from N(0, 1)) are those of the code that
the authors published in June 2025; the division by 100 is in that code only, the loss is the paper's equation 10. The library
does the same in batches over users and with gradients written by hand, and its tests compare it with this file. It has no
covariance, no validation and no file format: it is here to be read.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

SCALE = 100


def train(z: Tensor, person: Tensor, V: Tensor, W: Tensor, *, steps: int = 1000, rate: float = 0.5) -> tuple[Tensor, Tensor]:
    """The base rewards V (D, K) and everybody's mixture (U, K), from the choices z (P, D) of the persons `person` (P,) in 0..U-1.

    Minimises sum_i mean_j -log sigmoid(margin_ij), j over the choices of person i, over V and W together from the given starts.
    """
    V, W = V.clone().requires_grad_(), W.clone().requires_grad_()
    n_choices = torch.bincount(person, minlength=len(W))[person]  # (P,) how many choices the person of each choice made
    adam = torch.optim.Adam([V, W], lr=rate)
    for _ in range(steps):
        mixture = W.softmax(1)[person]  # (P, K)
        margin = ((z @ V) * mixture).sum(1) / SCALE
        loss = (softplus(-margin) / n_choices).sum()  # softplus(-m) = -log sigmoid(m), without underflow
        adam.zero_grad()
        loss.backward()
        adam.step()
    return V.detach(), W.detach().softmax(1)


def few_shot(z: Tensor, person: Tensor, V: Tensor, W: Tensor, *, steps: int = 500, rate: float = 0.1) -> Tensor:
    """The mixture (U, K) of each new person given V, one person after the other, from the starts W (U, K)."""
    mixtures = []
    for i in range(len(W)):
        # V is frozen, so the D numbers of a text are needed once and never again: K numbers a choice remain.
        projected = z[person == i] @ V / SCALE
        logits = W[i].clone().requires_grad_()
        adam = torch.optim.Adam([logits], lr=rate)
        for _ in range(steps):
            loss = softplus(-(projected @ logits.softmax(0))).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        mixtures.append(logits.detach().softmax(0))
    return torch.stack(mixtures)


def accuracy(z: Tensor, person: Tensor, V: Tensor, mixture: Tensor) -> float:
    """Share of choices told rightly, a predicted tie counting half: whoever predicts nothing has .5."""
    margin = ((z @ V) * mixture[person]).sum(1)
    return float(((margin > 0).double() + (margin == 0).double() / 2).mean())


def choices(taste: Tensor, n_choices: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`n_choices` of each person between two random texts: z (P, D) and person (P,). `taste` (U, D) holds the true rewards."""
    person = torch.arange(len(taste)).repeat_interleave(n_choices)
    a, b = torch.randn(2, len(person), taste.shape[1], generator=generator)
    margin = ((a - b) * taste[person]).sum(1)
    prefers_a = torch.rand(len(person), generator=generator) < margin.sigmoid()
    return torch.where(prefers_a[:, None], a - b, b - a), person


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    n_seen, n_new, dim, k = 60, 20, 16, 3

    # Planted truth: three base rewards at right angles, and every person follows one of them.
    base = 2 * torch.linalg.qr(torch.randn(dim, k, generator=generator))[0].T  # (K, D)
    seen, new = (base[torch.randint(k, (n,), generator=generator)] for n in (n_seen, n_new))
    known, tests = choices(seen, 40, generator), choices(new, 100, generator)
    support = choices(new, 9, generator)

    results = {}
    for bases in (1, k):  # with one base reward everybody has the same: that is Bradley-Terry
        V, W = torch.randn(dim, bases, generator=generator), torch.randn(n_seen, bases, generator=generator)
        V, _ = train(*known, V, W)
        mixture = few_shot(*support, V, torch.randn(n_new, bases, generator=generator))
        results[bases] = accuracy(*tests, V, mixture)
    best = accuracy(*tests, base.T, torch.eye(k)[(new @ base.T).argmax(1)])
    print(f"{n_new} new people, 9 choices known of each, accuracy on 100 others")
    print(f"  one reward for everybody   {results[1]:.3f}")
    print(f"  LoRe with {k} base rewards   {results[k]:.3f}")
    print(f"  their true rewards         {best:.3f}")
    assert results[1] + 0.05 < results[k] <= best + 0.02, "LoRe should tell new people's choices clearly better than one reward"


if __name__ == "__main__":
    main()
