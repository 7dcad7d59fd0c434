"""MRM: closed forms of the published step, meta-gradients by finite differences, planted people, and training that resumes."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import palate
from palate import likelihood
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import Planted, one_crowd, two_groups
from palate.errors import DataError, MismatchError, ModelFileError
from palate.models.crowd import Rescaled
from palate.models.meta import (
    ExactSolve,
    GradientSteps,
    Inner,
    Outer,
    Project,
    Shape,
    State,
    adapted,
    keyed_order,
    published_split,
)
from palate.models.mrm import MRM
from palate.models.objectives import RPO, CVaR, Mean
from palate.priors import Prior
from palate.solvers import Batch, posterior

QUICK = Outer(0.05, 8, 4, "constant", warmup=0.0, ridge=1e-3)


def problem(users: int = 3, n: int = 5, k: int = 2, seed: int = 0) -> Batch:
    """Uneven users in double precision, with weights, offsets and ties."""
    rng = np.random.default_rng(seed)
    weight = rng.choice([0.5, 1.0, 2.0], (users, n)) * (np.arange(n) < n - np.arange(users)[:, None])
    parts = rng.standard_normal((users, n, k)), rng.standard_normal((users, n)), weight
    return Batch(*(torch.from_numpy(part) for part in parts), torch.from_numpy(rng.random((users, n)) < 0.2))


@pytest.fixture(scope="module")
def data() -> EmbeddedPairs:
    return two_groups(n_users=14, n_train=8, n_test=1, dim=5).train


# -- the inner loop


def test_the_published_step_is_one_bit() -> None:
    """w0 + alpha (s, -s), s the sign of the mean of sigma(-p.Delta) (Delta_1 - Delta_2) over the support."""
    rate, start = 1e-3, torch.tensor([0.3, -0.4], dtype=torch.float64)
    batch = problem(users=6, n=8)._replace(tie=None, offset=torch.zeros(6, 8, dtype=torch.float64))
    found = GradientSteps(rate, 1).moved(batch, start, start[:0], simplex=True)
    p = start.softmax(0)
    pull = (torch.sigmoid(-(batch.slopes @ p)) * (batch.slopes[..., 0] - batch.slopes[..., 1]) * batch.weight).sum(1)
    expected = start + rate * pull.sign()[:, None] * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert set(pull.sign().tolist()) == {-1.0, 1.0}
    assert float((found.softmax(1) - p).abs().max()) <= rate / 2


def test_the_published_model_adapts_by_that_step(data: EmbeddedPairs) -> None:
    model = palate.fit(data, MRM.faithful(epochs=1))
    start = model.state_dict()["start"]
    expected = [(start + 1e-3 * torch.tensor([s, -s])).softmax(0) for s in (1.0, -1.0)]
    for profile in palate.adapt(model, data).values():
        assert min(float((profile.mean - mixture).abs().max()) for mixture in expected) < 1e-5  # Adam's eps


def test_steps_are_those_of_torch() -> None:
    batch, start = problem(k=3), torch.tensor([0.1, -0.2, 0.5], dtype=torch.float64)
    kinds: dict[bool, Callable[..., torch.optim.Optimizer]] = {True: torch.optim.Adam, False: torch.optim.SGD}
    for adam, optimiser in kinds.items():
        found = GradientSteps(0.2, 4, adam).moved(batch, start, start[:0], simplex=False)
        for i in range(len(batch.offset)):
            w = start.clone().requires_grad_()
            steps, one = optimiser([w], lr=0.2), batch.at(torch.tensor([i]))
            for _ in range(4):
                steps.zero_grad()
                (one.loss(w[None]).sum() / one.weight.sum()).backward()  # type: ignore[no-untyped-call]
                steps.step()
            torch.testing.assert_close(found[i], w.detach(), atol=1e-12, rtol=0)


def test_the_exact_solve_is_the_mode_and_a_user_without_support_stays() -> None:
    batch = problem(users=4, n=6, k=3)
    batch = batch._replace(weight=batch.weight * torch.tensor([[1.0], [1], [1], [0]]))
    start, spread = torch.tensor([0.5, 0.0, -1.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    found = ExactSolve().moved(batch, start, spread, simplex=False)
    prior = Prior.gaussian(torch.diag(spread.square()), start)
    torch.testing.assert_close(found, posterior(batch, prior, tolerance=1e-10).mean, atol=1e-7, rtol=0)
    for inner in (ExactSolve(), GradientSteps(0.1, 3), GradientSteps(0.1, 3, adam=False)):
        torch.testing.assert_close(inner.moved(batch, start, spread, simplex=False)[3], start)


def query_loss(inner: Inner, slopes: torch.Tensor, start: torch.Tensor, simplex: bool) -> torch.Tensor:
    """A weighted sum of three users' query losses after adapting to other pairs through the same bases."""
    known, asked = problem(seed=1, k=3), problem(seed=2, k=3)
    support = known._replace(slopes=slopes)
    weights = adapted(inner, support, {"start": start, "spread": torch.full((3,), 0.7).double()}, simplex=simplex)
    query = asked._replace(slopes=asked.slopes + slopes)
    return (query.loss(weights) * torch.tensor([1.0, 0.5, 2.0])).sum()


