"""Explanations: the slow `name_profile`, true leave-one-out, conditioned Gaussians and planted tastes say what they must be."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

import palate
from palate.adaptation import Profile, adapt
from palate.data.synthetic import SyntheticData, synthetic
from palate.encoders.offline import MEANINGS, Style
from palate.errors import DataError, MismatchError, ModelFileError
from palate.living.draft import Draft
from palate.living.explain import AxisEdit, Explainer, influence
from palate.living.explanation import Explanation
from palate.living.population import Population
from palate.living.profile import LiveProfile
from palate.living.terms import Terms
from palate.models.base import RewardModel
from palate.naming import NO_DIFFERENCE, NO_NAME, WORDS, name_profile
from palate.priors import Prior

Floats = NDArray[np.float64]
AXES = list(MEANINGS)
WISHES = (("length", 1.0), ("hedging", -1.5), ("emoji", 1.0))


@pytest.fixture(scope="module")
def world() -> SyntheticData:
    return synthetic(n_users=40, n_choices=20, n_prompts=30, n_responses=8, seed=3)


@pytest.fixture(scope="module")
def model() -> RewardModel:
    """People differ in three axes and agree on commas."""
    bases = torch.zeros(40, 3)
    for k, (name, size) in enumerate(WISHES):
        bases[AXES.index(name), k] = size
    factor = torch.tensor([[1.0, 0, 0], [0.3, 0.8, 0], [-0.2, 0.1, 1.2]])
    prior = Prior.gaussian(factor @ factor.T)
    direction = torch.zeros(40)
    direction[AXES.index("commas")] = 0.5
    numbers = {"direction": direction, "bases": bases, "share": prior.share, "means": prior.means, "factors": prior.factors}
    return palate.Hierarchical(3).like(numbers)


@pytest.fixture(scope="module")
def explainer(world: SyntheticData, model: RewardModel) -> Explainer:
    return Explainer(model, Style(), world.pairs)


def chooser(world: SyntheticData, model: RewardModel, weights: Floats, n: int, seed: int = 0) -> LiveProfile:
    """Somebody with these weights who chose `n` times among the world's pairs, an event each, c0, c1 ..."""
    population = Population.of(model)
    data = Style().embed(world.pairs)
    rewards = population.rewards(data.embeddings)
    live, rng = population.start("ada"), np.random.default_rng(seed)
    for number, row in enumerate(rng.permutation(len(data))[:n].tolist()):
        a, b = int(data.chosen[row]), int(data.rejected[row])
        offset, slopes = rewards.offset[a] - rewards.offset[b], rewards.slopes[a] - rewards.slopes[b]
        sign = 1 if rng.random() < expit(offset + slopes @ weights) else -1
        live = live.update(Terms.pairs([sign * offset], [sign * slopes]), event_id=f"c{number}")
    return live


@pytest.mark.parametrize("user", ["user03", "user17"])
def test_in_milliseconds_it_says_what_the_slow_naming_says(
    world: SyntheticData, model: RewardModel, explainer: Explainer, user: str
) -> None:
    profile = adapt(model, Style().embed(world.pairs))[user]
    slow = name_profile(model, world.pairs, Style(), profile)
    quick, name = explainer.explain(profile), slow.names[0]
    assert (quick.label, quick.sure) == (name.label, name.label != NO_NAME)
    assert quick.threshold == pytest.approx(slow.threshold, abs=1e-6)
    assert quick.explained == pytest.approx(name.explained, abs=1e-6)
    assert [liking.axis for liking in quick.likings[:8]] == [axis.name for axis in name.axes[:8]]
    theirs = {axis.name: axis for axis in name.axes}
    for mine in quick.likings:
        axis = theirs[mine.axis]
        assert (mine.correlation, mine.low, mine.high) == pytest.approx((axis.correlation, axis.low, axis.high), abs=1e-6)
        assert mine.certain == axis.certain


def test_words_come_with_certainty_and_not_before(world: SyntheticData, model: RewardModel, explainer: Explainer) -> None:
    """Ada wants longer answers, which is her first base, and less hedging, the second."""
    found = [explainer.explain(chooser(world, model, np.array([2.5, 1.0, 0.0]), n)) for n in (0, 2, 120)]
    assert (found[0].label, found[0].sure, found[0].telling) == (NO_DIFFERENCE, False, ())
    assert found[0].text() == "After 0 choices, nothing sets ada apart from everybody else."
    assert (found[1].sure, found[1].n_choices) == (False, 2)
    assert not [word for both in WORDS.values() for word in both if word in found[1].text()]
    assert {"longer", "less hedged"} <= set(found[2].label.replace("; ", ", ").split(", "))
    strong = {liking.axis: liking for liking in found[2].likings}
    assert strong["hedging"].worth < -1 < -0.1 < strong["hedging"].crowd
    assert found[2].text().startswith("Beyond what everybody wants, ada wants: ")
    assert Explanation.model_validate_json(found[2].model_dump_json()) == found[2]


