"""How many choices and how many users it takes: theory beside simulation, for docs/sample-complexity.md.

    python -m benchmarks complexity --seeds N --out DIR [--figures docs/figures] [--tiny]

The world: differences z ~ N(0, 2 I_D), users u_i = v + V w_i with V (D, K) orthonormal and w_i ~ N(0, s2 I_K), s2 = T / K,
choices Bradley-Terry with margin z . u_i. |v|^2 = T = 1, so that crowd and person weigh the same, and |u|^2 is about 2.

| figure      | theory                                                                                                       |
|-------------|--------------------------------------------------------------------------------------------------------------|
| users       | Bayes risk of a new user tr[(I / s2 + n F)^-1 2 I], F the Fisher information of a choice, and its fixed point  |
| bases       | sin^2 of the angle to V: (D - K) / U (r + r^2), r = 1 / (n F s2): principal components of noisy weights       |

Everything is drawn anew for every seed; `--tiny` is a check that it runs. Tables in DIR/complexity.md.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.ablations import line as row
from benchmarks.accuracy import say
from benchmarks.drawing import Line, Panel, draw
from palate.adaptation import adapt
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.likelihood import damped
from palate.models.base import RewardModel
from palate.models.hierarchical import Hierarchical
from palate.priors import Prior
from palate.solvers import Batch, posterior
from palate.training import fit

PERSONAL, CROWD = 1.0, 1.0  # T and |v|^2
CHOICES = (1, 2, 5, 10, 20, 40, 80, 160, 320)
USERS = (25, 50, 100, 200, 400, 800)
EACH = (5, 10, 20, 40, 80)

# -- theory


def information(square: float, share: float) -> float:
    """F: Fisher information of one choice about one weight, averaged over users, E[sigma'(m) x^2] with x ~ N(0, 2).

    For |u|^2 = `square` it is 2 E[sigma'(m)] across u and 2 E[sigma'(m) g^2] along it, m = sqrt(2 square) g, g ~ N(0, 1); `share`
    is the part of |u|^2 that lies along the weight on average.
    """
    g, mass = _grid()
    p = 1 / (1 + np.exp(-np.sqrt(2 * square) * g))
    across, along = 2 * float((mass * p * (1 - p)).sum()), 2 * float((mass * p * (1 - p) * g**2).sum())
    return across + (along - across) * share


def risk(n: float, weights: float, spread: float, info: float) -> float:
    """Mean squared error of a choice's margin, in squared log-odds, by the posterior mean after `n` choices, of `weights`
    independent weights ~ N(0, `spread`): tr[(I / spread + n F)^-1 2 I] = 2 K / (1 / spread + n F)."""
    return 2 * weights / (1 / spread + n * info)


def evolved(n: float, weights: float, spread: float, crowd: float) -> float:
    """The same, exact for many weights: `risk` at the information that a choice has for somebody who does not know u yet.

    Given all that is known a margin is N(omega, R); a choice then has probability P(omega) = E sigma(omega + sqrt(R) g) and
    information 2 E[P'^2 / (P (1 - P))], omega ~ N(0, 2 (crowd + weights spread) - R). R is where the two agree: the fixed point
    of Barbier et al. (2019, arXiv 1708.03395) for a logistic channel. At R = 0 the information is `information`, which is more.
    """
    g, mass = (part[::50] for part in _grid())
    mass = mass / mass.sum()
    total, found = 2 * (crowd + weights * spread), 2 * weights * spread
    for _ in range(200):
        omega = (total - found) ** 0.5 * g[:, None]
        p = 1 / (1 + np.exp(-(omega + found**0.5 * g)))
        chosen, slope = (p * mass).sum(1), (p * (1 - p) * mass).sum(1)
        found = (found + risk(n, weights, spread, 2 * float((mass * slope**2 / (chosen * (1 - chosen))).sum()))) / 2
    return found


def accuracy(cosine: float, square: float) -> float:
    """Share of choices of a user with |u|^2 = `square` that a reward at this cosine to u predicts, choices being logistic."""
    g, mass = _grid()
    p = 1 / (1 + np.exp(-np.sqrt(2 * square) * g))
    lean = cosine / max(1e-9, 1 - cosine**2) ** 0.5
    up = torch.special.ndtr(torch.from_numpy(lean * g)).numpy()
    return float((mass * (p * up + (1 - p) * (1 - up))).sum())


def expected_accuracy(excess: float, square: float) -> float:
    """Accuracy of a posterior mean whose margins miss 2 `square` of variance by `excess`: cosine^2 = 1 - excess / (2 square)."""
    return accuracy(max(0.0, 1 - excess / (2 * square)) ** 0.5, square)


def lost_directions(users: float, n: float, dim: int, k: int, info: float) -> float:
    """Mean squared sine of the principal angles between V and the leading eigenvectors of the users' estimated weights.

    Each user is a noisy draw w_i + noise, noise variance 1 / (n F) in every direction: eigenvectors of a covariance with K
    eigenvalues s2 + tau above D - K of tau (Anderson 1963): (D - K) / U (r + r^2), r = tau / s2. At most that of a random space.
    """
    r = 1 / (n * info * PERSONAL / k)
    return min(1 - k / dim, (dim - k) / users * (r + r * r))


def learned_risk(users: float, n: float, dim: int, k: int, info: float) -> float:
    """Excess of a new user with n choices under a population learned from `users` with n each, its parts taken as independent:
    the crowd's error, what lies outside the learned directions, the Bayes risk inside them, and what is lost because a reward
    fitted to a crowd whose people differ is `shortened`."""
    lost, spread = lost_directions(users, n, dim, k, info), PERSONAL / k
    inside = risk(n, k, spread * (1 - lost), info) if lost < 1 else 0.0
    return 2 * dim / (users * n * info) + 2 * PERSONAL * lost + inside + 2 * CROWD * (1 - shortened()) ** 2


def shortened() -> float:
    """Length of the crowd's fitted reward over that of v: E sigma(m + x), x ~ N(0, 2 T), is about sigma(m / sqrt(1 + pi 2 T / 8))
    (`likelihood.damped`), so one reward for everybody is fitted this much too short, however many users there are."""
    return float(damped(torch.ones(()), torch.tensor(2 * PERSONAL)))


def crossing(dim: int, info: float) -> float:
    """Choices after which somebody's own reward, from nothing but them and an even prior, equals the crowd's (excess 2 T)."""
    return (dim / PERSONAL - dim / (CROWD + PERSONAL)) / info


def equal(dim: int, square: float) -> float:
    """As `crossing`, by the fixed point."""
    low, high = 1.0, 1e5
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (middle, high) if evolved(middle, dim, square / dim, 0.0) > 2 * PERSONAL else (low, middle)
    return high


def _grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    g = np.linspace(-8, 8, 4001)
    mass = np.exp(-(g**2) / 2)
    return g, mass / mass.sum()


# -- simulation


def answered(slopes: Tensor, offset: Tensor, weights: Tensor, generator: torch.Generator) -> Batch:
    """Bradley-Terry choices: rows are turned round so that the chosen side comes first."""
    margin = offset + (slopes * weights[:, None]).sum(2)
    won = torch.rand(margin.shape, generator=generator, dtype=margin.dtype) < margin.sigmoid()
    sign = torch.where(won, 1.0, -1.0).to(margin)
    return Batch(slopes * sign[..., None], offset * sign, torch.ones_like(margin), None)


def first(batch: Batch, n: int) -> Batch:
    return Batch(batch.slopes[:, :n], batch.offset[:, :n], batch.weight[:, :n], None)


def draws(seed: int, users: int, n: int, k: int, spread: float, crowd: float) -> tuple[Batch, Tensor]:
    """Choices of users with K weights ~ N(0, spread I) beside a crowd of length `crowd`, and the weights."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(users, k, generator=generator, dtype=torch.float64) * spread**0.5
    slopes = torch.randn(users, n, k, generator=generator, dtype=torch.float64) * 2**0.5
    offset = torch.randn(users, n, generator=generator, dtype=torch.float64) * (2 * crowd) ** 0.5
    return answered(slopes, offset, w, generator), w


def new_users(seed: int, k: int, spread: float, crowd: float, choices: Sequence[int], users: int) -> list[float]:
    """Excess of the posterior mode after each number of choices."""
    batch, w = draws(seed, users, max(choices), k, spread, crowd)
    prior = Prior.gaussian(spread * torch.eye(k, dtype=torch.float64))
    modes = [posterior(first(batch, n), prior, covariance=False).mean for n in choices]
    return [2 * float((mode - w).square().sum(1).mean()) for mode in modes]


@dataclass(frozen=True)
class Learned:
    """What one fit left: lost directions, excess of new users, their accuracy, and the crowd's length along v (of v: 1)."""

    lost: float
    excess: float
    accuracy: float
    crowd: float


def linear(model: RewardModel, dim: int) -> tuple[Tensor, Tensor]:
    """(D,) what everybody shares and (D, K) what a user's weights multiply, of a model that is linear in the embeddings."""
    offset, slopes = model.design(model.features(Dense(torch.eye(dim))))
    return offset.double(), slopes.double()


def learned(seed: int, users: int, n: int, dim: int, k: int, new: int = 400) -> Learned:
    """Fit the default model's empirical Bayes part alone (K directions, no bend, kappa 1) and adapt new users from n choices."""
    rng = np.random.default_rng([seed, users, n])
    frame = np.linalg.qr(rng.standard_normal((dim, 1 + k)))[0]
    weights = rng.standard_normal((users + new, k)) * (PERSONAL / k) ** 0.5
    truth = CROWD**0.5 * frame[:, 0] + weights @ frame[:, 1:].T
    table = rng.standard_normal((2 * (users + new) * n, dim)).astype(np.float32)
    owner = np.repeat(np.arange(users + new), n)
    margin = ((table[0::2].astype(np.float64) - table[1::2]) * truth[owner]).sum(1)
    won = rng.random(len(margin)) < 1 / (1 + np.exp(-margin))
    left, right = np.arange(0, len(table), 2), np.arange(1, len(table), 2)
    ids = np.asarray([f"{i:05d}" for i in owner], dtype=object)
    data = EmbeddedPairs(table, np.where(won, left, right), np.where(won, right, left), ids)
    model = fit(data[np.flatnonzero(owner < users)], Hierarchical(k, bend=0, types=(), kappa=1.0, blend=False), seed=seed)
    offset, slopes = linear(model, dim)
    profiles = adapt(model, data[np.flatnonzero(owner >= users)])
    found = offset + profiles.mean.double() @ slopes.T
    inside = torch.linalg.qr(slopes)[0].T @ torch.from_numpy(frame[:, 1:])
    wanted = torch.from_numpy(truth[users:])
    cosine = torch.cosine_similarity(found, wanted, dim=1)
    hits = [accuracy(c, s) for c, s in zip(cosine.tolist(), wanted.square().sum(1).tolist(), strict=True)]
    excess = 2 * float((found - wanted).square().sum(1).mean())
    along = float(offset @ torch.from_numpy(frame[:, 0])) / CROWD**0.5
    return Learned(1 - float(inside.square().sum()) / k, excess, float(np.mean(hits)), along)


# -- figures


def curve(name: str, x: Sequence[float], seeds: Sequence[Sequence[float]], look: int) -> Line:
    """Means over seeds with the lowest and highest seed as the band."""
    found = np.asarray(seeds)
    return Line(name, x, found.mean(0).tolist(), found.min(0).tolist(), found.max(0).tolist(), look)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y on log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def users_figure(seeds: Sequence[int], tiny: bool, path: Path) -> list[str]:
    """Excess and accuracy of a new user against their number of choices, the population being known."""
    square, dim = CROWD + PERSONAL, 64
    choices, ranks, people = ((1, 5), (2,), 50) if tiny else (CHOICES, (2, 8, 32), 400)
    settings = {f"K = {k}": (k, PERSONAL / k, CROWD, PERSONAL / square / k) for k in ranks}
    settings[f"own choices alone, D = {dim}"] = (dim, square / dim, 0.0, 1 / dim)
    errors, hits, lines = [], [], [row(["", *(f"n = {n}" for n in choices)]), row(["---"] + ["---:"] * len(choices))]
    fine = np.geomspace(choices[0], choices[-1], 40).tolist()
    for look, (name, (k, spread, crowd, share)) in enumerate(settings.items()):
        info = information(square, share)
        found = [new_users(seed, k, spread, crowd, choices, people) for seed in seeds]
        errors += [curve(name, choices, found, look)]
        exact = [evolved(n, k, spread, crowd) for n in fine]
        errors += [Line("", fine, exact, look=look, theory=True)]
        hits += [Line(name, fine, [expected_accuracy(value, square) for value in exact], look=look, theory=True)]
        mean = np.mean(found, axis=0)
        lines.append(row([f"{name}: simulation", *(f"{value:.3f}" for value in mean)]))
        lines.append(row(["fixed point", *(f"{evolved(n, k, spread, crowd):.3f}" for n in choices)]))
        lines.append(row(["tr[(I / s2 + n F)^-1 2 I]", *(f"{risk(n, k, spread, info):.3f}" for n in choices)]))
    crowd_line = Line("crowd", fine, [2 * PERSONAL] * len(fine), look=5, theory=True)
    hits.append(Line("crowd", fine, [expected_accuracy(2 * PERSONAL, square)] * len(fine), look=5, theory=True))
    info = information(square, 0)
    below = float(np.interp(-2 * PERSONAL, -mean, choices))  # the last setting is somebody's own choices alone
    own = f"{crossing(dim, info):.0f} by `crossing`, {equal(dim, square):.0f} by the fixed point, {below:.0f} in the simulation"
    lines += ["", f"F = {info:.3f}. Own choices equal the crowd (D = {dim}) after: {own}. "]
    lines[-1] += "A new user's excess is halved after " + ", ".join(f"{k / (PERSONAL * info):.0f} (K = {k})" for k in ranks) + "."
    label = "choices of the new user, n"
    panels = [
        Panel("dashed: theory; markers: simulation", label, "excess, squared log-odds a choice", [*errors, crowd_line], log="xy"),
        Panel("theory", label, "accuracy", hits, log="x"),
    ]
    draw(path, panels, "Squared error of a new user's margins, and accuracy, against the number of their choices.")
    return lines


def bases_figure(seeds: Sequence[int], tiny: bool, path: Path) -> list[str]:
    """Error of the learned directions against users and against choices of each, and what it costs new users."""
    dim, k, square = 32, 2, CROWD + PERSONAL
    info = information(square, PERSONAL / square / k)
    users, each, still, people = ((20, 40), (5, 10), 10, 20) if tiny else (USERS, EACH, 20, 200)
    by_users = {u: [learned(s, u, still, dim, k) for s in seeds] for u in users}
    say("complexity: numbers of users done")
    by_each = {n: [learned(s, people, n, dim, k) for s in seeds] for n in each}

    def panel(x: str, of: dict[int, list[Learned]], theory: Callable[[float], float]) -> Panel:
        lost = [[one.lost for one in of[v]] for v in of]
        measured = curve("simulation", list(of), np.transpose(lost).tolist(), 0)
        fine = np.geomspace(min(of), max(of), 40).tolist()
        expected = Line("theory", fine, [theory(v) for v in fine], look=1, theory=True)
        return Panel(f"D = {dim}, K = {k}", x, "lost share of the directions, sin²", [measured, expected], log="xy")

    panels = [
        panel(f"seen users, {still} choices each", by_users, lambda u: lost_directions(u, still, dim, k, info)),
        panel(f"choices of each of {people} seen users", by_each, lambda n: lost_directions(people, n, dim, k, info)),
    ]
    fine = np.geomspace(min(users), max(users), 40).tolist()
    theory = [expected_accuracy(learned_risk(u, still, dim, k, info), square) for u in fine]
    known = expected_accuracy(risk(still, k, PERSONAL / k, info), square)
    hits = curve("simulation", list(users), np.transpose([[one.accuracy for one in by_users[u]] for u in users]).tolist(), 0)
    others = [Line("theory", fine, theory, look=1, theory=True)]
    others.append(Line("population known", fine, [known] * len(fine), look=2, theory=True))
    others.append(Line("crowd known", fine, [expected_accuracy(2 * PERSONAL, square)] * len(fine), look=5, theory=True))
    panels.append(Panel(f"new users after {still} choices", "seen users", "accuracy", [hits, *others], log="x"))
    draw(path, panels, "Error of the learned directions against the numbers of users and of choices, and accuracy on new users.")
    head = ["seen users x choices", "sin², simulation", "theory", "excess", "theory", "accuracy", "theory"]
    lines = [row(head), row(["---"] + ["---:"] * (len(head) - 1))]
    both = [(u, still, by_users[u]) for u in users] + [(people, n, by_each[n]) for n in each]
    for u, n, runs in both:
        lost, excess, hit = (float(np.mean([getattr(one, name) for one in runs])) for name in ("lost", "excess", "accuracy"))
        ahead = learned_risk(u, n, dim, k, info)
        cells = [f"{u} x {n}", f"{lost:.3f}", f"{lost_directions(u, n, dim, k, info):.3f}", f"{excess:.2f}", f"{ahead:.2f}"]
        lines.append(row([*cells, f"{hit:.3f}", f"{expected_accuracy(ahead, square):.3f}"]))
    most = float(np.mean([one.crowd for one in by_users[users[-1]]]))
    lines += ["", f"Length of the crowd's reward along v at {users[-1]} users: {most:.3f} (theory {shortened():.3f})."]
    if not tiny:
        tail = [u for u in users if u >= 100]
        measured = slope(tail, [float(np.mean([one.lost for one in by_users[u]])) for u in tail])
        lines += [f"Slope of log sin² on log users from {tail[0]} on: {measured:.2f} (theory -1)."]
        few, many = [n for n in each if n <= 20], [n for n in each if n >= 20]
        for part in (few, many):
            found = slope(part, [float(np.mean([one.lost for one in by_each[n]])) for n in part])
            told = slope(part, [lost_directions(people, n, dim, k, info) for n in part])
            lines.append(f"Slope on log choices from {part[0]} to {part[-1]}: {found:.2f} (theory {told:.2f}).")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Draw the two figures and tell their numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks complexity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of worlds")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them")
    parser.add_argument("--tiny", action="store_true", help="small worlds: a check that it runs")
    parser.add_argument("--only", action="append", choices=["users", "bases"], help="one figure")
    parser.add_argument("--out", type=Path, default=Path("bench-report"), help="folder of the results")
    parser.add_argument("--figures", type=Path, help="folder of the figures; by default that of --out")
    given = parser.parse_args(arguments)
    seeds, folder = list(range(given.first_seed, given.first_seed + given.seeds)), given.figures or given.out
    given.out.mkdir(parents=True, exist_ok=True)
    made = {"users": users_figure, "bases": bases_figure}
    text: list[str] = []
    for name, figure in made.items():
        if given.only is None or name in given.only:
            lines = figure(seeds, given.tiny, folder / f"complexity-{name}.svg")
            text += [f"## {name}", "", *lines, ""]
            say(f"complexity: {name} done")
    (given.out / "complexity.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))
