"""The attribute prior: planted attributes that matter or not, its estimation against flat loops, what is kept of people."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

import palate
from palate.adaptation import Profiles, no_pairs
from palate.data.embeddings import Dense
from palate.data.pairs import EmbeddedPairs
from palate.data.planted import one_crowd
from palate.data.splits import nested_shots
from palate.errors import DataError
from palate.living.population import Population
from palate.models.attribute_prior import AttributePrior, _Learning, narrowed
from palate.models.columns import Column, columns_of, encoded, moments, standard
from palate.models.hierarchical import Hierarchical
from palate.priors import Prior

Floats = NDArray[np.float64]
Known = dict[str, dict[str, float | str]]


class World(NamedTuple):
    """Seen users to fit on, unseen ones with choices to learn from and to test on, and everybody's attributes."""

    train: EmbeddedPairs
    support: EmbeddedPairs
    test: EmbeddedPairs
    attributes: Known
    told: Floats  # (2U, D) what the attributes make of everybody's reward, the seen users first


def world(seed: int, matter: float, *, users: int = 120, train: int = 20, test: int = 80, dim: int = 12) -> World:
    """Rewards crowd + V w with w of variance 1, of which the share `matter` follows age and region."""
    rng = np.random.default_rng(seed)
    crowd, frame = 0.25 * rng.standard_normal(dim), np.linalg.qr(rng.standard_normal((dim, 2)))[0]
    age, region = rng.standard_normal(2 * users), rng.integers(3, size=2 * users)
    told = np.stack([age, (region == 0) * 1.2 - (region == 1) * 1.2], axis=1)
    turn = np.linalg.qr(rng.standard_normal((2, 2)))[0]
    part_told = 1.5 * np.sqrt(matter) * told @ turn
    weights = part_told + 1.5 * np.sqrt(1 - matter) * rng.standard_normal((2 * users, 2))
    each = 40 + test
    table = rng.standard_normal((4 * users * each, dim)).astype(np.float32)
    left, right = np.arange(0, len(table), 2), np.arange(1, len(table), 2)
    margin = ((table[left] - table[right]) * (crowd + np.repeat(weights @ frame.T, each, axis=0))).sum(1)
    wins = rng.random(len(margin)) < 1 / (1 + np.exp(-margin))
    sides = [np.where(wins, a, b).reshape(2, users, each) for a, b in ((left, right), (right, left))]
    names = np.array([f"p{u:03d}" for u in range(2 * users)], dtype=object).reshape(2, users)

    def part(cohort: int, columns: slice) -> EmbeddedPairs:
        chosen, rejected = (side[cohort][:, columns] for side in sides)
        return EmbeddedPairs(shared, chosen.ravel(), rejected.ravel(), np.repeat(names[cohort], chosen.shape[1]))

    shared = Dense(torch.from_numpy(table))
    attributes: Known = {
        str(name): {"age": 40 + 12 * float(age[u]), "region": ("north", "south", "west")[region[u]]}
        for u, name in enumerate(names.ravel())
    }
    return World(part(0, slice(0, train)), part(1, slice(0, 40)), part(1, slice(40, None)), attributes, part_told @ frame.T)


@pytest.fixture(scope="module")
def matters() -> World:
    return world(1, 0.6)


@pytest.fixture(scope="module")
def base() -> Hierarchical:
    return Hierarchical(bend=0, types=())


@pytest.fixture(scope="module")
def plain(matters: World, base: Hierarchical) -> palate.RewardModel:
    return palate.fit(matters.train, base)


@pytest.fixture(scope="module")
def informed(matters: World, base: Hierarchical) -> AttributePrior:
    model = palate.fit(matters.train, AttributePrior(matters.attributes, base=base))
    assert isinstance(model, AttributePrior)
    return model