def test_what_an_axis_is_worth_is_the_slope_of_the_reward_on_it(
    world: SyntheticData, model: RewardModel, explainer: Explainer
) -> None:
    """Prompt by prompt and text by text: least squares of the reward on the standardised axis, both within the prompt."""
    used = sorted(set(world.pairs.chosen.tolist()) | set(world.pairs.rejected.tolist()))
    texts = [world.pairs.texts[i] for i in used]
    table = Style().encode(texts)
    raw = table.rows(torch.arange(len(used)))
    weights = torch.tensor([0.7, -0.4, 1.1])
    offset, slopes = model.design(model.features(table))
    reward = (offset + slopes @ weights).double().numpy()
    style = raw.double().numpy()[:, [AXES.index(axis) for axis in explainer.axes]]
    for prompt in {text.prompt for text in texts}:
        mine = [n for n, text in enumerate(texts) if text.prompt == prompt]
        reward[mine] -= reward[mine].mean()
        style[mine] -= style[mine].mean(0)
    slope = (style / style.std(0)).T @ reward / len(reward)
    profile = Profile("ada", weights, None, 3, True, model.fingerprint())
    found = {liking.axis: liking.worth for liking in explainer.explain(profile).likings}
    np.testing.assert_allclose([found[axis] for axis in explainer.axes], slope, atol=1e-5)


def test_an_explainer_is_saved_beside_its_model(
    world: SyntheticData, model: RewardModel, explainer: Explainer, tmp_path: Path
) -> None:
    explainer.save(tmp_path)
    live = chooser(world, model, np.array([1.0, 0.5, -1.0]), 9)
    assert Explainer.load(tmp_path, model).explain(live) == explainer.explain(live)
    other = palate.Hierarchical(3).like(dict(model.state_dict()) | {"direction": torch.zeros(40)})
    with pytest.raises(MismatchError, match="belongs to model"):
        Explainer.load(tmp_path, other)
    path = tmp_path / "explainer.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ModelFileError, match="cannot be read as an explainer"):
        Explainer.load(tmp_path, model)


# -- what a profile owes to a choice


def test_the_influence_of_choices_is_that_of_leaving_each_out(
    world: SyntheticData, model: RewardModel, explainer: Explainer
) -> None:
    live = chooser(world, model, np.array([1.0, 0.5, -1.0]), 12)
    rng = np.random.default_rng(5)
    several = Terms.empty(3)._replace(  # a pick among four, and a choice that counts twice
        slopes=rng.standard_normal((6, 3)),
        offset=rng.standard_normal(6),
        target=np.array([0, 1.0, 0, 0, 0.5, 0.5]),
        start=np.array([0, 4]),
        weight=np.array([1.0, 2.0]),
    )
    live = live.update(several, event_id="pick")
    history = live.history
    events = history.event, np.repeat(np.arange(len(history.ids)), history.n_pulls)
    assert live.covariance is not None
    quick = influence(live.terms, events, live.n_events, live.mean, live.covariance)
    true = np.stack([live.mean - live.undo(name).mean for name in live.event_ids])
    size = np.linalg.norm(true, axis=1)
    wrong = np.linalg.norm(quick - true, axis=1) / size
    assert wrong[:-1].max() < 0.1
    assert wrong[-1] < 0.25  # half of what is known is left out with it, and one step of Newton does not get all the way
    assert np.argsort(-np.linalg.norm(quick, axis=1))[:3].tolist() == np.argsort(-size)[:3].tolist()
    told = explainer.explain(live).telling
    assert len(told) == 5
    assert {one.event_id for one in told[:2]} <= {live.event_ids[e] for e in np.argsort(-size)[:4]}
    assert all(first.moves >= then.moves > 0 for first, then in pairwise(told))


def test_the_influence_of_a_constraint_alone_is_exact(model: RewardModel, explainer: Explainer) -> None:
    start = Population.of(model).start("ada")
    live = explainer.edited(start, explainer.edit("length", start, by=1.0, softness=0.01))
    none = np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64)
    assert live.covariance is not None
    moved = influence(live.terms, none, 1, live.mean, live.covariance)[0]
    np.testing.assert_allclose(moved, live.mean - start.mean, rtol=1e-6)
    assert [one.event_id for one in explainer.explain(live).telling] == ["axis:length"]


# -- and how it is changed


def test_a_hard_edit_is_a_conditioned_gaussian(model: RewardModel, explainer: Explainer) -> None:
    """m + C a (t - a'm) / a'Ca and C - C a a'C / a'Ca, for somebody who has said nothing else."""
    start = Population.of(model).start("ada")
    edit = explainer.edit("hedging", start, to=0.8, softness=1e-5)
    pull = explainer.terms(edit)
    a, level = pull.pulls[0], pull.level[0]
    live = explainer.edited(start, edit)
    m, c = start.mean, start.covariance
    assert c is not None
    assert live.covariance is not None
    np.testing.assert_allclose(live.mean, m + c @ a * (level - a @ m) / (a @ c @ a), atol=1e-6)
    np.testing.assert_allclose(live.covariance, c - np.outer(c @ a, c @ a) / (a @ c @ a), atol=1e-6)