def by_differences(inner: Inner, slopes: torch.Tensor, start: torch.Tensor, simplex: bool) -> tuple[torch.Tensor, ...]:
    out = []
    for which, value in enumerate((slopes, start)):
        found = torch.zeros_like(value)
        for i in range(value.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [slopes.clone(), start.clone()]
                moved[which].view(-1)[i] += step
                ends.append(query_loss(inner, moved[0], moved[1], simplex))
            found.view(-1)[i] = (ends[0] - ends[1]) / 2e-5
        out.append(found)
    return tuple(out)


SECOND = [
    (GradientSteps(0.3, 3, adam=False), True),
    (GradientSteps(0.3, 3, adam=False), False),
    (GradientSteps(0.2, 3, adam=True), True),
    (GradientSteps(0.2, 3, adam=True), False),
    (ExactSolve(), False),
]


@pytest.mark.parametrize(("inner", "simplex"), SECOND)
def test_meta_gradients_against_central_differences(inner: Inner, simplex: bool) -> None:
    slopes, start = problem(seed=1, k=3).slopes, torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64)
    leaves = slopes.clone().requires_grad_(), start.clone().requires_grad_()
    found = torch.autograd.grad(query_loss(inner, leaves[0], leaves[1], simplex), leaves)
    for mine, expected in zip(found, by_differences(inner, slopes, start, simplex), strict=True):
        torch.testing.assert_close(mine, expected, atol=2e-7, rtol=2e-6)
    lower = replace(inner, **({"implicit": False} if isinstance(inner, ExactSolve) else {"second_order": False}))  # type: ignore[type-var]
    first = torch.autograd.grad(query_loss(lower, leaves[0], leaves[1], simplex), leaves, allow_unused=True)
    assert first[0] is not None
    assert float((first[0] - found[0]).abs().max()) > 1e-2  # the other order is another gradient
    torch.testing.assert_close(query_loss(lower, slopes, start, simplex), query_loss(inner, slopes, start, simplex))


def test_the_published_second_order_is_first_order() -> None:
    """The derivative of a sign: what the published code pays for a second-order gradient, it does not get."""
    slopes, start = problem(seed=1, k=3).slopes, torch.tensor([0.2, -0.3, 0.1], dtype=torch.float64)
    found = []
    for second in (True, False):
        leaves = slopes.clone().requires_grad_(), start.clone().requires_grad_()
        inner = GradientSteps(1e-3, 1, adam=True, second_order=second)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(query_loss(inner, *leaves, True), leaves)]))
    assert 0 < float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4


def test_a_gradient_that_underflows_is_no_step_and_no_nan() -> None:
    slopes = torch.zeros(2, 3, 2).requires_grad_()
    start = torch.zeros(2).requires_grad_()
    batch = Batch(slopes, torch.tensor([[200.0] * 3, [0.0] * 3]), torch.ones(2, 3), None)
    found = GradientSteps(0.5, 3).moved(batch, start, start[:0], simplex=False)
    assert found.tolist() == [[0.0, 0.0]] * 2
    for gradient in torch.autograd.grad(found.sum(), (slopes, start)):
        assert bool(torch.isfinite(gradient).all())


# -- the outer loop