def accuracies(model: palate.RewardModel, support: EmbeddedPairs, test: EmbeddedPairs, shots: int | None) -> Floats:
    """(U,) of the users of `test`; before the first choice an attribute prior knows their attributes."""
    profiles = None
    if shots == 0 and isinstance(model, AttributePrior):
        nobody = no_pairs(model, test.user_ids)
        mean, rest = model.expected(test.user_ids), (nobody.covariance, nobody.n_pairs, nobody.converged, nobody.model)
        profiles, shots = Profiles(nobody.user_ids, mean, *rest), None
    found = palate.evaluate(model, support, test, profiles=profiles, shots=shots)
    return np.array([row["accuracy"] for row in found.rows()])


def test_attributes_that_matter_help_most_before_the_first_choice_and_never_hurt(
    matters: World, plain: palate.RewardModel, informed: AttributePrior
) -> None:
    gains = {}
    for shots in (0, 1, 2, 40):
        ours, theirs = (accuracies(m, matters.support, matters.test, shots) for m in (informed, plain))
        away = ours - theirs
        gains[shots] = float(away.mean()), float(away.std() / len(away) ** 0.5)
    for shots in (0, 1, 2):
        gain, error = gains[shots]
        assert gain - 1.96 * error > 0.01, gains
    assert gains[0][0] > gains[2][0] > gains[40][0]
    gain, error = gains[40]
    assert gain > -0.003 - 1.96 * error, gains


@pytest.mark.parametrize("seed", [2, 3])
def test_attributes_that_say_nothing_change_nothing(seed: int) -> None:
    empty, base = world(seed, 0.0, users=80, test=40), Hierarchical(bend=0, types=(), kappa=1.0)
    plain = palate.fit(empty.train, base)
    model = palate.fit(empty.train, AttributePrior(empty.attributes, base=base))
    for shots in (0, 2, 40):
        ours, theirs = (accuracies(m, empty.support, empty.test, shots).mean() for m in (model, plain))
        assert ours > theirs - 0.003


def test_the_effect_is_the_planted_one(matters: World, informed: AttributePrior) -> None:
    """Rewards that follow the attributes of new users go with what was planted for them, before anybody chose."""
    expected = informed.expected(matters.test.user_ids)
    _, slopes = palate.adaptation.pair_design(informed, matters.test)
    personal = (slopes * expected[matters.test.user_index]).sum(1).numpy()
    z = matters.test.differences().rows(torch.arange(len(matters.test))).numpy()
    planted = (z * matters.told[120:][matters.test.user_index.numpy()]).sum(1)
    assert np.corrcoef(personal, planted)[0, 1] > 0.8


# -- the estimation


def small(seed: int) -> tuple[Hierarchical, EmbeddedPairs, torch.Tensor]:
    """A population in double precision, choices with ties and weights, attributes (U, 2)."""
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((30, 4))
    sides = np.array([rng.permutation(30)[:2] for _ in range(90)])
    who = np.concatenate([np.arange(9), rng.integers(9, size=81)])
    data = EmbeddedPairs(table, *sides.T, [f"u{u}" for u in who], tie=rng.random(90) < 0.15, weight=rng.choice([0.5, 1, 2], 90))
    factor = np.tril(rng.standard_normal((2, 2))) + 1.5 * np.eye(2)
    numbers = {
        "direction": rng.standard_normal(4),
        "bases": rng.standard_normal((4, 2)),
        "share": np.ones(1),
        "means": 0.2 * rng.standard_normal((1, 2)),
        "factors": factor[None],
    }
    model = Hierarchical().like({name: torch.from_numpy(value) for name, value in numbers.items()})
    return model, data, torch.from_numpy(rng.standard_normal((9, 2)))