def test_a_hard_edit_of_a_learned_profile_is_the_constrained_optimum(
    world: SyntheticData, model: RewardModel, explainer: Explainer
) -> None:
    live = chooser(world, model, np.array([1.5, -1.0, 0.5]), 25)
    off = explainer.edit("length", live, to=0.0, softness=1e-4)
    edited = explainer.edited(live, off)
    terms, pull = live.terms, explainer.terms(off)
    margin, slopes = terms.offset[::2], terms.slopes[::2]
    assert model.prior is not None
    precision = np.linalg.inv(model.prior.covariance.double().numpy())

    def loss(w: Floats) -> float:
        return float(np.logaddexp(0, -(margin + slopes @ w)).sum() + w @ precision @ w / 2)

    held = {"type": "eq", "fun": lambda w: pull.pulls[0] @ w - pull.level[0]}
    best = minimize(loss, np.zeros(3), method="SLSQP", constraints=[held], options={"ftol": 1e-13, "maxiter": 500})
    assert best.success
    np.testing.assert_allclose(edited.mean, best.x, atol=1e-4)
    worth = {liking.axis: liking.worth for liking in explainer.explain(edited).likings}
    assert worth["length"] == pytest.approx(0, abs=1e-6)


def test_an_edit_is_an_event_that_is_replaced_and_undone(world: SyntheticData, model: RewardModel, explainer: Explainer) -> None:
    live = chooser(world, model, np.array([1.5, 0.0, 0.5]), 30)
    before = {liking.axis: liking for liking in explainer.explain(live).likings}["length"]
    down = explainer.edit("length", live, by=-1.0)
    assert before.people_std is not None
    assert down.to == pytest.approx(before.worth - before.people_std)
    assert AxisEdit.model_validate_json(down.model_dump_json()) == down
    lower = explainer.edited(live, down)
    after = {liking.axis: liking for liking in explainer.explain(lower).likings}["length"]
    assert down.to < after.worth < before.worth - 0.8 * before.people_std  # the choices still argue a little
    again = explainer.edited(lower, explainer.edit("length", lower, to=before.worth, softness=0.001))
    assert again.event_ids == lower.event_ids == (*live.event_ids, "axis:length")
    worth = {liking.axis: liking.worth for liking in explainer.explain(again).likings}
    assert worth["length"] == pytest.approx(before.worth, abs=1e-4)
    np.testing.assert_allclose(again.undo(down.name).mean, live.mean, atol=1e-9)


def test_what_cannot_be_explained_or_set_is_refused(world: SyntheticData, model: RewardModel, explainer: Explainer) -> None:
    live = Population.of(model).start("ada")
    with pytest.raises(DataError, match="'loudness' is no axis that varies"):
        explainer.edit("loudness", live, by=1)
    for arguments in ({}, {"by": 1.0, "to": 0.0}):
        with pytest.raises(DataError, match="expected exactly one of them"):
            explainer.edit("length", live, **arguments)
    with pytest.raises(DataError, match="set to nan"):
        explainer.edit("length", live, to=float("nan"))
    other = palate.Hierarchical(3).like(dict(model.state_dict()) | {"direction": torch.zeros(40)})
    down, stranger = explainer.edit("length", live, by=-1.0), Population.of(other).start("ada")
    whose = f"model {other.fingerprint()[:12]} given to the explainer of model {model.fingerprint()[:12]}"
    for profile in (stranger, stranger.profile):
        with pytest.raises(MismatchError, match=whose):
            explainer.explain(profile)
        with pytest.raises(MismatchError, match=whose):
            explainer.edit("length", profile, to=0.0)
    for mine in (stranger, Draft(stranger)):
        with pytest.raises(MismatchError, match=whose):
            explainer.edited(mine, down)
    with pytest.raises(DataError, match="has no weights"):
        Explainer(palate.fit(Style().embed(world.pairs), palate.BradleyTerry()), Style(), world.pairs)


def test_an_edit_never_replaces_what_was_said(world: SyntheticData, model: RewardModel, explainer: Explainer) -> None:
    population = Population.of(model)
    down = explainer.edit("length", population.start("ada"), by=-1.0)
    for said in (Terms.pairs([1.0], [[1.0, 0, 0]]), Terms.empty(3)):
        live = population.start("ada").update(said, event_id=down.name)
        with pytest.raises(DataError, match="came already and is no edit of an axis"):
            explainer.edited(live, down)
    other = explainer.edited(live, down.model_copy(update={"event_id": "mine"}))
    assert other.event_ids == (down.name, "mine")