def test_the_schedule() -> None:
    cosine = Outer(rate=2.0, batch=2, epochs=200, warmup=0.05)  # 101 steps an epoch of 201 users, 20,200 in all, 1,010 to rise
    assert [cosine.at(step, 201) for step in (0, 1, 1010)] == pytest.approx([0, 2 / 1010, 2])
    assert cosine.at(1010 + (20200 - 1010) // 2, 201) == pytest.approx(1, abs=1e-3)
    assert cosine.at(20200, 201) == 0
    few = Outer(rate=0.05, batch=256, epochs=40, warmup=0.0)  # more users a step than there are: one step an epoch
    rates = [few.at(step, 24) for step in range(41)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[40]) == (0.05, 0)
    assert rates[20] == pytest.approx(0.025)
    assert {replace(QUICK).at(step, 9) for step in range(30)} == {0.05}


def test_the_published_split_takes_whole_conversations() -> None:
    user = np.repeat(np.arange(4), [12, 6, 2, 3])
    unit = np.concatenate([np.arange(12), np.arange(6) // 2, [0, 0], [0, 1, 1]])
    labels = [f"{u}:{c}" for u, c in zip(user, unit, strict=True)]
    n = len(user)
    order = np.random.default_rng(0).permutation(n)
    table = np.random.default_rng(1).standard_normal((2 * n, 3)).astype(np.float32)
    users = np.array([f"u{u}" for u in user])[order]
    pairs = EmbeddedPairs(table, np.arange(n), n + np.arange(n), users, unit=np.array(labels)[order])
    drawn, sizes = published_split(pairs, 7), set()
    for epoch in range(20):
        support, query = (side.numpy() for side in drawn(epoch))
        label = np.array(labels)[order]
        for who, n_query in (("u0", 10), ("u1", 2), ("u3", 1)):  # floor(.9 n) of 12, 3 and 2 conversations
            mine = pairs.users == who
            assert not (support & query)[mine].any()
            assert (support | query)[mine].all()
            assert len(set(label[query & mine])) == n_query
            assert not set(label[query & mine]) & set(label[support & mine])
        assert support[pairs.users == "u2"].all()  # one conversation: both
        assert query[pairs.users == "u2"].all()
        sizes.add(tuple(query))
    assert len(sizes) > 15
    again = published_split(pairs, 1007)(3)  # the published seeds: run + user + 1000 epoch
    assert torch.equal(again[1], drawn(4)[1])
    assert not torch.equal(published_split(pairs, 8)(3)[1], drawn(3)[1])


def test_users_come_in_an_order_of_the_epoch() -> None:
    orders = {tuple(keyed_order(9, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(9)) for order in orders)


def test_the_projection_has_the_derivative_of_the_matrix(data: EmbeddedPairs) -> None:
    scale = torch.linspace(0.5, 2, 5)
    bases = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    z = (data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)) * scale
    found = Project.apply(bases, Rescaled(data.differences(), scale))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, z @ bases)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((found * weight).sum(), bases)
    torch.testing.assert_close(gradient, z.T @ weight)


def test_hidden_layers_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    for bias in (True, False):
        shape = Shape(3, (4, 6), bias)
        layers = torch.nn.Sequential(
            *(torch.nn.Linear(5, 4, bias), torch.nn.ReLU(), torch.nn.Linear(4, 6, bias), torch.nn.ReLU()),
            torch.nn.Linear(6, 3, bias=False),
        )
        for parameter in layers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
        flat: list[torch.Tensor] = []
        for layer, following in pairwise(linear):
            flat += ([layer.bias] if bias else []) + [following.weight.T.flatten()]
        rows = torch.randn(7, 5, generator=generator)
        found = shape.after(rows @ linear[0].weight.T, torch.cat(flat))
        torch.testing.assert_close(found, layers(rows))


# -- training


METHODS: dict[str, Callable[[], MRM]] = {
    "published": lambda: MRM.faithful(epochs=4),
    "exact": lambda: MRM(3, inner=ExactSolve(), outer=QUICK),
    "mixture": lambda: MRM(2, simplex=True, outer=QUICK, objective=CVaR(0.5)),
    "hidden": lambda: MRM(2, hidden=(6,), bias=True, inner=GradientSteps(0.3, 2, adam=False), outer=QUICK, objective=RPO()),
    "published, hidden": lambda: MRM.from_options({**MRM.faithful(epochs=3).options(), "hidden": [4], "bias": True}),
    "chosen": lambda: MRM(),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_is_the_model_and_the_same_seed_gives_the_same_bits(name: str, data: EmbeddedPairs, tmp_path: Path) -> None:
    model = palate.fit(data, METHODS[name](), seed=2)
    model.save_pretrained(tmp_path)
    again = palate.load_model(tmp_path)
    assert again.fingerprint() == model.fingerprint() == palate.fit(data, METHODS[name](), seed=2).fingerprint()
    assert again.options() == model.options()
    ours, theirs = palate.adapt(model, data), palate.adapt(again, data)
    assert torch.equal(ours.mean, theirs.mean)
    assert torch.equal(palate.margins(model, data, ours), palate.margins(again, data, theirs))


@pytest.mark.parametrize("name", ["published", "exact", "mixture", "hidden"])
def test_training_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    data = two_groups(n_users=5, n_train=8, n_test=1, dim=5).train  # too few to hold any out: every epoch is made
    method = METHODS[name]()
    whole = list(method.epochs(data, seed=3))
    assert [epoch.number for epoch in whole] == list(range(len(whole)))
    assert len(whole) > 2
    for stop in (0, 1, len(whole) - 1):
        whole[stop].state.save(tmp_path / "state.safetensors")
        state = State.load(tmp_path / "state.safetensors")
        rest = list(method.epochs(data, seed=3, state=state))
        assert [epoch.number for epoch in rest] == list(range(stop, len(whole)))
        for ours, theirs in zip(rest[1:], whole[stop + 1 :], strict=True):
            assert ours.loss == theirs.loss
            assert ours.model().fingerprint() == theirs.model().fingerprint()
        assert all(torch.equal(rest[-1].state.numbers[key], value) for key, value in whole[-1].state.numbers.items())
    assert whole[-1].model().fingerprint() == palate.fit(data, method, seed=3).fingerprint()
    assert whole[0].model().fingerprint() != whole[1].model().fingerprint()


def test_states_of_something_else_are_refused(data: EmbeddedPairs, tmp_path: Path) -> None:
    method = MRM.faithful(epochs=2)
    state = next(iter(method.epochs(data))).state
    for attempt, word in (
        (lambda: method.epochs(data, seed=1, state=state), "seed 0 cannot go on with seed 1"),
        (lambda: MRM.faithful(epochs=3).epochs(data, state=state), "training of options .* cannot go on"),
        (lambda: method.epochs(data[:-1], state=state), "training of data"),
    ):
        with pytest.raises(MismatchError, match=word):
            list(attempt())
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"nothing")
    for wrong in (path, tmp_path / "absent"):
        with pytest.raises(ModelFileError, match="cannot be read as training"):
            State.load(wrong)
    palate.adapt(palate.fit(data, method), data).save(path)
    with pytest.raises(ModelFileError, match="it is palate-profiles version 1"):
        State.load(path)


def test_training_lowers_the_loss_of_queries() -> None:
    planted = two_groups(1, n_users=40, n_train=20, n_test=1, dim=8)
    for method in (MRM(2, simplex=True, outer=replace(QUICK, epochs=30)), MRM(3, hidden=(16,), outer=replace(QUICK, epochs=30))):
        losses = [epoch.loss for epoch in method.epochs(planted.train)]
        assert np.isnan(losses[0])
        assert np.mean(losses[-3:]) < np.mean(losses[1:4])


# -- ablations


def test_no_bases_is_the_crowds_reward(data: EmbeddedPairs) -> None:
    model = palate.fit(data, MRM(0))
    assert model.n_weights == 0
    plain = palate.margins(palate.fit(data, palate.BradleyTerry()), data)
    torch.testing.assert_close(palate.margins(model, data, palate.adapt(model, data)), plain, atol=2e-2, rtol=2e-2)


def test_one_published_basis_has_nothing_to_adapt(data: EmbeddedPairs) -> None:
    model = palate.fit(data, MRM.faithful(1, epochs=2))
    assert palate.adapt(model, data).mean.eq(1).all()
    assert torch.equal(palate.margins(model, data, palate.adapt(model, data)), palate.margins(model, data))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_mixture_starts_on_either_side_of_the_crowd(k: int, data: EmbeddedPairs) -> None:
    """Bases that differ, and that halfway between two sides are the crowd's reward; one basis is the crowd's itself."""
    begin = next(iter(MRM(k, simplex=True, outer=replace(QUICK, epochs=0)).epochs(data.of_users(data.user_ids[:8]))))
    bases = begin.model().state_dict()["bases"]
    assert bases.shape == (5, k)
    crowd = palate.margins(palate.fit(data.of_users(data.user_ids[:8]), palate.BradleyTerry()), data)
    z = data.embeddings.rows(data.chosen) - data.embeddings.rows(data.rejected)
    half = (k + 1) // 2
    middle = z @ (bases[:, 0] + bases[:, half if k > 1 else 0]) / 2
    assert float(torch.corrcoef(torch.stack([middle, crowd]))[0, 1]) > 0.99
    assert int(torch.linalg.matrix_rank(bases)) == min(k, half + 1)


def test_without_meta_learning_the_loss_is_that_of_the_start(data: EmbeddedPairs) -> None:
    """One epoch, everybody in one step: its loss is the mean query loss with nobody adapted."""
    outer = Outer(1e-3, 100, 1, warmup=0.0)
    plain = replace(outer, epochs=1)
    method = MRM.from_options({**MRM.faithful(meta_learned=False).options(), "outer": {"kind": "Outer", **vars(plain)}})
    start, after = method.epochs(data, seed=1)
    query = published_split(data, 1)(0)[1]
    losses = likelihood.nll(palate.margins(start.model(), data))
    own = [float(losses[query & (data.user_index == u)].mean()) for u in range(len(data.user_ids))]
    assert after.loss == pytest.approx(np.mean(own), abs=1e-6)


# -- what cannot be


def test_arguments_that_cannot_be_are_refused() -> None:
    for make, word in (
        (lambda: MRM(-1), "n_bases is -1"),
        (lambda: MRM.faithful(0), "n_bases is 0; the published model mixes at least one"),
        (lambda: MRM(2, hidden=(0,)), "hidden .* expected no negative number, and positive widths"),
        (lambda: MRM(2, simplex=True, inner=ExactSolve()), "an exact solve on the simplex"),
        (lambda: GradientSteps(0.0), "rate 0.0; expected"),
        (lambda: GradientSteps(0.1, -1), "steps is -1"),
        (lambda: Outer(rate=-1.0), "expected positive rate"),
        (lambda: Outer(schedule="linear"), "schedule is 'linear'; expected 'cosine' or 'constant'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(DataError, match=word):
            make()


def test_options_survive_json() -> None:
    for make in METHODS.values():
        model = make()
        again = MRM.from_options(json.loads(json.dumps(model.options())))
        assert again.options() == model.options()
    assert MRM().objective == Mean()


# -- planted people


def unseen(model: palate.RewardModel, planted: Planted) -> float:
    rows = palate.evaluate(model, planted.support, planted.test_unseen).rows()
    return float(np.mean([row["accuracy"] for row in rows]))


def test_people_who_do_not_differ_get_the_crowds_reward() -> None:
    planted = one_crowd(0, n_users=40, n_train=20, n_test=40, dim=8)
    model = palate.fit(planted.train, MRM())
    assert model.n_weights == 0
    assert unseen(model, planted) == pytest.approx(unseen(palate.fit(planted.train, palate.BradleyTerry()), planted), abs=0.01)


@pytest.mark.slow
def test_two_groups_as_published_is_bradley_terry() -> None:
    planted = two_groups(0)
    crowd = unseen(palate.fit(planted.train, palate.BradleyTerry()), planted)
    model = palate.fit(planted.train, MRM.faithful())
    assert unseen(model, planted) == pytest.approx(crowd, abs=0.02)
    still = [row["accuracy"] for row in palate.evaluate(model, None, planted.test_unseen).rows()]
    assert float(np.mean(still)) == pytest.approx(unseen(model, planted), abs=0.005)  # adapting changes next to nothing


@pytest.mark.slow
def test_two_groups_done_right_comes_near_the_truth() -> None:
    """Within .018 of the true rewards, which is .77 where those reach .788, and far above one reward for everybody."""
    planted = two_groups(0)
    model = palate.fit(planted.train, MRM())
    assert unseen(model, planted) > planted.oracle_unseen - 0.018
    assert unseen(model, planted) > planted.crowd_unseen + 0.08
