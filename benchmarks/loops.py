"""Speed against the published systems' own loops: the cases `meta` and `pref` of `python -m benchmarks speed`.

The flat loops are those of `examples/`, which the library's faithful presets equal to rounding (a test says so). They are timed
on a part of their work and scaled, because they do not get faster with more of it.
"""

import time
from typing import Any

import torch
from examples import mrm_from_scratch as flat
from scipy.fft import dct
from torch import Tensor
from torch.nn.functional import softplus

from palate.adaptation import adapt
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.evaluation import evaluate
from palate.models.base import RewardModel
from palate.models.hierarchical import Hierarchical
from palate.models.mrm import MRM
from palate.models.pref import PReF
from palate.training import fit

Result = dict[str, Any]


def widths(d: int) -> Tensor:
    """(D,) standard deviation of each principal direction of the texts, the j-th j^-1/2: roughly as embeddings have it."""
    return torch.arange(1, d + 1).rsqrt()


def turned(table: Tensor) -> Tensor:
    """The rows in other orthonormal coordinates, a cosine transform, so that no column is a principal direction."""
    return torch.from_numpy(dct(table.numpy(), norm="ortho", axis=1))


def people(
    n_users: int, n_train: int, n_test: int, d: int, *, unseen: int, seed: int = 0
) -> tuple[EmbeddedPairs, EmbeddedPairs, EmbeddedPairs]:
    """(train, support, test): choices of people whose rewards are a common direction and five more with weights of their own.

    All of them lie in the 64 widest directions of the texts, where each alone gives margins of about one.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = torch.zeros(d, 6)
    axes[:64] = 2.6 * torch.linalg.qr(torch.randn(min(d, 64), 6, generator=generator))[0]
    weights = torch.randn(n_users + unseen, 6, generator=generator)
    weights[:, 0] = 1
    out = []
    for users, n, name in (
        (range(n_users), n_train, "seen"),
        (range(n_users, n_users + unseen), n_train, "new"),
        (range(n_users, n_users + unseen), n_test, "new"),
    ):
        person = torch.tensor(list(users)).repeat_interleave(n)
        table = torch.randn(2 * len(person), d, generator=generator) * widths(d)
        scores = table @ axes
        left = torch.arange(0, len(table), 2)
        margin = ((scores[left] - scores[left + 1]) * weights[person]).sum(1)
        wins = torch.rand(len(person), generator=generator) < torch.sigmoid(margin)
        names = [f"{name}{u:05d}" for u in person.tolist()]
        out.append(
            EmbeddedPairs(Dense(turned(table)), torch.where(wins, left, left + 1), torch.where(wins, left + 1, left), names)
        )
    return out[0], out[1], out[2]


def accuracy(model: RewardModel, support: EmbeddedPairs, test: EmbeddedPairs) -> float:
    rows = list(evaluate(model, support, test).rows())
    return sum(float(row["accuracy"]) for row in rows) / len(rows)


def meta(users: int = 640, n: int = 20, d: int = 4096, unseen: int = 200, timed: int = 3) -> Result:
    """Time to the final unseen accuracy of the published MRM loop (200 epochs, one user at a time)."""
    train, support, test = people(users, n, n, d, unseen=unseen)
    z = train.differences()
    mine = [z.rows(rows) for rows in torch.split(torch.arange(len(train)), n)]
    generator = torch.Generator().manual_seed(0)
    bases = (2 * torch.rand(d, 2, generator=generator) - 1) / d**0.5
    settings = flat.PUBLISHED._replace(epochs=timed)
    began = time.perf_counter()
    flat.train(
        mine,
        bases,
        torch.randn(2, generator=generator),
        settings,
        lambda epoch: torch.randperm(users, generator=generator).tolist(),
        lambda person, epoch: tuple(torch.randperm(n, generator=generator).split([2, n - 2])),
    )
    loop = (time.perf_counter() - began) / timed * flat.PUBLISHED.epochs
    out: Result = {"users": users, "pairs": n, "features": d, "loop_epochs_timed": timed, "loop_s": loop}
    for name, model in (("faithful", MRM.faithful()), ("fixed", MRM()), ("hierarchical", Hierarchical())):
        fresh = EmbeddedPairs(train.embeddings, train.chosen, train.rejected, train.users)
        began = time.perf_counter()
        fitted = fit(fresh, model)
        adapt(fitted, support)
        out[f"{name}_s"] = time.perf_counter() - began
        out[f"{name}_accuracy"] = accuracy(fitted, support, test)
        out[f"{name}_factor"] = loop / out[f"{name}_s"]
    return out


def one_user_of_pref(z: Tensor, start: Tensor, steps: int, rate: float = 0.01) -> Tensor:
    """A new user's weights (K,) by full-batch SGD on their projected choices z (n, K), as PReF's published code finds them."""
    weights = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([weights], lr=rate)
    for _ in range(steps):
        optimiser.zero_grad()
        softplus(-(z @ weights)).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return weights.detach()


def pref(users: int = 1000, n: int = 40, k: int = 5, looped: int = 5, steps: int = 5000) -> Result:
    """PReF's user solve: one batched MAP against 5,000 SGD steps for one user after another, on projected choices."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2 * users * n, k, generator=generator)
    person = torch.arange(users).repeat_interleave(n)
    left = torch.arange(0, len(table), 2)
    taste = torch.randn(users, k, generator=generator)
    margin = ((table[left] - table[left + 1]) * taste[person]).sum(1)
    wins = torch.rand(len(person), generator=generator) < torch.sigmoid(margin)
    chosen, rejected = torch.where(wins, left, left + 1), torch.where(wins, left + 1, left)
    data = EmbeddedPairs(Dense(table), chosen, rejected, [f"u{u:05d}" for u in person.tolist()])
    model = PReF(k).like({"direction": torch.zeros(k), "bases": torch.eye(k), "mean": torch.zeros(k), "factor": torch.eye(k)})
    z = table[chosen] - table[rejected]
    began = time.perf_counter()
    for i in range(looped):
        one_user_of_pref(z[person == i], torch.randn(k, generator=generator), steps)
    loop = (time.perf_counter() - began) / looped
    spent = []
    for _ in range(5):
        fresh = data[:]
        began = time.perf_counter()
        adapt(model, fresh)
        spent.append((time.perf_counter() - began) / users)
    alone = []
    for i in range(20):
        mine = data[torch.arange(i * n, (i + 1) * n)]
        began = time.perf_counter()
        adapt(model, mine)
        alone.append(time.perf_counter() - began)
    batched, single = sorted(spent)[len(spent) // 2], sorted(alone)[len(alone) // 2]
    return {
        "users": users,
        "pairs": n,
        "weights": k,
        "loop_users_timed": looped,
        "loop_s_per_user": loop,
        "batched_s_per_user": batched,
        "batched_factor": loop / batched,
        "alone_s_per_user": single,
        "alone_factor": loop / single,
    }