def test_the_effect_maximises_the_laplace_posterior_of_the_choices() -> None:
    """The same objective by finite differences: the best height of every user's posterior, whose width hardly moves."""
    model, data, table = small(0)
    learning = _Learning(model, data, table, torch.ones(9, dtype=torch.bool))
    effect, rest = learning.fit(0.5, learning.known)
    factor, mean = model.factors[0].numpy(), model.means[0].numpy()
    offset, slopes = (value.numpy() for value in palate.adaptation.pair_design(model, data))
    tie, weight, user = data.tie.numpy(), data.weight.numpy(), data.user_index.numpy()

    def evidence(flat: Floats) -> float:
        total = (flat**2).sum() / (2 * 0.5)
        for u in range(9):
            mine = user == u
            x = slopes[mine] @ factor
            base = offset[mine] + slopes[mine] @ mean + x @ (flat.reshape(2, 2) @ table[u].numpy())

            def objective(v: Floats, x: Floats = x, base: Floats = base, mine: NDArray[np.bool_] = mine) -> float:
                margin = base + x @ v
                return float(weight[mine] @ (np.logaddexp(0, -margin) + np.where(tie[mine], margin / 2, 0)) + v @ v / 2)

            v = minimize(objective, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x
            total += objective(v)
        return float(total)

    best = minimize(evidence, np.zeros(4), method="BFGS", options={"gtol": 1e-4})
    found = np.linalg.solve(factor, effect.numpy())
    np.testing.assert_allclose(found, best.x.reshape(2, 2), atol=5e-3)
    assert evidence(found.ravel()) == pytest.approx(best.fun, abs=1e-3)
    assert evidence(np.zeros(4)) > best.fun + 0.05
    # What attributes leave unexplained: S' = S - A Cov(a) A^T.
    covariance = factor @ factor.T
    explained = effect.numpy() @ (table.T @ table / 9).numpy() @ effect.numpy().T
    assert np.linalg.eigvalsh(np.eye(2) - np.linalg.solve(factor, np.linalg.solve(factor, explained).T)).min() > 0.05
    np.testing.assert_allclose(rest.numpy() @ covariance @ rest.numpy().T, covariance - explained, atol=1e-10)
    prior = model.prior
    assert prior is not None
    left = narrowed(prior, rest)
    np.testing.assert_allclose(left.covariance, covariance - explained, atol=1e-5)
    np.testing.assert_allclose(left.mean, mean)


def test_a_mixture_is_narrowed_about_its_mean() -> None:
    prior = Prior(torch.tensor([0.25, 0.75]), torch.tensor([[3.0], [-1.0]]), torch.tensor([[[1.0]], [[2.0]]]))
    found = narrowed(prior, torch.tensor([[0.5]]))
    assert float(found.mean) == pytest.approx(float(prior.mean))
    assert float(found.covariance) == pytest.approx(float(prior.covariance) / 4, rel=1e-5)


def test_a_new_user_is_their_own_convex_problem(matters: World, informed: AttributePrior) -> None:
    few = matters.support[nested_shots(matters.support, 3, 0)]
    some = few.of_users(matters.support.user_ids[:6])
    stranger = {user: mine for user, mine in matters.attributes.items() if user != some.user_ids[2]}
    model = informed.with_attributes(stranger)
    profiles = palate.adapt(model, some)
    offset, slopes = (value.double().numpy() for value in palate.adaptation.pair_design(model, some))
    own, everybody = model.informed, model.prior
    assert own is not None
    assert everybody is not None
    shift = model.expected(some.user_ids).double().numpy()
    assert not shift[2].any()
    assert shift[:2].any()
    for u in range(6):
        mine, prior = some.user_index.numpy() == u, everybody if u == 2 else own
        mean, cov = prior.means[0].double().numpy() + shift[u], prior.covariance.double().numpy()

        def objective(w: Floats, mine: Any = mine, mean: Floats = mean, cov: Floats = cov) -> float:
            away = w - mean
            return float(np.logaddexp(0, -offset[mine] - slopes[mine] @ w).sum() + away @ np.linalg.solve(cov, away) / 2)

        w = minimize(objective, mean, method="BFGS").x
        np.testing.assert_allclose(profiles.mean[u], w, atol=2e-3)
        p = 1 / (1 + np.exp(-offset[mine] - slopes[mine] @ w))
        hessian = np.linalg.inv(cov) + (slopes[mine] * (p * (1 - p))[:, None]).T @ slopes[mine]
        assert profiles.covariance is not None
        np.testing.assert_allclose(profiles.covariance[u], np.linalg.inv(hessian), rtol=2e-2, atol=2e-3)


# -- attributes as numbers


def test_known_attributes_leave_less_unknown_before_the_first_choice(matters: World, informed: AttributePrior) -> None:
    """A choice of hardly any weight changes hardly anything: the profile without it has the same mean and covariance."""
    known, stranger = matters.support.user_ids[:2]
    model = informed.with_attributes({known: matters.attributes[known]})
    nothing = no_pairs(model, (known, stranger))
    own, everybody = model.informed, model.prior
    assert own is not None
    assert everybody is not None
    away = everybody.mean - model.crowd_weights
    assert nothing.covariance is not None
    for found, prior in zip(nothing.covariance, (own, everybody), strict=True):
        torch.testing.assert_close(found, prior.covariance + torch.outer(away, away))
    assert float(nothing.covariance[0].trace()) < float(nothing.covariance[1].trace())
    said = matters.support[matters.support.user_index == 0][:1]
    hardly = EmbeddedPairs(said.embeddings, said.chosen, said.rejected, [known], weight=[1e-9])
    after = palate.adapt(model, hardly).covariance
    assert after is not None
    torch.testing.assert_close(after[0], own.covariance, atol=1e-5, rtol=1e-4)
    assert model.expected_covariance(()).shape == (0, *after.shape[1:])  # type: ignore[union-attr]


def test_columns_of_numbers_and_words() -> None:
    users = [f"u{i}" for i in range(12)]
    known: Known = {user: {"age": 20.0 + i, "town": "x" if i < 6 else "y"} for i, user in enumerate(users[:11])}
    known["u0"]["hobby"] = "chess"  # nobody else has it
    del known["u1"]["age"]
    known["new"] = {"town": "z", "age": 1e9}
    columns, rare = columns_of(known, users)
    assert columns == (Column("age", None), Column("town", "x"), Column("town", "y"))
    assert rare == {"hobby": 1}
    table, there = encoded(known, [*users, "new"], columns)
    assert there.tolist() == [True] * 11 + [False, True]
    assert torch.isnan(table[1, 0])
    assert table[0].tolist() == [20, 1, 0]
    assert table[6].tolist() == [26, 0, 1]
    assert torch.isnan(table[12, 1:]).all()  # a town that nobody seen lives in
    centre, size = moments(table[:12], columns)
    ages = np.array([20.0 + i for i in range(11) if i != 1])
    np.testing.assert_allclose(centre, [ages.mean(), 6 / 11, 5 / 11])
    np.testing.assert_allclose(size, [ages.std(), 0.5, 0.5])
    numbers = standard(table, centre, size)
    assert numbers[12].tolist() == [4, 0, 0]  # far away counts as four standard deviations
    assert numbers[1, 0] == 0
    assert not numbers[11].any()


def test_ids_are_texts_as_choices_have_them(matters: World) -> None:
    """`frame.to_dict('index')` has numbers for ids where the frame has; the choices of the same people have texts."""
    attributes = {number: {"age": 1.0} for number in range(3)}
    assert list(AttributePrior(attributes).attributes) == ["0", "1", "2"]  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the attributes have user '1' twice"):
        AttributePrior({1: {"age": 1.0}, "1": {"age": 2.0}})  # type: ignore[dict-item]
    with pytest.raises(DataError, match="those of 3 users, such as '0', and none of them made a choice; expected those of the"):
        palate.fit(matters.train, AttributePrior(attributes, base=Hierarchical(1, bend=0, kappa=1.0)))  # type: ignore[arg-type]


def test_a_number_that_is_everybodys_moves_nobody() -> None:
    table, _ = encoded({f"u{i}": {"height": 1.7} for i in range(6)}, [f"u{i}" for i in range(6)], (Column("height", None),))
    centre, size = moments(table, (Column("height", None),))
    assert not standard(table, centre, size).any()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"ada": {"age": float("nan")}}, "attribute 'age' of user 'ada' is nan; expected a finite number or a word"),
        ({"ada": {"age": None}}, "attribute 'age' of user 'ada' is None"),
        ({"ada": 3}, r"attributes of user 'ada' are 3 \(int\); expected a mapping from names to numbers and words"),
        ([("ada", {"age": 3})], r"attributes are \[\('ada', .* \(list\); expected a mapping from user ids to attributes"),
        (
            {"ada": {"age": 3}, "bo": {"age": "old"}},
            "'age' is a number for some users and a word for 'bo'; expected one of the two",
        ),
    ],
)
def test_attributes_that_are_none(attributes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        AttributePrior(attributes)
    with pytest.raises(DataError, match=message):
        AttributePrior().with_attributes(attributes)


def test_arguments_that_make_no_model() -> None:
    with pytest.raises(DataError, match=r"effect is -1\.0; expected a number of at least 0"):
        AttributePrior({}, effect=-1.0)
    with pytest.raises(DataError, match="base has blend=True; expected a Hierarchical without"):
        AttributePrior({}, base=Hierarchical(blend=True))


# -- what every method keeps


def test_the_same_bits_from_disk_and_nobodys_attributes_there(matters: World, informed: AttributePrior, tmp_path: Path) -> None:
    informed.save_pretrained(tmp_path)
    loaded = palate.load_model(tmp_path)
    assert isinstance(loaded, AttributePrior)
    assert loaded.fingerprint() == informed.fingerprint()
    assert loaded.record == informed.record
    assert not loaded.attributes
    written = (tmp_path / "config.json").read_text() + str((tmp_path / "model.safetensors").read_bytes())
    assert "p000" not in written
    assert "north" in written  # the names of words are the model's
    given = loaded.with_attributes(matters.attributes | {"new": {"region": "moon"}})
    assert given.record["attributes_given"]["unseen_words"] == {"region": 1}
    assert given.fingerprint() == informed.fingerprint()
    assert given.encoder == informed.encoder
    ours, theirs = (palate.margins(m, matters.test, palate.adapt(m, matters.support)) for m in (informed, given))
    assert torch.equal(ours, theirs)
    uneven = matters.support[39:]  # one choice of the first user, forty of the others: several batches
    with pytest.warns(UserWarning, match=r"everybody counts as unknown; expected model\.with_attributes") as said:
        unknown = palate.adapt(loaded, uneven)
    assert [Path(one.filename).name for one in said] == [Path(__file__).name]  # once, and at the caller's line
    assert torch.equal(unknown.mean, palate.adapt(loaded.with_attributes({}), uneven).mean)
    assert not torch.equal(unknown.mean, palate.adapt(given, uneven).mean)


def test_a_stored_live_profile_does_not_outlive_the_attributes_it_was_made_from(
    matters: World, plain: palate.RewardModel, informed: AttributePrior
) -> None:
    user, other = matters.support.user_ids[:2]
    said, mine = matters.support.of_users([user])[:3], dict(matters.attributes[user])
    population = Population.of(informed)
    live, silent = population.start(user).update(said), population.start(user)
    elsewhere = "south" if mine["region"] == "north" else "north"
    for table in ({}, {other: mine}, {user: mine | {"region": elsewhere}}):
        now = Population.of(informed.with_attributes(table))
        for stored, fresh in ((live, now.start(user).update(said)), (silent, now.start(user))):
            data = stored.to_bytes()
            assert now.weights_of(data) is None
            assert np.abs(fresh.mean - stored.mean).max() > 0.01
            np.testing.assert_allclose(now.from_bytes(data).mean, fresh.mean, atol=1e-6)
    same = Population.of(informed.with_attributes({user: mine}))  # what is known of others does not matter
    light = same.weights_of(live.to_bytes())
    assert light is not None
    np.testing.assert_array_equal(light.mean, live.mean)
    np.testing.assert_array_equal(same.from_bytes(live.to_bytes()).mean, live.mean)

    # Models that know people by their choices alone write what they always wrote; what an AttributePrior wrote then is doubted.
    def made_with(data: bytes) -> str:
        return str(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["settings"])

    before = made_with(Population.of(plain).start(user).to_bytes())
    assert before == "[[null, null], [[0.0], [1.0]]]"
    data = live.to_bytes()
    head = data[8 : 8 + int.from_bytes(data[:8], "little")]
    old = head.replace(json.dumps(made_with(data)).encode(), json.dumps(before).encode())
    assert len(old) < len(head)
    old = len(old).to_bytes(8, "little") + old + data[8 + len(head) :]
    gone = Population.of(informed.with_attributes({}))
    assert gone.weights_of(old) is None
    np.testing.assert_allclose(gone.from_bytes(old).mean, gone.start(user).update(said).mean, atol=1e-6)


def test_without_attributes_it_is_hierarchical(matters: World, plain: palate.RewardModel, informed: AttributePrior) -> None:
    unknown, original = informed.with_attributes({}), palate.adapt(plain, matters.support)
    found = palate.adapt(unknown, matters.support)
    assert torch.equal(found.mean, original.mean)
    assert torch.equal(unknown.expected(matters.test.user_ids), torch.zeros_like(found.mean))
    assert torch.equal(palate.margins(informed, matters.test), palate.margins(plain, matters.test))  # no profile: the crowd


def test_swapping_negates_a_batch_is_a_loop_and_order_does_not_matter(matters: World, informed: AttributePrior) -> None:
    some = matters.support.of_users(matters.support.user_ids[:5])
    half = informed.with_attributes({user: matters.attributes[user] for user in some.user_ids[:3]})  # known and unknown together
    together = palate.adapt(half, some)
    torch.testing.assert_close(palate.margins(half, some.swapped(), together), -palate.margins(half, some, together))
    shuffled = palate.adapt(half, some[torch.randperm(len(some), generator=torch.Generator().manual_seed(0))])
    for row, user in enumerate(some.user_ids):
        alone = palate.adapt(half, some.of_users([user]))
        torch.testing.assert_close(alone.mean[0], together.mean[row], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(shuffled[user].mean, together.mean[row], atol=1e-4, rtol=1e-4)
    assert together.covariance is not None
    assert bool(together.converged.all())


def test_where_nobody_differs_or_nobody_can_be_held_out_there_is_no_effect() -> None:
    alike = one_crowd(3, n_users=40, n_train=15, n_test=5, dim=6)
    known: Known = {user: {"age": float(i)} for i, user in enumerate(alike.train.user_ids)}
    model = palate.fit(alike.train, AttributePrior(known, base=Hierarchical(bend=0, types=())))
    assert model.n_weights == 0
    assert isinstance(model, AttributePrior)
    assert model.expected(["seen00", "nobody"]).shape == (2, 0)
    assert len(palate.adapt(model, alike.support)) == 40
    _, data, _ = small(1)
    few = palate.fit(data, AttributePrior({f"u{i}": {"age": float(i)} for i in range(9)}))
    assert few.record["selection"]["effect"] == 0
    told = palate.fit(data, AttributePrior({f"u{i}": {"age": float(i)} for i in range(9)}, effect=0.1))
    assert isinstance(told, AttributePrior)
    assert bool(told.expected(["u8"]).any())
