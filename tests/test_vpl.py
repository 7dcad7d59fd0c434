"""VPL: encoder and objective against flat Bayes, gradients against finite differences, published formulas, planted tastes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import palate
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import one_crowd
from palate.errors import DataError
from palate.models import attended, variational
from palate.models.attended import Published
from palate.models.variational import Problem, Settings
from palate.models.vpl import VPL, _Choice, _Part

Floats = NDArray[np.float64]
Fits = dict[str, VPL]

MAKE: dict[str, Callable[[], VPL]] = {
    "fixed": lambda: VPL(3, hidden=5, ridge=1e-3, epochs=3),
    "linear": lambda: VPL(3, hidden=0, ridge=1e-3, epochs=3),
    "faithful": lambda: VPL.faithful(6, hidden=7, rate=1e-2, copies=1),
}


def small(seed: int = 0, *, users: int = 12, pairs: int = 150, dim: int = 4, texts: int = 40) -> EmbeddedPairs:
    """Random choices with ties and weights, in double precision."""
    rng = np.random.default_rng(seed)
    sides = np.array([rng.permutation(texts)[:2] for _ in range(pairs)])
    who = np.concatenate([np.arange(users), rng.integers(users, size=pairs - users)])
    return EmbeddedPairs(
        rng.standard_normal((texts, dim)) * [1, 2, 0.5, 3] + 1,
        sides[:, 0],
        sides[:, 1],
        [f"u{u:02d}" for u in who],
        tie=rng.random(pairs) < 0.15,
        weight=rng.choice([0.5, 1, 2], pairs),
    )


@pytest.fixture(scope="module")
def fits() -> Fits:
    return {name: palate.fit(small(), make(), seed=1) for name, make in MAKE.items()}  # type: ignore[misc]


def opposed(seed: int, n_users: int = 60, dim: int = 4) -> tuple[EmbeddedPairs, EmbeddedPairs, EmbeddedPairs, float]:
    """Two kinds of users: one wants a text far from the middle of one axis, the other near it; a second axis everybody likes.

    reward = +-3 (|e_1| - .8) + e_2 / 2 on turned axes, logistic choices: linear in nothing, and of mean e_2 / 2 over the kinds.
    Returns train of seen users, support and test of others, and the accuracy of the true rewards on that test.
    """
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(rng.standard_normal((dim, 2)))[0]
    parts: list[EmbeddedPairs] = []
    for kind, n_choices in ((0, 30), (1, 30), (1, 40)):
        side = np.where(np.arange(n_users) % 2 == 0, 3.0, -3.0)
        e = rng.standard_normal((n_users * n_choices, 2, dim))
        axes = e @ frame
        who = np.repeat(np.arange(n_users), n_choices)
        reward = side[who, None] * (np.abs(axes[..., 0]) - 0.8) + axes[..., 1] / 2
        margin = reward[:, 0] - reward[:, 1]
        won = rng.random(len(who)) < 1 / (1 + np.exp(-margin))
        first = 2 * np.arange(len(who))
        table, ids = e.reshape(-1, dim).astype(np.float32), [f"{kind}-{u:03d}" for u in who]
        parts.append(EmbeddedPairs(table, first + ~won, first + won, ids))
    return parts[0], parts[1], parts[2], float(np.mean((margin > 0) == won))


def per_user(model: palate.RewardModel, support: EmbeddedPairs, test: EmbeddedPairs) -> Floats:
    right = (palate.margins(model, test, palate.adapt(model, support)) > 0).double()
    total = torch.zeros(len(test.user_ids), dtype=torch.float64).index_add_(0, test.user_index, right)
    return np.asarray((total / torch.bincount(test.user_index)).numpy())


# -- what holds for every preset


@pytest.mark.parametrize("name", MAKE)
def test_swap_negates_and_order_does_not_matter(name: str, fits: Fits) -> None:
    model, data = fits[name], small()
    profiles = palate.adapt(model, data)
    margins = palate.margins(model, data, profiles)
    torch.testing.assert_close(palate.margins(model, data.swapped(), profiles), -margins)
    mixed = data[torch.from_numpy(np.random.default_rng(3).permutation(len(data)))]
    torch.testing.assert_close(palate.adapt(model, mixed).mean, profiles.mean)
    assert float(profiles.mean.std(0).max()) > 1e-3  # users differ


@pytest.mark.parametrize("name", MAKE)
def test_a_batch_is_its_users_one_by_one(name: str, fits: Fits) -> None:
    model, data = fits[name], small()
    together = palate.adapt(model, data)
    for user in data.user_ids:
        alone = palate.adapt(model, data.of_users([user]))[user]
        torch.testing.assert_close(alone.mean, together[user].mean)
        if name == "faithful":
            assert alone.covariance is None
        else:
            torch.testing.assert_close(alone.covariance, together[user].covariance)


@pytest.mark.parametrize("name", MAKE)
def test_no_choices_are_the_prior(name: str, fits: Fits) -> None:
    model, data = fits[name], small()
    nobody = palate.adapt(model, data[torch.zeros(len(data), dtype=torch.bool)])
    assert len(nobody) == 0
    assert torch.equal(model.crowd_weights, torch.zeros(model.n_weights, dtype=torch.float64))
    torch.testing.assert_close(palate.margins(model, data, nobody), palate.margins(model, data))
    if name != "faithful":  # the crowd's reward, and nothing else
        plain = data.embeddings.project(model.direction[:, None])[:, 0]
        torch.testing.assert_close(palate.margins(model, data), plain[data.chosen] - plain[data.rejected])
    only_ties = data[data.tie & (data.user_index == data.user_index[data.tie][0])]
    assert torch.equal(palate.adapt(fits["faithful"], only_ties).mean, torch.zeros(1, 6, dtype=torch.float64))


@pytest.mark.parametrize("name", MAKE)
def test_the_same_bits_again_and_from_disk(name: str, fits: Fits, tmp_path: Path) -> None:
    model, data = fits[name], small()
    assert palate.fit(data, MAKE[name](), seed=1).fingerprint() == model.fingerprint()
    assert palate.fit(data, MAKE[name](), seed=2).fingerprint() != model.fingerprint() or name == "linear"
    model.save_pretrained(tmp_path)
    loaded = palate.load_model(tmp_path)
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.record == model.record
    ours, theirs = (palate.margins(m, data, palate.adapt(m, data)) for m in (model, loaded))
    assert torch.equal(ours, theirs)


# -- the fixed preset


def test_the_encoder_is_newton_on_a_bayesian_regression_written_flat(fits: Fits) -> None:
    """Three undamped Newton steps from 0 on -log p(choices | z) - log p(z), the reward taken as linear in z along chi."""
    model, data = fits["fixed"], small()
    profiles, k = palate.adapt(model, data), 3
    features, spread = model.features(data.embeddings).numpy(), model.spread.numpy()
    chosen, rejected = data.chosen.numpy(), data.rejected.numpy()
    d = (features[chosen] - features[rejected])[:, 1 + k : 1 + 2 * k]
    crowd = (features[chosen] - features[rejected])[:, 0]
    for u, user in enumerate(data.user_ids):
        mine = data.user_index.numpy() == u
        z, weight = np.zeros(k), data.weight.numpy()[mine]
        for _ in range(3):
            p = 1 / (1 + np.exp(-crowd[mine] - d[mine] @ z))
            gradient = d[mine].T @ (weight * (p - np.where(data.tie.numpy()[mine], 0.5, 1))) + z / spread**2
            hessian = d[mine].T @ (d[mine] * (weight * p * (1 - p))[:, None]) + np.diag(spread**-2.0)
            z = z - np.linalg.solve(hessian, gradient)
        np.testing.assert_allclose(profiles[user].mean, z, atol=1e-9)
        np.testing.assert_allclose(profiles[user].covariance, np.linalg.inv(hessian), atol=1e-9)


def test_kl_is_that_of_torch_distributions() -> None:
    rng = np.random.default_rng(0)
    root, mean = torch.from_numpy(rng.standard_normal((5, 3, 3))), torch.from_numpy(rng.standard_normal((5, 3)))
    precision, spread = root @ root.mT + torch.eye(3), torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    prior = MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.diag(spread**2))
    expected = kl_divergence(MultivariateNormal(mean, precision_matrix=precision), prior)
    torch.testing.assert_close(variational.divergence(mean, precision, spread), expected)
    width = torch.from_numpy(rng.uniform(-1, 1, (5, 3)))
    expected = kl_divergence(Normal(mean, (width / 2).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(attended.divergence(mean, width), expected)


def problem_of(hidden: int) -> tuple[Problem, dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    data, rng = small(), np.random.default_rng(5)
    scale, shift, mu = (torch.from_numpy(rng.uniform(0.2, 0.6, 4)) for _ in range(3))
    problem = Problem(data, scale, shift, mu)
    numbers = variational.start(problem, mu, Settings(latent=2, hidden=hidden), 0)
    numbers = {name: value + 0.1 * torch.from_numpy(rng.standard_normal(value.shape)) for name, value in numbers.items()}
    return problem, numbers, problem.contexts(0, 0)


@pytest.mark.parametrize("hidden", [0, 3])
def test_gradients_are_finite_differences(hidden: int) -> None:
    problem, numbers, masks = problem_of(hidden)
    users = torch.tensor([7, 2, 4, 0])
    names = [name for name, value in numbers.items() if value.numel()]
    leaves = [numbers[name].clone().requires_grad_() for name in names]

    def value(*parts: torch.Tensor) -> torch.Tensor:
        return variational.objective(problem, numbers | dict(zip(names, parts, strict=True)), users, masks, 0.3)

    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6)


def test_the_objective_is_a_flat_loop() -> None:
    problem, numbers, (context, query) = problem_of(3)
    data, users, spread = problem.data, [3, 8, 1], numbers["log_spread"].exp()
    x = data.embeddings.rows(torch.arange(40)) * problem.scale - problem.shift
    common = (data.embeddings.rows(torch.arange(40)) * problem.scale) @ torch.from_numpy(
        np.random.default_rng(5).uniform(0.2, 0.6, (3, 4))[2]
    )
    losses = []
    for user in users:
        mine = [p for p in range(len(data)) if int(data.user_index[p]) == user]
        precision, z = torch.diag(spread**-2), torch.zeros(2, dtype=torch.float64)

        def read(row: int, name: str) -> torch.Tensor:
            units = x[row] @ numbers["first"][:, 2:] + numbers["bias"]
            return x[row] @ numbers["first"][:, :2] + torch.where(units > 0, units, 0.2 * units) @ numbers[name]

        def reward(row: int, z: torch.Tensor) -> torch.Tensor:
            units = x[row] @ numbers["first"][:, 2:] + numbers["bias"]
            moved = units + z @ numbers["joint"]
            bent = torch.where(moved > 0, moved, 0.2 * moved) - torch.where(units > 0, units, 0.2 * units)
            return common[row] + z @ read(row, "psi") + bent @ numbers["out"]

        for _ in range(3):
            precision, right = torch.diag(spread**-2), torch.zeros(2, dtype=torch.float64)
            for p in mine:
                if context[p]:
                    c, r = int(data.chosen[p]), int(data.rejected[p])
                    d = read(c, "chi") - read(r, "chi")
                    chance = torch.sigmoid(common[c] - common[r] + d @ z)
                    curved = data.weight[p] * chance * (1 - chance)
                    precision = precision + curved * torch.outer(d, d)
                    wanted = 0.5 if data.tie[p] else 1.0
                    right = right + d * (curved * (d @ z) + data.weight[p] * (wanted - chance))
            z = torch.linalg.solve(precision, right)
        total, count = torch.zeros((), dtype=torch.float64), 0.0
        for p in mine:
            if query[p]:
                margin = reward(int(data.chosen[p]), z) - reward(int(data.rejected[p]), z)
                loss = torch.log1p(torch.exp(-margin)) + (margin / 2 if data.tie[p] else 0)
                total, count = total + data.weight[p] * loss, count + float(data.weight[p])
        prior = MultivariateNormal(torch.zeros(2, dtype=torch.float64), torch.diag(spread**2))
        total = total + 0.3 * kl_divergence(MultivariateNormal(z, precision_matrix=precision), prior)
        losses.append(total / count)
    found = variational.objective(problem, numbers, torch.tensor(users), (context, query), 0.3)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_contexts_are_1_2_5_or_half_and_share_nothing_with_their_queries() -> None:
    data = opposed(0, n_users=40)[0]
    problem = Problem(data, torch.ones(4), torch.zeros(4), torch.zeros(4))
    (context, query), (other, _) = problem.contexts(0, 0), problem.contexts(0, 1)
    assert not bool((context & query).any())
    assert not torch.equal(context, other)
    sizes = torch.bincount(data.user_index[context], minlength=40)
    assert set(sizes.tolist()) == {1, 2, 5, 15}
    assert set(torch.bincount(data.user_index[query]).tolist()) == {15}


def test_learning_starts_from_the_users_pulls_by_svd() -> None:
    data, rng = small(), np.random.default_rng(5)
    scale, shift, mu = (torch.from_numpy(rng.uniform(0.2, 0.6, 4)) for _ in range(3))
    found = variational.start(Problem(data, scale, shift, mu), mu, Settings(latent=2, hidden=0), 0)["first"].numpy()
    z = ((data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)) * scale).numpy()
    slope = data.weight.numpy() * (np.where(data.tie.numpy(), 0.5, 1) - 1 / (1 + np.exp(-z @ mu.numpy())))
    pulls = np.stack([slope[data.user_index.numpy() == u] @ z[data.user_index.numpy() == u] for u in range(12)])
    axes = np.linalg.svd(pulls - pulls.mean(0), full_matrices=False)[2][:2].T
    np.testing.assert_allclose(np.abs(np.sum(axes * found, axis=0)), np.linalg.norm(found, axis=0))
    np.testing.assert_allclose(((z @ found) ** 2).mean(0), [2, 2])  # half of a variance of 4 each


def test_active_units_count_what_tells_users_apart() -> None:
    mean = torch.tensor([[1.0, 0.5, 0.05], [-1.0, 0.5, -0.05]])
    assert variational.active_units(mean, torch.ones(3)) == 1
    assert variational.active_units(mean, torch.tensor([1.0, 1.0, 0.1])) == 2
    assert variational.active_units(mean, torch.tensor([20.0, 1.0, 1.0])) == 0


# -- planted truths


def test_opposed_tastes_that_are_linear_in_nothing_are_told_and_the_crowds_reward_cannot() -> None:
    gains, short = [], []
    for seed in (0, 1, 2):
        train, support, test, oracle = opposed(seed)
        model = palate.fit(train, VPL(8, hidden=48, ridge=3e-4, epochs=16), seed=seed)
        ours = per_user(model, support, test)
        gains.append(ours - per_user(palate.fit(train, palate.BradleyTerry(), seed=seed), support, test))
        short.append(oracle - float(ours.mean()))
        assert model.record["selection"]["active_units"] > 0  # type: ignore[attr-defined]
    away = np.concatenate(gains)
    low = away.mean() - 1.96 * away.std() / len(away) ** 0.5
    assert low > 0.1  # the lower end of a paired interval over users of three seeds
    assert max(short) < 0.05


def test_one_crowd_is_left_alone_and_the_record_says_so() -> None:
    world = one_crowd(1, n_users=40, dim=8)
    model = palate.fit(world.train, VPL(4, epochs=8), seed=0)
    assert model.n_weights == 0
    assert model.record["selection"]["epochs"] == model.record["selection"]["active_units"] == 0
    plain = palate.fit(world.train, palate.BradleyTerry(), seed=0)
    ours, theirs = (palate.margins(m, world.test_unseen, palate.adapt(m, world.support)) for m in (model, plain))
    torch.testing.assert_close(ours, theirs)
    assert palate.adapt(model, world.support).mean.shape == (40, 0)


def test_held_out_users_choose_the_hidden_layer_where_tastes_bend() -> None:
    train, support, test, _ = opposed(4, n_users=40)
    model = palate.fit(train, VPL(8, ridge=3e-4, epochs=16), seed=0)
    chosen = model.record["selection"]
    assert chosen["hidden"] == 64
    assert {row["hidden"] for row in chosen["curve"][1:]} == {0, 64}
    crowd_alone = per_user(palate.fit(train, palate.BradleyTerry(), seed=0), support, test)
    assert per_user(model, support, test).mean() > crowd_alone.mean() + 0.1


def test_held_out_users_are_judged_by_the_weights_of_their_choices() -> None:
    """A choice of weight two counts as the same choice twice, in what is chosen too."""
    data = small(3, users=40, pairs=400)
    twice = torch.arange(len(data)) % 3 == 0
    plain = EmbeddedPairs(data.embeddings, data.chosen, data.rejected, data.users, weight=torch.where(twice, 50.0, 1.0).numpy())
    choice = _Choice(VPL(2, hidden=0), plain, 0, lambda share, what: None)
    part = _Part(choice, 0)
    found = part.errors(None)
    held, query = part.held.data, part.query
    margin = held.differences().project((choice.scale * part.direction)[:, None])[:, 0]
    size = margin[query].abs().median() / 3
    wrong = torch.sigmoid(-margin / size) * held.weight * query
    total = torch.zeros(len(held.user_ids), dtype=wrong.dtype)
    expected = total.index_add(0, held.user_index, wrong) / total.index_add(0, held.user_index, held.weight * query)
    torch.testing.assert_close(found.to(expected), expected, atol=1e-5, rtol=1e-5)


# -- the published code

WAY = Published(latent=3, hidden=4, kl=0.1, rate=1e-2, epochs=2, copies=1, contexts=(2, 3))


def test_annealing_and_rate_by_hand() -> None:
    found = [attended.annealed(step) for step in (0, 2500, 5000, 9999, 10_000, 12_500)]
    np.testing.assert_allclose(found, [0.1, 0.1 + 0.45 * (1 - 2**-0.5), 0.55, 1.0, 0.1, found[1]], atol=1e-7)
    rates = [attended.rate_at(step, 100) for step in (0, 1, 3, 3 + 97 / 2, 100)]  # type: ignore[arg-type]
    np.testing.assert_allclose(rates, [0, 1 / 3, 1, 0.5, 0], atol=1e-12)


def test_z_has_length_root_k_in_training_and_any_in_use(fits: Fits) -> None:
    mean, width, noise = (torch.from_numpy(np.random.default_rng(s).standard_normal((4, 6))) for s in range(3))
    z = attended.drawn(mean, width, noise)
    torch.testing.assert_close(z.norm(dim=1), torch.full((4,), 6**0.5, dtype=torch.float64))
    raw = mean + torch.sqrt(width.exp()) * noise
    torch.testing.assert_close(z / raw, (6**0.5 / raw.norm(dim=1))[:, None].expand(4, 6))
    used = palate.adapt(fits["faithful"], small()).mean.norm(dim=1)
    assert float((used - 6**0.5).abs().min()) > 0.1


def test_mean_and_log_variance_are_clamped() -> None:
    rng = np.random.default_rng(0)
    numbers = {name: torch.from_numpy(30 * rng.standard_normal(size)) for name, size in attended.sizes(WAY).items()}
    first = torch.from_numpy(rng.standard_normal((20, 4)))
    mean, width = attended.encoded(first, torch.ones(5, 4, dtype=torch.bool), numbers, WAY)
    for value in (mean, width):
        assert set(value.abs().flatten().tolist()) == {1.0}


def test_the_published_networks_are_torch_modules(fits: Fits) -> None:
    """Linear, LeakyReLU and scaled_dot_product_attention on whole rows, one user at a time."""
    model, data = fits["faithful"], small()
    profiles, numbers = palate.adapt(model, data), model._parts()
    table = data.embeddings.rows(torch.arange(40))
    reward_e, pair_c, pair_r = model.first.split(7, dim=1)

    def linear(name: str, weight: torch.Tensor | None = None) -> torch.nn.Linear:
        weight = numbers[name] if weight is None else weight
        out = torch.nn.Linear(*weight.shape, dtype=torch.float64)
        out.weight.data, out.bias.data = weight.T, numbers[f"{name} bias"]
        return out

    act = torch.nn.LeakyReLU(0.2)
    pair = torch.nn.Sequential(linear("pair1", torch.cat([pair_c, pair_r])), act, linear("pair2"), act, linear("pair3"))
    first = linear("reward1", torch.cat([reward_e, numbers["reward1 z"]]))
    reward = torch.nn.Sequential(first, act, linear("reward2"), act, linear("reward3"))
    for u, user in enumerate(data.user_ids):
        mine = (data.user_index == u) & ~data.tie
        pairs = pair(torch.cat([table[data.chosen[mine]], table[data.rejected[mine]]], dim=1))
        heads = [linear(name)(pairs)[None] for name in ("query", "key", "value")]
        pooled = torch.nn.functional.scaled_dot_product_attention(*heads)[0].mean(0)
        z = linear("mean")(pooled).clamp(-1, 1)
        torch.testing.assert_close(profiles[user].mean, z.detach())
        theirs = reward(torch.cat([table, z.expand(40, -1)], dim=1))[:, 0]
        torch.testing.assert_close(model.score(model.features(data.embeddings), profiles[user].mean), theirs.detach())


def test_gradients_of_the_published_step_are_finite_differences() -> None:
    data, rng = small(), np.random.default_rng(1)
    numbers = {name: torch.from_numpy(0.4 * rng.standard_normal(size)) for name, size in attended.sizes(WAY).items()}
    numbers["first"] = torch.from_numpy(0.2 * rng.standard_normal((4, 12)))
    query, noise = torch.tensor([5, 9]), torch.from_numpy(rng.standard_normal((2, 3)))
    context, real = attended._contexts(data, query, (2, 3), torch.Generator().manual_seed(0))
    names = list(numbers)

    def value(*parts: torch.Tensor) -> torch.Tensor:
        return attended.step_loss(data, dict(zip(names, parts, strict=True)), query, context, real, noise, WAY, 0.1)

    assert torch.autograd.gradcheck(value, [numbers[name].requires_grad_() for name in names], eps=1e-6, atol=1e-6)


def test_contexts_are_other_choices_of_the_same_user_drawn_once() -> None:
    data = small()
    query = torch.arange(len(data))
    context, real = attended._contexts(data, query, (2, 3), torch.Generator().manual_seed(0))
    others = data.grouped().counts[data.user_index] - 1
    for p in range(len(data)):
        mine = context[p][real[p]]
        assert (data.user_index[mine] == data.user_index[p]).all()
        assert p not in mine.tolist()
        assert len(set(mine.tolist())) == len(mine)
        assert min(2, int(others[p])) <= len(mine) <= 3
    assert {int(n) for n in real.sum(1)} >= {2, 3}


def test_the_published_model_learns_what_the_crowd_likes() -> None:
    world = one_crowd(2, n_users=20, dim=8)
    model = palate.fit(world.train, VPL.faithful(8, hidden=16, rate=1e-2), seed=0)
    assert per_user(model, world.support, world.test_unseen).mean() > world.oracle_unseen - 0.06


# -- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPL(0), "latent is 0; expected a positive size of z"),
        (lambda: VPL(()), r"latent is \(\)"),
        (lambda: VPL(hidden=-1), "hidden is -1; expected no negative number"),
        (lambda: VPL(ridge=-1.0), r"ridge is -1\.0; expected a number of at least 0"),
        (lambda: VPL(kl=float("nan")), "kl is nan; expected a finite number"),
        (lambda: VPL(epochs=0), "epochs is 0; expected at least one"),
        (lambda: VPL.faithful((2, 3)), r"latent is \(2, 3\) and hidden 512; the faithful preset takes one"),  # type: ignore[arg-type]
        (lambda: VPL.faithful(contexts=(3, 2)), r"contexts \(3, 2\); expected a positive rate"),
    ],
)
def test_arguments_that_make_no_model(make: Callable[[], VPL], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make()


def test_nobody_to_ask_for_the_published_model() -> None:
    lonely = EmbeddedPairs(torch.eye(4), [0, 1], [1, 2], ["a", "b"])
    with pytest.raises(DataError, match="2 strict choices of 2 users, no two of one user"):
        palate.fit(lonely, VPL.faithful(4, hidden=4))


def test_numbers_that_do_not_fit_the_options_are_refused(fits: Fits) -> None:
    state: dict[str, Any] = dict(fits["fixed"].state_dict())
    with pytest.raises(DataError, match=r"3 latent and 5 hidden .* expected 8 and 50"):
        _ = fits["fixed"].like(state | {"rest": state["rest"][1:]}).prior


def test_few_users_cannot_be_asked_and_one_has_nobody_to_differ_from() -> None:
    data = small()
    few = palate.fit(data.of_users(["u00", "u01", "u02"]), VPL(epochs=4))
    assert "curve" not in few.record["selection"]
    assert (few.n_weights, few.record["selection"]["hidden"], few.record["selection"]["epochs"]) == (2, 0, 2)
    alone = palate.fit(data.of_users(["u03"]), VPL(2, hidden=3, ridge=1e-3, epochs=2))
    assert alone.n_weights == 0
    assert torch.isfinite(palate.margins(alone, data, palate.adapt(alone, data))).all()
